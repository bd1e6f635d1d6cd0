#include "flexkv/cluster/residency_table.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <vector>

#include "flexkv/base/assert.h"

namespace flexkv::cluster {
namespace {

constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHalvesPerLine = kCacheLine / sizeof(std::uint32_t);
constexpr std::size_t kEight = 8;
// Places ahead in a run that are on their way into the processor's cache.
constexpr std::size_t kAheadMax = 512;

// The highest bit of each byte that is zero: of the lowest one for certain, above it of some that are 1, too.
std::uint64_t zero_bytes(std::uint64_t bytes) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  return (bytes - kOnes) & ~bytes & (kOnes << 7);
}

// Calls visit(i) for those of the 12 marks that are `wanted`, ascending, until it says true; maybe for others behind
// the first. Without a branch for each mark, which nothing could predict.
template <typename Visit>
bool visit_marks(const std::uint8_t* marks, std::uint8_t wanted, Visit visit) {
  std::uint64_t first = 0;
  std::uint32_t rest = 0;
  std::memcpy(&first, marks, sizeof(first));
  std::memcpy(&rest, marks + sizeof(first), sizeof(rest));
  const std::uint64_t all_wanted = wanted * std::uint64_t{0x0101010101010101};
  for (auto found = zero_bytes(first ^ all_wanted); found != 0; found &= found - 1) {
    if (visit(static_cast<unsigned>(std::countr_zero(found)) / 8)) return true;
  }
  constexpr std::uint64_t kNone = 0xFFFFFFFF00000000;
  for (auto found = zero_bytes((rest ^ (all_wanted & ~kNone)) | kNone); found != 0; found &= found - 1) {
    if (visit(8 + static_cast<unsigned>(std::countr_zero(found)) / 8)) return true;
  }
  return false;
}

}  // namespace

// ---- memory --------------------------------------------------------------------------------------------------------

template <typename Value>
template <typename T>
typename ResidencyTable<Value>::template Array<T> ResidencyTable<Value>::allocate(std::size_t count) {
  std::size_t bytes = count * sizeof(T);
  const std::size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kCacheLine;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) (void)::madvise(memory, bytes, MADV_HUGEPAGE);  // refused: only slower
  return Array<T>(static_cast<T*>(memory));
}

template <typename Value>
ResidencyTable<Value>::ResidencyTable(std::size_t room) : ResidencyTable(room, std::max(room, kRoomMin) * 4 / 3) {}

template <typename Value>
ResidencyTable<Value>::ResidencyTable(std::size_t room, std::size_t place_count) {
  // At most three quarters of the slots are used.
  room = std::max(room, kRoomMin);
  bucket_count_ = (room * 4 + kSlots * 3 - 1) / (kSlots * 3);
  room_ = bucket_count_ * kSlots * 3 / 4;
  place_count_ = std::max(place_count, room_ + 2);
  FLEXKV_ASSERT(place_count_ < kNowhere);
  buckets_ = allocate<Bucket>(bucket_count_);
  std::uninitialized_fill_n(buckets_.get(), bucket_count_, Bucket{});
  lows_ = allocate<std::uint32_t>(place_count_);
  highs_ = allocate<std::uint32_t>(place_count_);
  values_ = allocate<Value>(place_count_);
}

// ---- searching -----------------------------------------------------------------------------------------------------

template <typename Value>
template <typename Predicate>
bool ResidencyTable<Value>::locate(Before half, Predicate is_it, Slot& out) const {
  const std::uint8_t wanted = mark(half);
  std::size_t b = home(half);
  for (std::size_t visited = 0; visited < bucket_count_; ++visited, b = next(b)) {
    const Bucket& bucket = buckets_[b];
    const auto look = [&](unsigned i) {
      if (bucket.marks[i] != wanted || !is_it(bucket.places[i])) return false;
      out = {b, i};
      return true;
    };
    if (visit_marks(bucket.marks, wanted, look)) return true;
    if (bucket.passed == 0) return false;
  }
  return false;
}

template <typename Value>
bool ResidencyTable<Value>::locate(Tag tag, Slot& out) const {
  return locate(
      half(tag), [&](Place place) { return tag_at(place) == tag; }, out);
}

template <typename Value>
typename ResidencyTable<Value>::Place ResidencyTable<Value>::place_of(Tag tag) const {
  Slot slot;
  return locate(tag, slot) ? buckets_[slot.bucket].places[slot.index] : kNowhere;
}

template <typename Value>
typename ResidencyTable<Value>::Place ResidencyTable<Value>::place_before(Before before) const {
  if (before == kFirst) return kNowhere;
  if (before == kUnsaid || (newest_ != kNowhere && lows_[newest_] == before)) return newest_;
  Slot slot;
  const bool found = locate(
      before, [&](Place place) { return lows_[place] == before; }, slot);
  return found ? buckets_[slot.bucket].places[slot.index] : kNowhere;
}

template <typename Value>
void ResidencyTable<Value>::prefetch_place(Before half) const {
  const Bucket& bucket = buckets_[home(half)];
  // The first one will mostly be it. Without a loop, which a compiler may take for one that does nothing.
  unsigned first = 0;
  const auto note = [&](unsigned i) {
    first = i;
    return true;
  };
  if (!visit_marks(bucket.marks, mark(half), note)) return;
  const Place place = bucket.places[first];
  __builtin_prefetch(&lows_[place]);
  __builtin_prefetch(&highs_[place]);
  __builtin_prefetch(&values_[place]);
}

template <typename Value>
typename ResidencyTable<Value>::Run ResidencyTable<Value>::run(std::span<const key::BlockKey> keys, std::size_t likely,
                                                               Place expected) const {
  if (keys.empty()) return {};
  const Tag first = tag_of(keys[0]);
  const bool there = expected != kNowhere && values_[expected] != 0 && tag_at(expected) == first;
  const Place place = there ? expected : place_of(first);
  if (place == kNowhere) return {};
  constexpr std::size_t kValuesPerLine = kCacheLine / sizeof(Value);
  const std::uint32_t* lows = &lows_[place];
  const Value* values = &values_[place];
  const std::size_t most = std::min(keys.size(), end_ - place);
  std::size_t length = 1;
  std::size_t fetched = kHalvesPerLine;
  while (length + kEight <= most) {
    const std::size_t ahead = std::min(std::max(likely, 4 * length), kAheadMax);
    for (; fetched < std::min(length + ahead, most); fetched += kHalvesPerLine) {
      __builtin_prefetch(lows + fetched);
      if (fetched % kValuesPerLine == 0) __builtin_prefetch(values + fetched);
    }
    std::uint32_t different = 0;
    bool gone = false;
    for (std::size_t i = length; i < length + kEight; ++i) {
      different |= lows[i] ^ half(tag_of(keys[i]));
      gone |= values[i] == 0;
    }
    if (different != 0 || gone) break;
    length += kEight;
  }
  while (length < most && lows[length] == half(tag_of(keys[length])) && values[length] != 0) ++length;
  Run run;
  // Each chunk has its mark, so there is something behind the last block.
  if (is_mark(place + length)) run.next = lows[length];
  // A key says which ones come before it, so those before the last need not be compared in full.
  while (length > 1 && tag_at(place + length - 1) != tag_of(keys[length - 1])) {
    --length;
    run.next = kNowhere;
  }
  run.values = {values, length};
  return run;
}

// ---- changing ------------------------------------------------------------------------------------------------------

template <typename Value>
void ResidencyTable<Value>::put_mark(std::size_t place, std::uint32_t reach) {
  lows_[place] = kNowhere;
  highs_[place] = reach;
  values_[place] = 0;
}

template <typename Value>
typename ResidencyTable<Value>::Place ResidencyTable<Value>::add_chunk(std::size_t length, std::uint32_t reach_before) {
  const std::size_t first = end_;
  end_ += std::min(length, place_count_ - end_ - 1);
  const std::size_t added = end_ - first;
  std::fill_n(&lows_[first], added, 0);
  std::fill_n(&highs_[first], added, 0);
  std::fill_n(&values_[first], added, Value{0});
  put_mark(end_, reach_before + static_cast<std::uint32_t>(added));
  ++end_;
  ++chunk_count_;
  return static_cast<Place>(first);
}

// For a block that comes behind the one before it.
template <typename Value>
typename ResidencyTable<Value>::Place ResidencyTable<Value>::take_place(Before before) {
  const Place last = place_before(before);
  if (last == kNowhere) return add_chunk(1, 0);
  const Place place = last + 1;
  if (is_free(place)) return place;
  if (!is_mark(place) || lows_[place] != kNowhere) return add_chunk(1, 0);  // the row goes on otherwise
  const std::uint32_t reach = highs_[place];
  if (place + 1U == end_) {
    put_mark(end_++, reach + 1);
    return place;
  }
  return lows_[place] = add_chunk(std::clamp(reach / 2, kGrowthMin, kGrowthMax), reach);
}

template <typename Value>
void ResidencyTable<Value>::put(Place place, Tag tag, Value value) {
  ++count_;
  newest_ = place;
  lows_[place] = half(tag);
  highs_[place] = high(tag);
  values_[place] = value;
  for (std::size_t b = home(half(tag));; b = next(b)) {
    Bucket& bucket = buckets_[b];
    const auto take = [&](unsigned i) {  // the first that is called for is free for certain
      bucket.places[i] = place;
      bucket.marks[i] = mark(half(tag));
      return true;
    };
    if (visit_marks(bucket.marks, 0, take)) return;
    if (bucket.passed != kManyPassed) ++bucket.passed;
  }
}

template <typename Value>
void ResidencyTable<Value>::insert(Tag tag, Value value, Before before) {
  FLEXKV_ASSERT(value != 0 && !full());
  put(take_place(before), tag, value);
}

template <typename Value>
void ResidencyTable<Value>::erase(Slot slot) {
  Bucket& bucket = buckets_[slot.bucket];
  const Place place = bucket.places[slot.index];
  values_[place] = 0;
  highs_[place] = 0;
  --count_;
  bucket.marks[slot.index] = 0;
  for (std::size_t b = home(lows_[place]); b != slot.bucket; b = next(b)) {
    if (buckets_[b].passed != kManyPassed) --buckets_[b].passed;
  }
}

template <typename Value>
void ResidencyTable<Value>::set(Tag tag, Value value, Before before) {
  if (const auto slot = slot_of(tag)) {
    if (value == 0) return erase(*slot);
    at(*slot) = value;
  } else if (value != 0) {
    insert(tag, value, before);
  }
}

template <typename Value>
ResidencyTable<Value> ResidencyTable<Value>::rewritten(const std::function<Value(Value)>& value_of) const {
  constexpr std::size_t kNext = 16;
  ResidencyTable other(count_ + count_ / 2, (count_ + chunk_count_) * 3 / 2 + 2);
  std::vector<bool> linked(end_, false);  // first places of chunks that have been written with the one before
  for (std::size_t first = 0; first < end_;) {
    std::size_t behind = 0;
    std::uint32_t reach = 0;
    for (std::size_t place = first; place != kNowhere;) {
      for (; !is_mark(place); ++place) {
        if (place + kNext < end_) other.prefetch(lows_[place + kNext]);
        const Value value = values_[place] == 0 ? Value{0} : value_of(values_[place]);
        if (value == 0) continue;
        other.put(static_cast<Place>(other.end_++), tag_at(place), value);
        ++reach;
      }
      if (behind == 0) behind = place + 1;
      place = lows_[place];
      if (place != kNowhere) linked[place] = true;
    }
    if (reach > 0) {
      other.put_mark(other.end_++, reach);
      ++other.chunk_count_;
    }
    for (first = behind; first < end_ && linked[first]; ++first) {
      while (!is_mark(first)) ++first;
    }
  }
  other.place_count_ = std::min(other.place_count_, std::max(other.end_ * 3 / 2, other.room_ + 2));
  return other;
}

template class ResidencyTable<std::uint8_t>;
template class ResidencyTable<std::uint32_t>;

}  // namespace flexkv::cluster
