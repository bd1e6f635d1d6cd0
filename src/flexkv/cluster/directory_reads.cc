// The part of Directory that follows other nodes.
#include <algorithm>
#include <limits>

#include "flexkv/base/assert.h"
#include "flexkv/cluster/directory.h"

namespace flexkv::cluster {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
// Batches of all streams in one answer, as far as each stream may give some: that bounds what an answer holds.
constexpr std::uint64_t kEntriesPerRead = 64;
// More than a node tells between two reads, usually: else each read would seem to have left something.
constexpr std::uint64_t kEntriesPerStreamMin = 4;

}  // namespace

std::optional<meta::Request> Directory::next_read(Nanos now) {
  FLEXKV_ASSERT(!reading_);
  expire(now);
  // A read that waits for news must know all streams there are: it comes after the round.
  if (!joined_ || leaving_ || epoch_to_enter_ || round_is_near(now)) return std::nullopt;
  read_targets_.clear();
  std::vector<meta::Position> positions;
  bool loading = false;
  for (auto& [node, peer] : peers_) {
    for (auto& [space, follower] : peer.followers) {
      if (follower.loading() && !loading && !read_loads_) {
        reading_ = read_loads_ = true;
        read_epoch_ = epoch_;
        read_targets_ = {{node, space, 0, 0}};
        return follower.load_request();
      }
      loading = loading || follower.loading();
      if (!follower.following()) continue;
      read_targets_.push_back({node, space, follower.known(), follower.promised()});
      positions.push_back(follower.position());
    }
  }
  if (!loading && now < read_after_) return std::nullopt;
  positions.push_back({names_.bell(), bell_after_});
  read_count_ = std::max(kEntriesPerStreamMin, kEntriesPerRead / positions.size());
  reading_ = true;
  read_loads_ = false;
  read_epoch_ = epoch_;
  // Snapshots and streams take turns, so that a large snapshot does not hold the others up.
  return meta::Request{meta::read(std::move(positions), read_count_, loading ? 0 : beat_gap())};
}

Follower* Directory::find(const Target& target) {
  const auto peer = peers_.find(target.node);
  if (peer == peers_.end()) return nullptr;
  const auto follower = peer->second.followers.find(target.space);
  return follower == peer->second.followers.end() ? nullptr : &follower->second;
}

void Directory::read_done(const Result<meta::Answers>& answers, Nanos now) {
  FLEXKV_ASSERT(reading_);
  reading_ = false;
  if (!answers) return want_round(now);
  if (read_epoch_ != epoch_ || epoch_to_enter_) return;
  if (!read_loads_) {
    entries_done(answers.value()[0].entries, now);
  } else if (Follower* follower = find(read_targets_[0]); follower != nullptr && follower->loading()) {
    follower->loaded(answers.value(), now);
  }
  for (const Target& target : read_targets_) {
    const Follower* follower = find(target);
    if (follower == nullptr || !follower->stuck()) continue;
    // It asks with the next heartbeat, and nobody need wait for theirs to hear of it.
    ring_ = true;
    want_round(now);
  }
}

Nanos Directory::read_due(Nanos now) const { return now < read_after_ ? read_after_ : kForever; }

void Directory::entries_done(const std::vector<meta::Entry>& entries, Nanos now) {
  // A read names all streams, whatever they have to say: so it does not begin for each batch of each node. Nobody is
  // much later for it, as those who write wait as long.
  read_after_ = now + options_.limits.publish_after;
  for (std::size_t first = 0, t = 0; t <= read_targets_.size(); ++t) {
    std::size_t end = first;
    while (end < entries.size() && entries[end].stream == t) ++end;
    const auto of_stream = std::span(entries).subspan(first, end - first);
    first = end;
    if (of_stream.size() == read_count_) read_after_ = now;  // there may be more
    if (t == read_targets_.size()) {
      if (of_stream.empty()) break;
      bell_after_ = of_stream.back().id;
      want_round(now);
      break;
    }
    Follower* follower = find(read_targets_[t]);
    // It may have begun anew since the read was asked for.
    if (follower == nullptr || !follower->following() || follower->known() != read_targets_[t].known) continue;
    follower->read(of_stream, of_stream.size() < read_count_, read_targets_[t].promised, now);
  }
}

}  // namespace flexkv::cluster
