#include "flexkv/server/read_source.h"

#include <algorithm>

namespace flexkv::server {
namespace {

constexpr double kPatienceGaps = 2;  // of the longest that the read has had between two blocks

}  // namespace

ReadSource::Read ReadSource::begin(Tier tier, std::uint64_t block_bytes, std::uint32_t blocks, Nanos now) {
  for (std::uint32_t i = 0; i < blocks; ++i) rate_.begin(block_bytes, now);
  ++reads_;
  Read read;
  read.tier = tier;
  read.block_bytes = block_bytes;
  read.blocks = blocks;
  read.begun = now;
  read.latest = now;
  read.came_before = came_bytes_;
  return read;
}

void ReadSource::came(Read& read, Nanos now) {
  rate_.end(read.block_bytes, true, now);
  came_bytes_ += read.block_bytes;
  if (read.came++ > 0) {
    read.longest_gap = std::max(read.longest_gap, now - read.latest);
  } else {
    read.first_at = now;
    read.first_bytes = came_bytes_ - read.came_before;
  }
  read.latest_bytes = came_bytes_ - read.came_before;
  read.latest = now;
  read.given_up = false;
}

void ReadSource::end(const Read& read, End how, TierCosts& all, Nanos now) {
  for (std::uint32_t i = read.came; i < read.blocks; ++i) rate_.end(read.block_bytes, false, now);
  --reads_;
  learn(read, all, now);
  if (how != End::kFailed) {
    if (read.came > 0) next_rest_ = kRestMin;
  } else if (!resting(now)) {  // reads that fail while it rests were asked before that: all together are one failure
    rests_until_ = now + next_rest_;
    next_rest_ = std::min(next_rest_ * 2, kRestMax);
  }
}

void ReadSource::learn(const Read& read, TierCosts& all, Nanos now) {
  if (read.came == 0) return;
  if (read.came == read.blocks) stopped_ = false;
  const auto observe = [&](std::uint64_t bytes, Nanos at) {
    const auto tier = static_cast<std::size_t>(read.tier);
    costs_[tier].observe(bytes, at - read.begun, now);
    all[tier].observe(bytes, at - read.begun, now);
  };
  // How far away it is shows when the first comes, unless that waits for all of it.
  const bool one_by_one = read.tier == Tier::kMemory && step_bytes_ == 0;
  if (one_by_one && read.latest > read.first_at) observe(read.first_bytes, read.first_at);
  observe(read.latest_bytes, read.latest);
}

plan::TransferTime ReadSource::time(Tier tier, const TierCosts& all, Nanos now) const {
  const auto number = static_cast<std::size_t>(tier);
  const plan::TransferTime own = costs_[number].time(all[number].time({}, now), now);
  if (own.known()) return own;
  // What is known of the other tier is nearer to it than nothing.
  return costs_[1 - number].time(all[1 - number].time({}, now), now);
}

Nanos ReadSource::stops_at(const Read& read, const TierCosts& all, Nanos now) const {
  const plan::TransferTime known = time(read.tier, all, now);
  double usual = 0;
  if (known.known() && read.came == 0) {
    usual = known.estimate(static_cast<double>(waiting_bytes()));
  } else if (known.known()) {
    // The reads of a place have their turns. One from drives has been read there by now.
    const auto step = static_cast<double>(std::max(step_bytes_, read.block_bytes)) * reads_;
    usual = known.per_byte * step + (read.tier == Tier::kDrives ? 0 : known.fixed);
  } else if (read.came > 0) {
    usual = static_cast<double>(read.latest - read.begun) / read.came;
  }
  const double patient = std::max(kPatienceTimes * usual, kPatienceGaps * static_cast<double>(read.longest_gap));
  const auto tier = static_cast<std::size_t>(read.tier);
  const bool measured = read.came > 0 || costs_[tier].time(all[tier].time({}, now), now).known();
  constexpr double kMost = 3600.0 * kSecond;  // far beyond every deadline
  const Nanos patience =
      std::max(measured ? kPatienceMin : kPatienceUnknown, static_cast<Nanos>(std::min(patient, kMost)));
  return read.latest + (stopped_ ? 2 * patience : patience);
}

void ReadSource::stopped(Read& read, Nanos now) {
  read.given_up = true;
  read.latest = now;
  stopped_ = true;
}

void ReadWatch::watch(std::uint64_t read, Nanos at) {
  forget(read);
  times_[read] = at;
  order_.emplace(at, read);
}

void ReadWatch::forget(std::uint64_t read) {
  const auto found = times_.find(read);
  if (found == times_.end()) return;
  order_.erase({found->second, read});
  times_.erase(found);
}

std::optional<Nanos> ReadWatch::next() const {
  if (order_.empty()) return std::nullopt;
  return order_.begin()->first;
}

std::vector<std::uint64_t> ReadWatch::take_due(Nanos now) {
  std::vector<std::uint64_t> due;
  while (!order_.empty() && order_.begin()->first <= now) {
    due.push_back(order_.begin()->second);
    forget(due.back());
  }
  return due;
}

}  // namespace flexkv::server
