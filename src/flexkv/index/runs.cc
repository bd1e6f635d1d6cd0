// The forest of runs: finding, adding, splitting, trimming.
#include <algorithm>

#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

PrefixIndex::RunId PrefixIndex::find_child(RunId parent, const key::BlockKey& key) const {
  return table_.find(key, [&](RunId id) {
    const Run& run = runs_[id];
    return run.parent == parent && run.blocks.keys()[0] == key;
  });
}

std::uint32_t PrefixIndex::common_length(const Run& run, std::uint32_t first,
                                         std::span<const key::BlockKey> keys) const {
  const key::BlockKey* own = run.blocks.keys() + first;
  const auto length = static_cast<std::uint32_t>(std::min<std::size_t>(run.blocks.size() - first, keys.size()));
  if (length == 0 || own[length - 1] == keys[length - 1]) return length;
  std::uint32_t same = 0;  // keys are chained: what is equal here is equal before
  std::uint32_t different = length - 1;
  while (same < different) {
    const std::uint32_t middle = same + (different - same) / 2;
    if (own[middle] == keys[middle]) {
      same = middle + 1;
    } else {
      different = middle;
    }
  }
  return same;
}

// Moves `position` along `keys` as far as they are known and resident somewhere; returns how many.
std::uint32_t PrefixIndex::walk(Position& position, std::span<const key::BlockKey> keys) const {
  std::uint32_t walked = 0;
  while (walked < keys.size()) {
    RunId id = position.run;
    std::uint32_t first = position.at + 1;
    if (id == kNone || first == runs_[id].blocks.size()) {
      id = find_child(position.run, keys[walked]);
      first = 0;
      if (id == kNone) break;
    }
    const Run& run = runs_[id];
    if (run.detached) break;
    std::uint32_t end = first + common_length(run, first, keys.subspan(walked));
    const bool whole = end == run.blocks.size();
    bool hole = false;
    if (run.bare > 0) {
      std::uint32_t at = first;
      while (at < end && !is_bare(run, at)) ++at;
      hole = at < end;
      end = at;
    }
    if (end > first) position = {id, end - 1};
    walked += end - first;
    if (!whole || hole) break;
  }
  return walked;
}

PrefixIndex::RunId PrefixIndex::add_run(RunId parent, std::uint32_t depth, std::span<const key::BlockKey> keys) {
  const RunId id = runs_.add();
  Run& run = runs_[id];
  run.parent = parent;
  run.depth = depth;
  run.blocks.append(keys, tier_count_);
  block_bytes_ += run.blocks.memory_bytes(tier_count_);
  table_.insert(keys[0], id);
  if (parent != kNone) ++runs_[parent].child_count;
  return id;
}

// Cuts a run before block `at`. The rest keeps its id, so that its children need not know; returns the run of the
// front.
PrefixIndex::RunId PrefixIndex::split(RunId tail_id, std::uint32_t at) {
  const RunId head_id = runs_.add();
  Run& head = runs_[head_id];
  Run& tail = runs_[tail_id];
  block_bytes_ -= tail.blocks.memory_bytes(tier_count_);
  table_.replace(tail.blocks.keys()[0], tail_id, head_id);
  head.blocks = tail.blocks.take_front(at, tier_count_);
  table_.insert(tail.blocks.keys()[0], tail_id);
  block_bytes_ += head.blocks.memory_bytes(tier_count_) + tail.blocks.memory_bytes(tier_count_);

  head.parent = tail.parent;
  head.depth = tail.depth;
  head.child_count = 1;
  tail.parent = head_id;
  tail.depth += at;
  if (tail.bare > 0) {
    for (std::uint32_t i = 0; i < at; ++i) head.bare += is_bare(head, i) ? 1U : 0U;
    tail.bare -= head.bare;
  }

  head.pin_count = tail.pin_count;
  std::uint32_t next = std::exchange(tail.first_pin, kNone);
  while (next != kNone) {
    const std::uint32_t id = std::exchange(next, pins_[next].next);
    const bool in_head = pins_[id].at < at;
    if (in_head) --tail.pin_count;
    link_pin(id, in_head ? Position{head_id, pins_[id].at} : Position{tail_id, pins_[id].at - at});
  }
  for (Tier tier = 0; tier < tier_count_; ++tier) split_segments(head_id, tail_id, at, tier);
  scan_past_split(head_id, tail_id, at);
  return head_id;
}

void PrefixIndex::split_segments(RunId head_id, RunId tail_id, std::uint32_t at, Tier tier) {
  Residency& head = runs_[head_id].tiers[tier];
  Residency& tail = runs_[tail_id].tiers[tier];
  // The front has no slots of its own segments yet: cut() counts them in the arrays, which have been divided already.
  SegmentId last_of_tail = kNone;
  SegmentId id = tail.top;
  while (id != kNone && segments_[id].end > at) {
    if (start(segments_[id]) < at) cut(runs_[head_id], tier, id, at);
    last_of_tail = id;
    id = segments_[id].below;
  }
  (last_of_tail == kNone ? tail.top : segments_[last_of_tail].below) = kNone;
  for (SegmentId s = tail.top; s != kNone; s = segments_[s].below) segments_[s].end -= at;
  head.top = id;
  for (SegmentId s = id; s != kNone; s = segments_[s].below) {
    segments_[s].run = head_id;
    head.blocks += segments_[s].count;
  }
  tail.blocks -= head.blocks;
  head.children = tail.any() ? 1U : 0U;
}

void PrefixIndex::resize_blocks(Run& run, std::uint32_t size) {
  block_bytes_ -= run.blocks.memory_bytes(tier_count_);
  run.blocks.truncate(size, tier_count_);
  block_bytes_ += run.blocks.memory_bytes(tier_count_);
}

key::BlockKey PrefixIndex::parent_key(const Run& run, std::uint32_t at) const {
  if (at > 0) return run.blocks.keys()[at - 1];
  if (run.parent == kNone) return {};
  const BlockArray& before = runs_[run.parent].blocks;
  return before.keys()[before.size() - 1];
}

void PrefixIndex::append_kept(std::vector<events::Change>& out) const {
  std::vector<RunId> ids;
  for (RunId id = 0; id < runs_.end(); ++id) {
    if (runs_[id].blocks.size() > 0 && !runs_[id].detached) ids.push_back(id);
  }
  std::ranges::sort(ids, {}, [&](RunId id) { return runs_[id].depth; });
  for (const RunId id : ids) {
    const Run& run = runs_[id];
    for (std::uint32_t at = 0; at < run.blocks.size(); ++at) {
      const key::BlockKey parent = parent_key(run, at);
      for (Tier tier = 0; tier < tier_count_; ++tier) {
        if (run.blocks.slots(tier)[at] == kNoSlot) continue;
        out.push_back(feed_->kept(tier, parent, run.blocks.keys()[at]));
      }
    }
  }
}

// Drops bare blocks from the end of a run, and the run if none is left, and then looks at its parent.
void PrefixIndex::trim(RunId id) {
  while (id != kNone) {
    Run& run = runs_[id];
    if (run.bare == 0 || run.child_count > 0 || run.detached) return;
    const std::uint32_t floor = pinned_length(run);
    std::uint32_t size = run.blocks.size();
    while (size > floor && is_bare(run, size - 1)) --size;
    run.bare -= run.blocks.size() - size;
    if (size > 0) {
      if (size < run.blocks.size()) resize_blocks(run, size);
      return;
    }
    const RunId parent = run.parent;
    table_.erase(run.blocks.keys()[0], id);
    remove_run(id);
    id = parent;
  }
}

// REQUIRES: the table does not know the run, and it has no segments, pins or children
void PrefixIndex::remove_run(RunId id) {
  Run& run = runs_[id];
  if (run.parent != kNone) --runs_[run.parent].child_count;
  block_bytes_ -= run.blocks.memory_bytes(tier_count_);
  runs_.remove(id);
}

}  // namespace flexkv::index
