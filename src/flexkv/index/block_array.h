// The blocks of a run: keys, and per tier a slot, each contiguous, in one allocation. Thread-compatible. Owns its
// memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "flexkv/key/block_key.h"

namespace flexkv::index {

using Slot = std::uint32_t;  // a place in a tier, named by whoever owns the tier
inline constexpr Slot kNoSlot = UINT32_MAX;
using Tier = unsigned;  // 0 = host, 1 = disk, ...
inline constexpr unsigned kTierCountMax = 4;

class BlockArray {
 public:
  std::uint32_t size() const { return size_; }
  const key::BlockKey* keys() const { return reinterpret_cast<const key::BlockKey*>(data_.get()); }
  Slot* slots(Tier tier) { return reinterpret_cast<Slot*>(data_.get() + slot_offset(tier)); }
  const Slot* slots(Tier tier) const { return reinterpret_cast<const Slot*>(data_.get() + slot_offset(tier)); }

  bool has_room(std::size_t count) const { return count <= capacity_ - size_; }

  // Adds blocks without slots at the end. Capacity grows by half, so that short turns cost amortised O(1) a block.
  void append(std::span<const key::BlockKey> keys, unsigned tier_count) {
    const auto count = static_cast<std::uint32_t>(keys.size());
    const std::uint32_t size = size_;
    if (size + count > capacity_) reallocate(std::max(size + count, capacity_ + capacity_ / 2), size, tier_count);
    std::copy(keys.begin(), keys.end(), mutable_keys() + size);
    for (Tier tier = 0; tier < tier_count; ++tier) std::fill_n(slots(tier) + size, count, kNoSlot);
    size_ = size + count;
  }
  // Drops the last blocks; gives memory back when less than half is used.
  void truncate(std::uint32_t size, unsigned tier_count) {
    size_ = size;
    if (size < capacity_ / 2) reallocate(size + size / 4, size, tier_count);
  }
  // Moves the first `count` blocks out. They keep their memory if they fill half of it: what is split off a run is
  // mostly a short end, and the front is what later inserts find room in.
  BlockArray take_front(std::uint32_t count, unsigned tier_count) {
    BlockArray rest = copy(count, size_ - count, size_ - count, tier_count);
    truncate(count, tier_count);
    std::swap(*this, rest);
    return rest;
  }

  std::size_t memory_bytes(unsigned tier_count) const { return capacity_ * block_bytes(tier_count); }

 private:
  static std::size_t block_bytes(unsigned tier_count) { return sizeof(key::BlockKey) + tier_count * sizeof(Slot); }
  std::size_t slot_offset(Tier tier) const { return capacity_ * block_bytes(tier); }
  key::BlockKey* mutable_keys() { return reinterpret_cast<key::BlockKey*>(data_.get()); }

  BlockArray copy(std::uint32_t first, std::uint32_t count, std::uint32_t capacity, unsigned tier_count) const {
    BlockArray result;
    if (capacity == 0) return result;
    result.data_ = std::make_unique_for_overwrite<std::byte[]>(capacity * block_bytes(tier_count));
    result.capacity_ = capacity;
    result.size_ = count;
    std::copy_n(keys() + first, count, result.mutable_keys());
    for (Tier tier = 0; tier < tier_count; ++tier) std::copy_n(slots(tier) + first, count, result.slots(tier));
    return result;
  }
  void reallocate(std::uint32_t capacity, std::uint32_t count, unsigned tier_count) {
    *this = copy(0, count, capacity, tier_count);
  }

  std::unique_ptr<std::byte[]> data_;
  std::uint32_t size_ = 0;
  std::uint32_t capacity_ = 0;
};

}  // namespace flexkv::index
