// Which blocks someone has, and a byte about each: an open-addressed hash table in buckets of one cache line, so that a
// search costs one cache miss. 12 bytes a block when full (75 %).
//
// A block is named by 64 of the 128 bits of its key: a table of ten million has a false answer for one of 10^12 keys,
// and whoever acts on an answer checks the whole key. Thread-compatible; any number of threads may read at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "flexkv/key/block_key.h"

namespace flexkv::cluster {

using Tag = std::uint64_t;
inline Tag tag_of(const key::BlockKey& key) { return key.low; }

class ResidencyTable {
 public:
  static constexpr unsigned kPlaces = 7;  // of a bucket

  // The order of the buckets. What was walked in one table's order must not be put into a growing table of the same
  // order: all would crowd at the beginning of it, and each search would be a long one.
  enum class Order : std::uint64_t { kOwn = 0x9E3779B97F4A7C15ULL, kReplica = 0xC2B2AE3D27D4EB4FULL };

  // For at least `room` blocks.
  explicit ResidencyTable(Order order, std::size_t room = 0);

  // 0: not there.
  std::uint8_t find(Tag tag) const;
  void prefetch(Tag tag) const { __builtin_prefetch(&buckets_[home(tag)]); }
  // 0 takes the block out. REQUIRES: value == 0, or !full(), or find(tag) != 0
  void set(Tag tag, std::uint8_t value);
  bool full() const { return count_ >= room_; }
  // So few blocks that a smaller one would do.
  bool sparse() const { return room_ > kRoomMin && count_ < room_ / 3; }
  // The same in a table that is half as large again as what is in it.
  ResidencyTable resized() const;

  std::size_t size() const { return count_; }
  std::size_t bucket_count() const { return bucket_count_; }
  std::size_t memory_bytes() const { return bucket_count_ * sizeof(Bucket); }

  // Calls visit(tag, value&) for the blocks of buckets [first, end). A block keeps its bucket as long as it is there,
  // so a walk in pieces meets each block that stays, once. The value may be changed, not to 0.
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) {
    for (std::size_t b = first; b < end; ++b) {
      for (unsigned i = 0; i < kPlaces; ++i) {
        if (buckets_[b].values[i] != 0) visit(buckets_[b].tags[i], buckets_[b].values[i]);
      }
    }
  }
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) const {
    const_cast<ResidencyTable*>(this)->walk(first, end, [&](Tag tag, const std::uint8_t& value) { visit(tag, value); });
  }

 private:
  static constexpr std::size_t kRoomMin = 84;  // 16 buckets
  static constexpr std::uint8_t kManyPassed = 255;

  struct alignas(64) Bucket {
    Tag tags[kPlaces] = {};
    std::uint8_t values[kPlaces] = {};  // 0: the place is free
    std::uint8_t passed = 0;            // blocks that found no place here and went on; kManyPassed stays
  };
  struct Place {
    std::size_t bucket;
    unsigned index;
  };
  struct Free {
    void operator()(Bucket* buckets) const { std::free(buckets); }
  };

  std::size_t home(Tag tag) const {
    return static_cast<std::size_t>(((tag * static_cast<std::uint64_t>(order_)) >> 32) * bucket_count_ >> 32);
  }
  std::size_t next(std::size_t bucket) const { return bucket + 1 == bucket_count_ ? 0 : bucket + 1; }
  bool locate(Tag tag, Place& out) const;

  Order order_;
  std::size_t bucket_count_;
  std::size_t room_;
  std::size_t count_ = 0;
  std::unique_ptr<Bucket[], Free> buckets_;
};

}  // namespace flexkv::cluster
