// Where the blocks of one kind (one model and layout) lie in the host pool.
//
// RangeAllocator deals out byte ranges of the pool; SlotSpace cuts ranges into slots of one size and hands those out.
// Both are pure arithmetic: they never touch the pool's bytes. Thread-compatible (the node's lock guards them).
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/index/prefix_index.h"

namespace flexkv::node {

// Disk and network transfers need extents on page boundaries, so every shard of every slot begins on one.
constexpr std::uint64_t kExtentAlignment = 4096;

class RangeAllocator {
 public:
  explicit RangeAllocator(std::uint64_t bytes) : free_{{0, bytes / kExtentAlignment * kExtentAlignment}} {}

  struct Range {
    std::uint64_t offset = 0;
    std::uint64_t bytes = 0;
  };
  // The first free range, cut to at most `bytes_max`, of at least `bytes_min`; {0, 0} when there is none.
  Range take(std::uint64_t bytes_min, std::uint64_t bytes_max);
  void give_back(Range range);
  std::uint64_t free_bytes() const;

 private:
  std::vector<Range> free_;  // ascending, never adjacent
};

class SlotSpace {
 public:
  // slot_bytes: a multiple of kExtentAlignment.
  SlotSpace(RangeAllocator& ranges, std::uint64_t slot_bytes, std::uint64_t pool_bytes);
  ~SlotSpace();
  SlotSpace(const SlotSpace&) = delete;
  SlotSpace& operator=(const SlotSpace&) = delete;

  std::uint32_t free_count() const { return static_cast<std::uint32_t>(free_.size()); }
  std::uint32_t slot_count() const { return slot_count_; }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  std::uint64_t offset(index::Slot slot) const;
  // From this one on, so many slots follow one another in the pool, slot_bytes() apart.
  std::uint32_t slots_in_row(index::Slot slot) const { return slots_per_range() - (slot & (slots_per_range() - 1)); }

  // Takes another range from the pool; false when the pool is dealt out.
  bool grow();
  // REQUIRES: free_count() > 0
  index::Slot take();
  void give_back(index::Slot slot) { free_.push_back(slot); }
  // Whoever uses the slot may mark it; taken, it has no mark.
  void mark(index::Slot slot, bool marked) { marks_[slot] = marked; }
  bool marked(index::Slot slot) const { return marks_[slot]; }

 private:
  std::uint32_t slots_per_range() const { return 1U << range_shift_; }

  RangeAllocator& ranges_;
  const std::uint64_t slot_bytes_;
  const unsigned range_shift_;  // a power of two a range: offset() is asked for every block of every transfer
  std::uint32_t slot_count_ = 0;
  std::vector<RangeAllocator::Range> owned_;
  std::vector<index::Slot> free_;
  std::vector<bool> marks_;
};

}  // namespace flexkv::node
