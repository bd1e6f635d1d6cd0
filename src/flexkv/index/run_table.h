// From the first key of a run to the run: an open-addressing hash table of 32-bit tags. It knows no keys; the caller
// compares. Thread-compatible. 8 bytes a place, at most three quarters of them used; grows by doubling (the only call
// that is not O(1)) and does not shrink.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexkv/base/assert.h"
#include "flexkv/index/slab.h"
#include "flexkv/key/block_key.h"

namespace flexkv::index {

class RunTable {
 public:
  RunTable() : places_(kPlacesMin) {}

  // The run under `key` that `is_it(run)` confirms, or kNone.
  template <typename Predicate>
  std::uint32_t find(const key::BlockKey& key, Predicate is_it) const {
    const std::uint32_t tag = tag_of(key);
    for (std::size_t at = tag & mask(); places_[at].run != kNone; at = (at + 1) & mask()) {
      if (places_[at].tag == tag && is_it(places_[at].run)) return places_[at].run;
    }
    return kNone;
  }

  void insert(const key::BlockKey& key, std::uint32_t run) {
    if ((count_ + 1) * 4 > places_.size() * 3) grow();
    ++count_;
    place({tag_of(key), run});
  }

  // REQUIRES: insert(key, run) was called
  void erase(const key::BlockKey& key, std::uint32_t run) {
    std::size_t hole = locate(key, run);
    --count_;
    // Close the gap, so that searches may stop at the first empty place: whatever may not stand before its own place in
    // the order of probing stays, everything else moves up.
    for (std::size_t at = (hole + 1) & mask(); places_[at].run != kNone; at = (at + 1) & mask()) {
      const std::size_t home = places_[at].tag & mask();
      if (((at - home) & mask()) < ((at - hole) & mask())) continue;
      places_[hole] = places_[at];
      hole = at;
    }
    places_[hole] = Place{};
  }

  // REQUIRES: insert(key, from) was called
  void replace(const key::BlockKey& key, std::uint32_t from, std::uint32_t to) { places_[locate(key, from)].run = to; }

  void clear() { *this = RunTable(); }
  std::size_t size() const { return count_; }
  std::size_t memory_bytes() const { return places_.capacity() * sizeof(Place); }

 private:
  struct Place {
    std::uint32_t tag = 0;
    std::uint32_t run = kNone;
  };
  static constexpr std::size_t kPlacesMin = 64;

  static std::uint32_t tag_of(const key::BlockKey& key) { return static_cast<std::uint32_t>(key.low); }
  std::size_t mask() const { return places_.size() - 1; }

  std::size_t locate(const key::BlockKey& key, std::uint32_t run) const {
    std::size_t at = tag_of(key) & mask();
    while (places_[at].run != run) {
      FLEXKV_ASSERT(places_[at].run != kNone);
      at = (at + 1) & mask();
    }
    return at;
  }
  void place(Place entry) {
    std::size_t at = entry.tag & mask();
    while (places_[at].run != kNone) at = (at + 1) & mask();
    places_[at] = entry;
  }
  void grow() {
    std::vector<Place> old(places_.size() * 2);
    old.swap(places_);
    for (const Place& entry : old) {
      if (entry.run != kNone) place(entry);
    }
  }

  std::vector<Place> places_;  // size is a power of two
  std::size_t count_ = 0;
};

}  // namespace flexkv::index
