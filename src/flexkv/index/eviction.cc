// Making room in a tier.
#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

namespace {

constexpr std::uint32_t kGhostsAhead = 12;

}  // namespace

std::uint32_t PrefixIndex::evict(Tier tier, std::uint32_t count, Nanos now, std::vector<Evicted>& out) {
  FLEXKV_ASSERT(tier < tier_count_);
  advance(now);
  Policy& policy = *policies_[tier];
  std::uint32_t taken = 0;
  while (taken < count) {
    const SegmentId id = policy.victim(now_);
    if (id == kNone) break;
    const Segment& segment = segments_[id];
    const Run& run = runs_[segment.run];
    const Residency& residency = run.tiers[tier];
    const bool leaf = residency.top == id && residency.children == 0;
    const std::uint32_t floor = leaf ? std::max(start(segment), pinned_length(run)) : segment.end;
    if (floor >= segment.end) {
      policy.remove(id);  // lay_bare() or unpin() brings it back
    } else {
      taken += take_from_end(segment.run, tier, floor, count - taken, out);
    }
  }
  return taken;
}

// Takes up to `count` slots of the deepest segment of a run, not those before block `floor`.
std::uint32_t PrefixIndex::take_from_end(RunId id, Tier tier, std::uint32_t floor, std::uint32_t count,
                                         std::vector<Evicted>& out) {
  Run& run = runs_[id];
  const SegmentId segment = run.tiers[tier].top;
  const key::BlockKey* keys = run.blocks.keys();
  Slot* slots = run.blocks.slots(tier);
  const Ghost ghost{MissReason::kEvicted, segments_[segment].uses, now_};
  std::uint32_t taken = 0;
  for (std::uint32_t at = segments_[segment].end; at > floor && taken < count;) {
    --at;
    // Each ghost goes to a random line of a table larger than the caches: fetched ahead, those misses overlap.
    if (at >= floor + kGhostsAhead) ghosts_.prefetch(keys[at - kGhostsAhead]);
    if (slots[at] == kNoSlot) continue;
    out.push_back({keys[at], std::exchange(slots[at], kNoSlot), tier});
    ++taken;
    const bool gone = is_bare(run, at);
    if (feed_ != nullptr) feed_->removed(tier, keys[at], gone);
    if (!gone) continue;
    ++run.bare;
    ghosts_.record(keys[at], ghost);
  }
  shrink_segment(run, tier, segment, kNone, taken);
  note_lost(id, tier, taken);
  lay_bare(id, tier);
  trim(id);
  return taken;
}

}  // namespace flexkv::index
