// Giving blocks slots, and the segments in which the policies see them.
#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

void PrefixIndex::insert(PinId pin, Tier tier, std::span<const key::BlockKey> keys, std::span<const Slot> slots,
                         Nanos now, std::vector<Slot>& rejected) {
  FLEXKV_ASSERT(tier < tier_count_ && keys.size() == slots.size());
  advance(now);
  Position position{pin_of(pin).run, pin_of(pin).at};
  FLEXKV_ASSERT(keys.size() < kNone - depth(pin));
  if (position.run != kNone && runs_[position.run].detached) {
    rejected.insert(rejected.end(), slots.begin(), slots.end());
    return;
  }
  while (!keys.empty()) {
    RunId id = position.run;
    std::uint32_t first = position.at + 1;
    if (id == kNone || first == runs_[id].blocks.size()) {
      const RunId child = find_child(id, keys[0]);
      if (child == kNone) {
        position = add_blocks(position, tier, keys, slots);
        break;
      }
      id = child;
      first = 0;
    }
    const std::uint32_t known = common_length(runs_[id], first, keys);
    if (known > 0) {
      fill(id, tier, first, slots.first(known), rejected);
      position = {id, first + known - 1};
      keys = keys.subspan(known);
      slots = slots.subspan(known);
    }
    if (!keys.empty() && position.at + 1 < runs_[id].blocks.size()) position.run = split(id, position.at + 1);
  }
  touch_path(position, kNone, tier, now_);
  if (position.run != kNone) move_pin(static_cast<std::uint32_t>(pin), position);
}

void PrefixIndex::add_residency(PinId pin, Tier tier, std::uint32_t first, std::span<const Slot> slots, Nanos now,
                                std::vector<Slot>& rejected) {
  FLEXKV_ASSERT(tier < tier_count_ && first <= depth(pin) && slots.size() <= depth(pin) - first);
  advance(now);
  RunId id = pin_of(pin).run;
  if (slots.empty()) return;
  if (runs_[id].detached) {
    rejected.insert(rejected.end(), slots.begin(), slots.end());
    return;
  }
  const auto end = first + static_cast<std::uint32_t>(slots.size());
  while (runs_[id].depth >= end) id = runs_[id].parent;
  const Position last{id, end - 1 - runs_[id].depth};
  std::vector<RunId> runs;  // ancestors come in before descendants
  for (; runs.empty() || runs_[runs.back()].depth > first; id = runs_[id].parent) runs.push_back(id);
  for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
    const std::uint32_t from = std::max(first, runs_[*run].depth);
    const std::uint32_t count = std::min(end, runs_[*run].depth + runs_[*run].blocks.size()) - from;
    fill(*run, tier, from - runs_[*run].depth, slots.subspan(from - first, count), rejected);
  }
  touch_path(last, kNone, tier, now_);
}

Slot PrefixIndex::drop(PinId pin, Tier tier, std::uint32_t block, MissReason why) {
  FLEXKV_ASSERT(tier < tier_count_ && block < depth(pin));
  RunId id = pin_of(pin).run;
  while (runs_[id].depth > block) id = runs_[id].parent;
  Run& run = runs_[id];
  const std::uint32_t at = block - run.depth;
  const Slot slot = std::exchange(run.blocks.slots(tier)[at], kNoSlot);
  if (slot == kNoSlot) return kNoSlot;
  if (run.detached) {
    --block_count_[tier];
    return slot;
  }
  SegmentId above = kNone;
  SegmentId segment = run.tiers[tier].top;
  while (start(segments_[segment]) > at) {
    above = segment;
    segment = segments_[segment].below;
  }
  const bool gone = is_bare(run, at);
  if (gone) {
    ++run.bare;
    ghosts_.record(run.blocks.keys()[at], {why, 0, now_});
  }
  if (feed_ != nullptr) feed_->removed(tier, run.blocks.keys()[at], gone);
  const bool last = above == kNone && at + 1 == segments_[segment].end;
  shrink_segment(run, tier, segment, above, 1);
  note_lost(id, tier, 1);
  if (last) lay_bare(id, tier);
  return slot;
}

// Adds unknown blocks behind `position`; returns that of the last of them.
PrefixIndex::Position PrefixIndex::add_blocks(Position position, Tier tier, std::span<const key::BlockKey> keys,
                                              std::span<const Slot> slots) {
  RunId id = position.run;
  std::uint32_t first = 0;
  if (id != kNone && runs_[id].child_count == 0 &&
      (runs_[id].blocks.size() < kGrowingBlocksMax || runs_[id].blocks.has_room(keys.size()))) {
    Run& run = runs_[id];
    first = run.blocks.size();
    block_bytes_ -= run.blocks.memory_bytes(tier_count_);
    run.blocks.append(keys, tier_count_);
    block_bytes_ += run.blocks.memory_bytes(tier_count_);
  } else {
    id = add_run(id, id == kNone ? 0 : runs_[id].depth + runs_[id].blocks.size(), keys);
  }
  std::copy(slots.begin(), slots.end(), runs_[id].blocks.slots(tier) + first);
  if (feed_ != nullptr) feed_->added(tier, parent_key(runs_[id], first), keys);

  const auto count = static_cast<std::uint32_t>(keys.size());
  auto remembered = [&](std::uint32_t i) -> unsigned {
    const Ghost ghost = ghosts_.find(keys[i]);
    return ghost.reason == MissReason::kEvicted ? ghost.uses + 1 : 0;
  };
  // Blocks went leaves first, so those behind one that is not remembered are hardly remembered either.
  unsigned uses = policies_[tier]->heeds_memory() ? remembered(0) : 0;
  for (std::uint32_t from = 0; from < count;) {
    std::uint32_t end = uses == 0 ? count : from + 1;
    unsigned next = 0;
    while (end < count && (next = remembered(end)) == uses) ++end;
    add_segment(id, tier, first + from, first + end, uses);
    uses = std::min(uses, next);
    from = end;
  }
  return {id, first + count - 1};
}

// Gives known blocks of a run slots where they have none.
void PrefixIndex::fill(RunId id, Tier tier, std::uint32_t first, std::span<const Slot> slots,
                       std::vector<Slot>& rejected) {
  Run& run = runs_[id];
  Slot* own = run.blocks.slots(tier) + first;
  const auto count = static_cast<std::uint32_t>(slots.size());
  for (std::uint32_t from = 0; from < count;) {
    if (own[from] != kNoSlot) {
      rejected.push_back(slots[from++]);
      continue;
    }
    std::uint32_t end = from;
    for (; end < count && own[end] == kNoSlot; ++end) {
      if (run.bare > 0 && is_bare(run, first + end)) --run.bare;
      own[end] = slots[end];
    }
    if (feed_ != nullptr) {
      feed_->added(tier, parent_key(run, first + from), {run.blocks.keys() + first + from, end - from});
    }
    add_segment(id, tier, first + from, first + end, 0);
    from = end;
  }
}

// Makes a segment of blocks [first, end) of a run, which have just got their slots.
void PrefixIndex::add_segment(RunId id, Tier tier, std::uint32_t first, std::uint32_t end, unsigned remembered) {
  Run& run = runs_[id];
  SegmentId above = kNone;
  for (SegmentId s = run.tiers[tier].top; s != kNone && segments_[s].end > first; s = segments_[s].below) above = s;
  if (above != kNone) cut(run, tier, above, first);
  const SegmentId added = segments_.add();
  SegmentId& link = above == kNone ? run.tiers[tier].top : segments_[above].below;
  Segment& segment = segments_[added];
  segment.run = id;
  segment.below = link;
  segment.end = end;
  segment.count = end - first;
  link = added;
  policies_[tier]->insert(added, remembered, now_);
  note_resident(id, tier, end - first);
  merge_below(added, tier);
}

std::uint32_t PrefixIndex::start(const Segment& segment) const {
  return segment.below == kNone ? 0 : segments_[segment.below].end;
}

// Cuts what lies before block `at` off a segment; returns it, or kNone if no block there has a slot.
PrefixIndex::SegmentId PrefixIndex::cut(Run& run, Tier tier, SegmentId id, std::uint32_t at) {
  Segment& segment = segments_[id];
  const std::uint32_t from = start(segment);
  const Slot* slots = run.blocks.slots(tier);
  const auto count = segment.count == segment.end - from
                         ? at - from
                         : at - from - static_cast<std::uint32_t>(std::count(slots + from, slots + at, kNoSlot));
  if (count == 0) return kNone;
  const SegmentId part_id = segments_.add();
  Segment& part = segments_[part_id];
  part.run = segment.run;
  part.below = segment.below;
  part.count = count;
  part.end = at;
  while (slots[part.end - 1] == kNoSlot) --part.end;
  segment.below = part_id;
  policies_[tier]->resize(id, -std::int64_t{count});
  segment.count -= count;
  policies_[tier]->split(part_id, id);
  return part_id;
}

// Makes one segment of this and those below it as far as their histories allow it.
void PrefixIndex::merge_below(SegmentId id, Tier tier) {
  Segment& segment = segments_[id];
  while (segment.below != kNone && policies_[tier]->mergeable(segment.below, id)) {
    const SegmentId below = segment.below;
    policies_[tier]->remove(below);
    policies_[tier]->resize(id, segments_[below].count);
    segment.count += segments_[below].count;
    segment.below = segments_[below].below;
    segments_.remove(below);
  }
}

// Takes `lost` blocks without slots out of a segment's count, and makes it end with a slot again. `above`: the next
// deeper segment.
void PrefixIndex::shrink_segment(Run& run, Tier tier, SegmentId id, SegmentId above, std::uint32_t lost) {
  Segment& segment = segments_[id];
  policies_[tier]->resize(id, -std::int64_t{lost});
  segment.count -= lost;
  if (segment.count == 0) {
    policies_[tier]->remove(id);
    (above == kNone ? run.tiers[tier].top : segments_[above].below) = segment.below;
    segments_.remove(id);
    return;
  }
  const Slot* slots = run.blocks.slots(tier);
  while (slots[segment.end - 1] == kNoSlot) --segment.end;
}

// Tells the policy of a tier that the path to `position` is in use, and that its blocks from depth `hits_from` on were
// found by a lookup.
void PrefixIndex::touch_path(Position position, std::uint32_t hits_from, Tier tier, Nanos now) {
  if (!policies_[tier]->heeds_touch() || position.run == kNone) return;
  std::uint32_t end = position.at + 1;
  for (RunId id = position.run;;) {
    const Run& run = runs_[id];
    touch_run(id, end, hits_from > run.depth ? hits_from - run.depth : 0, tier, now);
    id = run.parent;
    if (id == kNone) return;
    end = runs_[id].blocks.size();
  }
}

void PrefixIndex::touch_run(RunId id, std::uint32_t end, std::uint32_t hits_from, Tier tier, Nanos now) {
  Run& run = runs_[id];
  Policy& policy = *policies_[tier];
  SegmentId deepest = run.tiers[tier].top;
  while (deepest != kNone && start(segments_[deepest]) >= end) deepest = segments_[deepest].below;
  if (deepest == kNone) return;
  if (segments_[deepest].end > end) {
    cut(run, tier, deepest, end);
    deepest = segments_[deepest].below;
  }
  for (SegmentId s = deepest; s != kNone; s = segments_[s].below) {
    if (start(segments_[s]) < hits_from && hits_from < segments_[s].end) cut(run, tier, s, hits_from);
    policy.touch(s, segments_[s].end > hits_from, now);
  }
  for (SegmentId s = deepest; s != kNone; s = segments_[s].below) merge_below(s, tier);
}

void PrefixIndex::note_resident(RunId id, Tier tier, std::uint32_t count) {
  block_count_[tier] += count;
  bool known = runs_[id].tiers[tier].any();
  runs_[id].tiers[tier].blocks += count;
  for (id = runs_[id].parent; !known && id != kNone; id = runs_[id].parent) {
    known = runs_[id].tiers[tier].any();
    ++runs_[id].tiers[tier].children;
  }
}

void PrefixIndex::note_lost(RunId id, Tier tier, std::uint32_t count) {
  block_count_[tier] -= count;
  runs_[id].tiers[tier].blocks -= count;
  while (!runs_[id].tiers[tier].any() && runs_[id].parent != kNone) {
    id = runs_[id].parent;
    --runs_[id].tiers[tier].children;
    lay_bare(id, tier);
  }
}

// Gives the deepest segment of a run back to the policy if it had been set aside because of what stood behind it.
void PrefixIndex::lay_bare(RunId id, Tier tier) {
  const Residency& residency = runs_[id].tiers[tier];
  if (residency.top == kNone || segments_[residency.top].listed || residency.children > 0) return;
  policies_[tier]->restore(residency.top);
}

}  // namespace flexkv::index
