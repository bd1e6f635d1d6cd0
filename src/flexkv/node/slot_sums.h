// What devices said the blocks in host slots add up to (base/block_sum.h), shard by shard. Thread-compatible (the
// node's lock guards it). Takes 8 bytes for each shard of each slot, once there is a sum at all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "flexkv/base/assert.h"
#include "flexkv/base/block_sum.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::node {

class SlotSums {
 public:
  struct Shard {
    std::uint64_t offset = 0;  // within a slot
    std::uint64_t bytes = 0;
  };
  explicit SlotSums(std::vector<Shard> shards) : shards_(std::move(shards)) {}

  // `shard`: which of them.
  void set(index::Slot slot, std::uint32_t shard, std::uint64_t sum) {
    FLEXKV_ASSERT(shard < shards_.size());
    const std::size_t end = (std::size_t{slot} + 1) * shards_.size();
    if (sums_.size() < end) sums_.resize(end, kNoSum);
    sums_[slot * shards_.size() + shard] = sum;
  }
  // Another block is going to lie there.
  void forget(index::Slot slot) {
    const std::size_t begin = slot * shards_.size();
    if (begin < sums_.size()) std::fill_n(sums_.begin() + static_cast<std::ptrdiff_t>(begin), shards_.size(), kNoSum);
  }
  // Of the shards whose sum is known.
  std::vector<SummedExtent> of(index::Slot slot) const {
    std::vector<SummedExtent> extents;
    const std::size_t begin = slot * shards_.size();
    for (std::size_t i = 0; begin < sums_.size() && i < shards_.size(); ++i) {
      if (sums_[begin + i] != kNoSum) extents.push_back({shards_[i].offset, shards_[i].bytes, sums_[begin + i]});
    }
    return extents;
  }
  std::uint64_t memory_bytes() const { return sums_.capacity() * sizeof(std::uint64_t); }

 private:
  const std::vector<Shard> shards_;
  std::vector<std::uint64_t> sums_;  // of slot s and shard i at s * shards + i
};

}  // namespace flexkv::node
