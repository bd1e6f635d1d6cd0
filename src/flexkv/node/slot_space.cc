#include "flexkv/node/slot_space.h"

#include <algorithm>
#include <bit>

#include "flexkv/base/assert.h"

namespace flexkv::node {
namespace {

// A space grows by a 32nd to a 16th of the pool, so that several models can share one without a plan made beforehand.
constexpr std::uint64_t kRangesPerPool = 16;

}  // namespace

RangeAllocator::Range RangeAllocator::take(std::uint64_t bytes_min, std::uint64_t bytes_max) {
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    if (range->bytes < bytes_min) continue;
    const Range taken{range->offset, std::min(range->bytes, bytes_max)};
    range->offset += taken.bytes;
    range->bytes -= taken.bytes;
    if (range->bytes == 0) free_.erase(range);
    return taken;
  }
  return {};
}

void RangeAllocator::give_back(Range range) {
  if (range.bytes == 0) return;
  auto next = std::lower_bound(free_.begin(), free_.end(), range,
                               [](const Range& a, const Range& b) { return a.offset < b.offset; });
  FLEXKV_ASSERT(next == free_.end() || range.offset + range.bytes <= next->offset);
  if (next != free_.end() && range.offset + range.bytes == next->offset) {
    range.bytes += next->bytes;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    FLEXKV_ASSERT(previous->offset + previous->bytes <= range.offset);
    if (previous->offset + previous->bytes == range.offset) {
      previous->bytes += range.bytes;
      return;
    }
  }
  free_.insert(next, range);
}

std::uint64_t RangeAllocator::free_bytes() const {
  std::uint64_t sum = 0;
  for (const Range& range : free_) sum += range.bytes;
  return sum;
}

SlotSpace::SlotSpace(RangeAllocator& ranges, std::uint64_t slot_bytes, std::uint64_t pool_bytes)
    : ranges_(ranges),
      slot_bytes_(slot_bytes),
      range_shift_(static_cast<unsigned>(
          std::bit_width(std::clamp<std::uint64_t>(pool_bytes / kRangesPerPool / slot_bytes, 1, 1U << 26)) - 1)) {
  FLEXKV_ASSERT(slot_bytes > 0 && slot_bytes % kExtentAlignment == 0);
}

SlotSpace::~SlotSpace() {
  for (const auto& range : owned_) ranges_.give_back(range);
}

std::uint64_t SlotSpace::offset(index::Slot slot) const {
  return owned_[slot >> range_shift_].offset + std::uint64_t{slot & (slots_per_range() - 1)} * slot_bytes_;
}

bool SlotSpace::grow() {
  const auto range = ranges_.take(slot_bytes_, slots_per_range() * slot_bytes_);
  if (range.bytes == 0) return false;
  const auto count = static_cast<std::uint32_t>(range.bytes / slot_bytes_);
  const RangeAllocator::Range used{range.offset, count * slot_bytes_};
  ranges_.give_back({used.offset + used.bytes, range.bytes - used.bytes});
  const auto first = static_cast<index::Slot>(owned_.size() << range_shift_);
  owned_.push_back(used);
  slot_count_ += count;
  marks_.resize(owned_.size() << range_shift_);
  // Lowest slots on top of the stack: the pool's memory is used from its start.
  free_.reserve(slot_count_);
  for (std::uint32_t i = count; i > 0; --i) free_.push_back(first + i - 1);
  return true;
}

index::Slot SlotSpace::take() {
  FLEXKV_ASSERT(!free_.empty());
  const index::Slot slot = free_.back();
  free_.pop_back();
  marks_[slot] = false;
  return slot;
}

}  // namespace flexkv::node
