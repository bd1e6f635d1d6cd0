#include "flexkv/cluster/follower.h"

#include <algorithm>

#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

constexpr std::uint64_t kPartsPerRequest = 4;
// How long a replica that had no room waits before the whole is read again, now that there may be some.
constexpr Nanos kRetryLeftOut = 60 * kSecond;

}  // namespace

void Follower::told(const Beat::Space& space, Nanos now) {
  told_ = space;
  const bool first = state_ == State::kNew;
  const bool helps = state_ == State::kStuck && told_.generation != tried_;
  const bool has_room_again =
      state_ == State::kFollowing && left_out_ && replica_.roomy() && now >= begun_ + kRetryLeftOut;
  if (first || helps || has_room_again) begin(now);
}

void Follower::begin(Nanos now) {
  replica_.clear(node_, space_);
  left_out_ = false;
  begun_ = now;
  tried_ = told_.generation;
  loading_ = told_;
  part_ = 0;
  known_ = loading_.base;
  state_ = loading_.part_count > 0 ? State::kLoading : State::kFollowing;
}

void Follower::gap(Nanos now) {
  ++stats_.gaps;
  if (told_.generation != tried_) return begin(now);
  replica_.clear(node_, space_);
  state_ = State::kStuck;
}

void Follower::refuse(const Error& error, Nanos now) {
  ++stats_.refused;
  stats_.last_refusal = error.message;
  gap(now);
}

void Follower::apply(std::span<const Residency> residencies) {
  stats_.residencies += residencies.size();
  if (!replica_.apply(node_, space_, residencies)) left_out_ = true;
}

meta::Request Follower::load_request() const {
  meta::Request request;
  const std::uint64_t end = std::min(loading_.part_count, part_ + kPartsPerRequest);
  for (std::uint64_t part = part_; part < end; ++part) request.push_back(meta::get_part(snapshot_place(), part));
  return request;
}

void Follower::loaded(std::span<const meta::Answer> answers, Nanos now) {
  for (const meta::Answer& answer : answers) {
    if (!answer.found) return gap(now);
    const auto part = decode_batch(answer.value, snapshot_place());
    if (!part) return refuse(part.error(), now);
    if (part.value().number != part_) return gap(now);
    apply(part.value().residencies);
    ++part_;
  }
  if (part_ < loading_.part_count) return;
  ++stats_.snapshots;
  state_ = State::kFollowing;
}

void Follower::read(std::span<const meta::Entry> entries, bool all, std::uint64_t promised, Nanos now) {
  for (const meta::Entry& entry : entries) {
    const auto batch = decode_batch(entry.value, stream_);
    if (!batch) return refuse(batch.error(), now);
    const std::uint64_t number = batch.value().number;
    if (number <= known_) continue;
    if (number != known_ + 1 || meta::entry_number(entry.id) != number) return gap(now);
    if (batch.value().cleared) {
      replica_.clear(node_, space_);
      left_out_ = false;
    }
    apply(batch.value().residencies);
    known_ = number;
    ++stats_.batches;
  }
  if (all && known_ < promised) gap(now);
}

}  // namespace flexkv::cluster
