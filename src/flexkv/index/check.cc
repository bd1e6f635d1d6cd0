// The consistency check of the tests.
#include "flexkv/base/assert.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

void PrefixIndex::check_invariants() const {
  std::vector<std::uint32_t> children(runs_.end()), pins_at(runs_.end()), pins_below(runs_.end());
  std::vector<std::array<std::uint32_t, kTierCountMax>> resident_children(runs_.end());
  std::array<std::uint64_t, kTierCountMax> slots{};
  std::uint32_t live = 0, pins = 0, segments = 0, attached = 0;
  std::size_t bytes = 0;

  for (std::uint32_t id = 0; id < pins_.end(); ++id) {
    const Pin& pin = pins_[id];
    if (!pin.live) continue;
    ++pins;
    if (pin.run == kNone) continue;
    FLEXKV_ASSERT(pin.at < runs_[pin.run].blocks.size());
    ++pins_at[pin.run];
    for (RunId run = pin.run; run != kNone; run = runs_[run].parent) ++pins_below[run];
  }
  FLEXKV_ASSERT(pins == pins_.size());

  for (RunId id = 0; id < runs_.end(); ++id) {
    const Run& run = runs_[id];
    if (run.blocks.size() == 0) continue;
    ++live;
    attached += run.detached ? 0 : 1;
    bytes += run.blocks.memory_bytes(tier_count_);
    if (run.parent != kNone) {
      const Run& parent = runs_[run.parent];
      FLEXKV_ASSERT(parent.blocks.size() > 0 && run.depth == parent.depth + parent.blocks.size());
      FLEXKV_ASSERT(run.detached == parent.detached);
      ++children[run.parent];
      for (Tier tier = 0; tier < tier_count_; ++tier) {
        resident_children[run.parent][tier] += run.tiers[tier].any() ? 1U : 0U;
      }
    } else {
      FLEXKV_ASSERT(run.depth == 0);
    }
    std::uint32_t listed_pins = 0;
    for (std::uint32_t pin = run.first_pin; pin != kNone; pin = pins_[pin].next) {
      FLEXKV_ASSERT(pins_[pin].run == id);
      ++listed_pins;
    }
    FLEXKV_ASSERT(listed_pins == pins_at[id]);

    std::uint32_t bare = 0;
    for (std::uint32_t at = 0; at < run.blocks.size(); ++at) bare += is_bare(run, at) ? 1U : 0U;
    for (Tier tier = 0; tier < tier_count_; ++tier) {
      std::uint32_t own = 0;
      for (std::uint32_t at = 0; at < run.blocks.size(); ++at) own += run.blocks.slots(tier)[at] != kNoSlot ? 1U : 0U;
      slots[tier] += own;
      if (!run.detached) FLEXKV_ASSERT(own == run.tiers[tier].blocks);
      std::uint32_t end = run.blocks.size();
      std::uint32_t counted = 0;
      for (SegmentId s = run.tiers[tier].top; s != kNone; s = segments_[s].below) {
        const Segment& segment = segments_[s];
        ++segments;
        FLEXKV_ASSERT(segment.run == id && segment.end <= end && start(segment) < segment.end && segment.count > 0);
        FLEXKV_ASSERT(run.blocks.slots(tier)[segment.end - 1] != kNoSlot);
        std::uint32_t in_segment = 0;
        for (std::uint32_t at = start(segment); at < segment.end; ++at) {
          in_segment += run.blocks.slots(tier)[at] != kNoSlot ? 1U : 0U;
        }
        FLEXKV_ASSERT(in_segment == segment.count);
        counted += segment.count;
        end = start(segment);
      }
      FLEXKV_ASSERT(counted == run.tiers[tier].blocks);
    }
    if (run.detached) {
      FLEXKV_ASSERT(run.pin_count > 0);
    } else {
      FLEXKV_ASSERT(bare == run.bare);
      FLEXKV_ASSERT(find_child(run.parent, run.blocks.keys()[0]) == id);
      // A leaf ends with a slot or under a pin.
      FLEXKV_ASSERT(run.child_count > 0 || !is_bare(run, run.blocks.size() - 1) ||
                    pinned_length(run) == run.blocks.size());
    }
  }

  for (RunId id = 0; id < runs_.end(); ++id) {
    const Run& run = runs_[id];
    if (run.blocks.size() == 0) continue;
    FLEXKV_ASSERT(run.child_count == children[id] && run.pin_count == pins_below[id]);
    for (Tier tier = 0; tier < tier_count_; ++tier) {
      const Residency& residency = run.tiers[tier];
      FLEXKV_ASSERT(residency.children == resident_children[id][tier]);
      // Whatever may be evicted is known to the policy.
      FLEXKV_ASSERT(residency.top == kNone || segments_[residency.top].listed || residency.children > 0 ||
                    pinned_length(run) >= segments_[residency.top].end);
    }
  }
  FLEXKV_ASSERT(live == runs_.size() && attached == table_.size() && segments == segments_.size());
  FLEXKV_ASSERT(bytes == block_bytes_ && slots == block_count_);
}

}  // namespace flexkv::index
