// Which blocks someone has, and a byte about each, in the order in which they came: what was saved in one go lies in a
// row, so a search for a whole prompt reads on where it is instead of searching for each block. The order only makes
// that fast; nothing is concluded from it, each block is compared.
//
// A hash table says where a block lies: an open-addressed one in buckets of one cache line. 9 bytes a place, places of
// blocks that are gone included, and 7.1 a block in a full hash table: 16 to 24 bytes a block, while sparse() is false.
//
// A block is named by 64 of the 128 bits of its key: a table of ten million has a false answer for one of 10^12 keys,
// and whoever acts on an answer checks the whole key. Thread-compatible; any number of threads may read at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>

#include "flexkv/key/block_key.h"

namespace flexkv::cluster {

using Tag = std::uint64_t;
inline Tag tag_of(const key::BlockKey& key) { return key.low; }

class ResidencyTable {
 public:
  // For at least `room` blocks.
  explicit ResidencyTable(std::size_t room = 0);

  // 0: not there.
  std::uint8_t find(Tag tag) const;
  // The values of as many of `keys`, from the first on, as lie in a row; none if the first is not there. What comes
  // behind them may be there, too, elsewhere. `likely`: how many it may well be; what they take is fetched from memory
  // at once.
  std::span<const std::uint8_t> run(std::span<const key::BlockKey> keys, std::size_t likely) const;
  // 0 takes the block out. REQUIRES: value == 0, or !full(), or find(tag) != 0
  void set(Tag tag, std::uint8_t value);
  // No place is left behind the last one. Those of blocks that are gone come back with resized().
  bool full() const { return end_ >= room_; }
  // So few blocks that a smaller one would do.
  bool sparse() const { return room_ > kRoomMin && count_ < room_ / 3; }
  // The same, in the same order, in a table that is half as large again as what is in it.
  ResidencyTable resized() const;

  // What a search for `tag` will read, in two steps: the second one needs what the first one has brought.
  void prefetch(Tag tag) const { __builtin_prefetch(&buckets_[home(tag)]); }
  void prefetch_place(Tag tag) const;

  std::size_t size() const { return count_; }
  // Places are numbered from 0 to end() - 1. A block keeps its place as long as it is there.
  std::size_t end() const { return end_; }
  // As far as it has been used: what is behind the last place is only reserved.
  std::size_t memory_bytes() const {
    return bucket_count_ * sizeof(Bucket) + end_ * (sizeof(Tag) + sizeof(std::uint8_t));
  }

  // Calls visit(tag, value&) for the blocks of places [first, end). The value may be changed, not to 0.
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) {
    for (std::size_t place = first; place < end; ++place) {
      if (values_[place] != 0) visit(tag_at(place), values_[place]);
    }
  }
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) const {
    const_cast<ResidencyTable*>(this)->walk(first, end, [&](Tag tag, const std::uint8_t& value) { visit(tag, value); });
  }

 private:
  using Place = std::uint32_t;
  static constexpr std::size_t kRoomMin = 99;
  static constexpr unsigned kSlots = 12;  // of a bucket
  static constexpr std::uint8_t kManyPassed = 255;
  static constexpr Place kNowhere = UINT32_MAX;

  struct alignas(64) Bucket {
    Place places[kSlots] = {};
    std::uint8_t marks[kSlots] = {};  // 8 bits of the tag, never 0; 0: the slot is free
    std::uint8_t passed = 0;          // blocks that found no slot here and went on; kManyPassed stays
  };
  struct Slot {
    std::size_t bucket;
    unsigned index;
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  template <typename T>
  using Array = std::unique_ptr<T[], Free>;
  template <typename T>
  static Array<T> allocate(std::size_t count);

  static std::uint32_t low(Tag tag) { return static_cast<std::uint32_t>(tag); }
  static std::uint32_t high(Tag tag) { return static_cast<std::uint32_t>(tag >> 32); }
  Tag tag_at(std::size_t place) const { return Tag{highs_[place]} << 32 | lows_[place]; }
  static std::uint64_t mixed(Tag tag) { return tag * 0x9E3779B97F4A7C15ULL; }
  static std::uint8_t mark(Tag tag) { return static_cast<std::uint8_t>(mixed(tag) & 0xFF) | 1U; }
  std::size_t home(Tag tag) const { return static_cast<std::size_t>((mixed(tag) >> 32) * bucket_count_ >> 32); }
  std::size_t next(std::size_t bucket) const { return bucket + 1 == bucket_count_ ? 0 : bucket + 1; }
  bool locate(Tag tag, Slot& out) const;
  Place place_of(Tag tag) const;

  std::size_t bucket_count_;
  std::size_t room_;
  std::size_t count_ = 0;
  std::size_t end_ = 0;
  Array<Bucket> buckets_;
  // Of the places. The halves of tags lie apart, so that a run is as short as can be.
  Array<std::uint32_t> lows_;
  Array<std::uint32_t> highs_;
  Array<std::uint8_t> values_;  // 0: the block is gone
};

}  // namespace flexkv::cluster
