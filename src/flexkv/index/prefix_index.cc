#include "flexkv/index/prefix_index.h"

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::index {

PrefixIndex::PrefixIndex(const Options& options) : tier_count_(options.tier_count), ghosts_(options.ghost_count_max) {
  FLEXKV_ASSERT(tier_count_ >= 1 && tier_count_ <= kTierCountMax);
  for (Tier tier = 0; tier < tier_count_; ++tier) policies_[tier] = make_policy(options.policy[tier], segments_);
}

PrefixIndex::~PrefixIndex() = default;

// ---- lookups -------------------------------------------------------------------------------------------------------

PrefixIndex::Match PrefixIndex::match(std::span<const key::BlockKey> keys, bool touch, Nanos now) {
  return extend(add_pin({}), keys, touch, now);
}

PrefixIndex::Match PrefixIndex::extend(PinId id, std::span<const key::BlockKey> keys, bool touch, Nanos now) {
  Pin& pin = pin_of(id);
  Position position{pin.run, pin.at};
  const std::uint32_t known = depth(id);
  const std::uint32_t matched = walk(position, keys);
  if (matched > 0) move_pin(static_cast<std::uint32_t>(id), position);
  if (touch) {
    advance(now);
    for (Tier tier = 0; tier < tier_count_; ++tier) touch_path(position, known, tier, now_);
  }
  return {matched, id};
}

PinId PrefixIndex::clone(PinId id) {
  const Pin& pin = pin_of(id);
  return add_pin({pin.run, pin.at});
}

std::uint32_t PrefixIndex::depth(PinId id) const {
  const Pin& pin = pin_of(id);
  return pin.run == kNone ? 0 : runs_[pin.run].depth + pin.at + 1;
}

template <typename Visit>
void PrefixIndex::visit_path(PinId id, std::uint32_t first, std::size_t count, Visit visit) const {
  FLEXKV_ASSERT(first <= depth(id) && count <= depth(id) - first);
  auto end = first + static_cast<std::uint32_t>(count);
  for (RunId run_id = pin_of(id).run; end > first; run_id = runs_[run_id].parent) {
    const Run& run = runs_[run_id];
    if (run.depth >= end) continue;
    const std::uint32_t from = std::max(first, run.depth);
    visit(run, from - run.depth, end - from, from - first);
    end = from;
  }
}

void PrefixIndex::collect(PinId id, Tier tier, std::uint32_t first, std::span<Slot> out) const {
  FLEXKV_ASSERT(tier < tier_count_);
  visit_path(id, first, out.size(), [&](const Run& run, std::uint32_t at, std::uint32_t count, std::uint32_t to) {
    std::copy_n(run.blocks.slots(tier) + at, count, out.data() + to);
  });
}

void PrefixIndex::collect_keys(PinId id, std::uint32_t first, std::span<key::BlockKey> out) const {
  visit_path(id, first, out.size(), [&](const Run& run, std::uint32_t at, std::uint32_t count, std::uint32_t to) {
    std::copy_n(run.blocks.keys() + at, count, out.data() + to);
  });
}

MissReason PrefixIndex::why_missing(const key::BlockKey& key, Nanos* gone_at) const {
  const Ghost ghost = ghosts_.find(key);
  if (gone_at != nullptr && ghost.reason != MissReason::kNeverSeen) *gone_at = ghost.gone_at;
  return ghost.reason;
}

std::size_t PrefixIndex::memory_bytes() const {
  return sizeof(*this) + tier_count_ * sizeof(Policy) + block_bytes_ + runs_.memory_bytes() + pins_.memory_bytes() +
         segments_.memory_bytes() + table_.memory_bytes() + ghosts_.memory_bytes() +
         scan_.split_off.capacity() * sizeof(Position);
}

// ---- pins ----------------------------------------------------------------------------------------------------------

PrefixIndex::Pin& PrefixIndex::pin_of(PinId id) {
  Pin& pin = pins_[static_cast<std::uint32_t>(id)];
  FLEXKV_ASSERT(pin.live);
  return pin;
}

const PrefixIndex::Pin& PrefixIndex::pin_of(PinId id) const { return const_cast<PrefixIndex*>(this)->pin_of(id); }

PinId PrefixIndex::add_pin(Position position) {
  const std::uint32_t id = pins_.add();
  pins_[id].live = true;
  link_pin(id, position);
  for (RunId run = position.run; run != kNone; run = runs_[run].parent) ++runs_[run].pin_count;
  return PinId{id};
}

void PrefixIndex::link_pin(std::uint32_t id, Position position) {
  Pin& pin = pins_[id];
  pin.run = position.run;
  pin.at = position.at;
  pin.previous = kNone;
  pin.next = kNone;
  if (position.run == kNone) return;
  std::uint32_t& first = runs_[position.run].first_pin;
  pin.next = first;
  if (first != kNone) pins_[first].previous = id;
  first = id;
}

void PrefixIndex::unlink_pin(std::uint32_t id) {
  const Pin& pin = pins_[id];
  if (pin.run == kNone) return;
  (pin.previous == kNone ? runs_[pin.run].first_pin : pins_[pin.previous].next) = pin.next;
  if (pin.next != kNone) pins_[pin.next].previous = pin.previous;
}

// REQUIRES: the new position is the old one or behind it, so that no block loses a pin
void PrefixIndex::move_pin(std::uint32_t id, Position position) {
  const RunId from = pins_[id].run;
  unlink_pin(id);
  link_pin(id, position);
  for (RunId run = position.run; run != from; run = runs_[run].parent) ++runs_[run].pin_count;
}

void PrefixIndex::unpin(PinId id, std::vector<Evicted>& out) {
  const RunId run_id = pin_of(id).run;
  unlink_pin(static_cast<std::uint32_t>(id));
  pins_.remove(static_cast<std::uint32_t>(id));
  if (run_id == kNone) return;
  for (RunId run = run_id; run != kNone; run = runs_[run].parent) --runs_[run].pin_count;
  if (runs_[run_id].detached) return trim_detached(run_id, out);
  for (RunId run = run_id; run != kNone; run = runs_[run].parent) {
    for (Tier tier = 0; tier < tier_count_; ++tier) {
      const SegmentId top = runs_[run].tiers[tier].top;
      if (top == kNone || segments_[top].listed || pinned_length(runs_[run]) >= segments_[top].end) continue;
      lay_bare(run, tier);
    }
  }
  trim(run_id);
}

std::uint32_t PrefixIndex::pinned_length(const Run& run) const {
  if (run.pin_count == 0) return 0;
  std::uint32_t own = 0;
  std::uint32_t length = 0;
  for (std::uint32_t id = run.first_pin; id != kNone; id = pins_[id].next) {
    ++own;
    length = std::max(length, pins_[id].at + 1);
  }
  return own < run.pin_count ? run.blocks.size() : length;
}

// ---- clearing ------------------------------------------------------------------------------------------------------

void PrefixIndex::clear(Nanos now, std::vector<Evicted>& out) {
  advance(now);
  if (feed_ != nullptr) feed_->cleared();
  for (Tier tier = 0; tier < tier_count_; ++tier) policies_[tier]->clear();
  segments_.clear();
  table_.clear();
  for (RunId id = 0; id < runs_.end(); ++id) {
    Run& run = runs_[id];
    if (run.blocks.size() == 0 || run.detached) continue;
    for (std::uint32_t at = 0; at < run.blocks.size(); ++at) {
      if (!is_bare(run, at)) ghosts_.record(run.blocks.keys()[at], {MissReason::kReset, 0, now_});
    }
    run.tiers = {};
    run.detached = true;
  }
  for (RunId id = 0; id < runs_.end(); ++id) {
    if (runs_[id].blocks.size() > 0) trim_detached(id, out);
  }
}

// Frees what no pin holds at the end of a detached run, and the run if that is all, and then looks at its parent.
void PrefixIndex::trim_detached(RunId id, std::vector<Evicted>& out) {
  while (id != kNone) {
    Run& run = runs_[id];
    if (run.child_count > 0) return;
    const std::uint32_t size = pinned_length(run);
    if (size < run.blocks.size()) release(run, size, out);
    if (size > 0) return;
    const RunId parent = run.parent;
    remove_run(id);
    id = parent;
  }
}

void PrefixIndex::release(Run& run, std::uint32_t size, std::vector<Evicted>& out) {
  for (Tier tier = 0; tier < tier_count_; ++tier) {
    for (std::uint32_t at = size; at < run.blocks.size(); ++at) {
      const Slot slot = run.blocks.slots(tier)[at];
      if (slot == kNoSlot) continue;
      out.push_back({run.blocks.keys()[at], slot, tier});
      --block_count_[tier];
    }
  }
  resize_blocks(run, size);
}

}  // namespace flexkv::index
