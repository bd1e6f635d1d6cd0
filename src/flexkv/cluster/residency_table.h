// A value for each block that is there, in rows: a block lies behind the one that comes before it in its prompt, so a
// search for a whole prompt reads on where it is instead of searching for each block. The order only makes that fast;
// nothing is concluded from it, each block is compared.
//
// A row is a chain of chunks of numbered places. A chunk has a mark behind its last place, with a link to the next
// chunk, which is half as long as all that came before it, but at most kGrowthMax: so a prompt that comes a block at a
// time lies in a few, and nothing ever moves. rewritten() makes one chunk of each row.
//
// A hash table says where a block lies: an open-addressed one in buckets of one cache line. A place takes 8 bytes and a
// value, also those of blocks that are gone, marks, and places that wait for blocks to come; the hash table 7.1 a block
// when it is full: with values of 8 bits 16 to 24 bytes a block of long rows, with 32 bits 19 to 29, while sparse() is
// false; blocks that are rows of their own take up to 38 and 47.
//
// A block is named by 64 of the 128 bits of its key: a table of ten million has a false answer for one of 10^12 keys,
// and whoever acts on an answer checks the whole key. Thread-compatible; any number of threads may read at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "flexkv/key/block_key.h"

namespace flexkv::cluster {

using Tag = std::uint64_t;
inline Tag tag_of(const key::BlockKey& key) { return key.low; }

// What is said of the block before another one: half of its tag, as it is only a place to look at.
using Before = std::uint32_t;
inline constexpr Before kUnsaid = 0;  // probably the one that was said just before
inline constexpr Before kFirst = 1;   // there is none
inline Before half(Tag tag) { return static_cast<Before>(tag); }

// Value: an unsigned number, 0 of blocks that are not there. Instances: 8 and 32 bits.
template <typename Value>
class ResidencyTable {
 public:
  using Place = std::uint32_t;
  static constexpr Place kNowhere = UINT32_MAX;

  // For at least `room` blocks, if they come in one row.
  explicit ResidencyTable(std::size_t room = 0);

  Value find(Tag tag) const {
    const Place place = place_of(tag);
    return place == kNowhere ? Value{0} : values_[place];
  }
  // Where a block was found, until the table changes otherwise.
  struct Slot {
    std::size_t bucket;
    unsigned index;
  };
  std::optional<Slot> slot_of(Tag tag) const {
    Slot slot;
    return locate(tag, slot) ? std::optional(slot) : std::nullopt;
  }
  // The value may be changed, not to 0.
  Value& at(Slot slot) { return values_[buckets_[slot.bucket].places[slot.index]]; }

  struct Run {
    std::span<const Value> values;
    Place next = kNowhere;  // where the block behind them may be
  };
  // The values of as many of `keys`, from the first on, as lie together; none if the first is not there. What comes
  // behind them may be there, too, elsewhere. `expected`: where the first may be, as the run before said. `likely`: how
  // many there may well be; what they take is fetched from memory at once.
  Run run(std::span<const key::BlockKey> keys, std::size_t likely, Place expected = kNowhere) const;

  // REQUIRES: value != 0, !full(), find(tag) == 0
  void insert(Tag tag, Value value, Before before = kUnsaid);
  void erase(Slot slot);
  void erase(Tag tag) {  // no effect if it is not there
    if (const auto slot = slot_of(tag)) erase(*slot);
  }
  // Either of them, or a change of the value of what is there.
  void set(Tag tag, Value value, Before before = kUnsaid);

  // There is no place for another block. Those of blocks that are gone come back with rewritten(), or when the same
  // row grows there.
  bool full() const { return end_ + 2 > place_count_ || count_ >= room_; }
  // So few blocks that a smaller one would do.
  bool sparse() const { return room_ > kRoomMin && count_ < room_ / 3; }
  // The same in another table that is half as large again as what is in it: rows in the order in which they began, each
  // in one chunk. `value_of` gives each block's value there, 0 leaves it out.
  ResidencyTable rewritten(const std::function<Value(Value)>& value_of) const;
  ResidencyTable rewritten() const {
    return rewritten([](Value value) { return value; });
  }

  // What a search for `tag`, or for a block of that half, will read, in two steps: the second one needs what the first
  // one has brought.
  void prefetch(Before half) const { __builtin_prefetch(&buckets_[home(half)]); }
  void prefetch_place(Before half) const;

  std::size_t size() const { return count_; }
  // Places are numbered from 0 to end() - 1. A block keeps its place as long as it is there.
  std::size_t end() const { return end_; }
  // As far as it has been used: what is behind the last place is only reserved.
  std::size_t memory_bytes() const { return bucket_count_ * sizeof(Bucket) + end_ * (sizeof(Tag) + sizeof(Value)); }

  // Calls visit(tag, value&, before) for the blocks of places [first, end). The value may be changed, not to 0.
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) {
    for (std::size_t place = first; place < end; ++place) {
      if (values_[place] == 0) continue;
      const bool follows = place > 0 && values_[place - 1] != 0;
      visit(tag_at(place), values_[place], follows ? lows_[place - 1] : kFirst);
    }
  }
  template <typename Visit>
  void walk(std::size_t first, std::size_t end, Visit visit) const {
    const_cast<ResidencyTable*>(this)->walk(
        first, end, [&](Tag tag, const Value& value, Before before) { visit(tag, value, before); });
  }

 private:
  static constexpr std::size_t kRoomMin = 99;
  static constexpr unsigned kSlots = 12;  // of a bucket
  static constexpr std::uint8_t kManyPassed = 255;
  // Blocks, of a chunk behind another one. Places that wait for blocks are taken from others when the table is full.
  static constexpr std::uint32_t kGrowthMin = 3;
  static constexpr std::uint32_t kGrowthMax = 128;

  struct alignas(64) Bucket {
    Place places[kSlots] = {};
    std::uint8_t marks[kSlots] = {};  // 8 bits of the tag, never 0; 0: the slot is free
    std::uint8_t passed = 0;          // blocks that found no slot here and went on; kManyPassed stays
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  template <typename T>
  using Array = std::unique_ptr<T[], Free>;
  template <typename T>
  static Array<T> allocate(std::size_t count);

  ResidencyTable(std::size_t room, std::size_t place_count);

  static std::uint32_t high(Tag tag) { return static_cast<std::uint32_t>(tag >> 32); }
  Tag tag_at(std::size_t place) const { return Tag{highs_[place]} << 32 | lows_[place]; }
  static std::uint64_t mixed(Before half) { return half * 0x9E3779B97F4A7C15ULL; }
  static std::uint8_t mark(Before half) { return static_cast<std::uint8_t>(mixed(half) & 0xFF) | 1U; }
  std::size_t home(Before half) const { return static_cast<std::size_t>((mixed(half) >> 32) * bucket_count_ >> 32); }
  std::size_t next(std::size_t bucket) const { return bucket + 1 == bucket_count_ ? 0 : bucket + 1; }
  // The slot of a block with this half that is_it(place).
  template <typename Predicate>
  bool locate(Before half, Predicate is_it, Slot& out) const;
  bool locate(Tag tag, Slot& out) const;
  Place place_of(Tag tag) const;
  Place place_before(Before before) const;

  // A place without a block: one where a block may come, or a mark.
  bool is_free(std::size_t place) const { return values_[place] == 0 && highs_[place] == 0; }
  bool is_mark(std::size_t place) const { return values_[place] == 0 && highs_[place] != 0; }
  // `reach`: places of its row up to there.
  void put_mark(std::size_t place, std::uint32_t reach);
  Place add_chunk(std::size_t length, std::uint32_t reach_before);
  Place take_place(Before before);
  void put(Place place, Tag tag, Value value);

  std::size_t bucket_count_;
  std::size_t room_;         // blocks
  std::size_t place_count_;  // at most this many
  std::size_t count_ = 0;
  std::size_t chunk_count_ = 0;
  std::size_t end_ = 0;
  Place newest_ = kNowhere;  // where a block was put last
  Array<Bucket> buckets_;
  // Of the places. The halves of tags lie apart, so that a run is as short as can be. Of a mark, they are the first
  // place of the next chunk, or kNowhere, and its reach.
  Array<std::uint32_t> lows_;
  Array<std::uint32_t> highs_;
  Array<Value> values_;
};

}  // namespace flexkv::cluster
