#include "flexkv/cluster/residency_table.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "flexkv/base/assert.h"

namespace flexkv::cluster {
namespace {

constexpr std::size_t kHugePage = 2 << 20;
constexpr std::size_t kCacheLine = 64;
constexpr std::size_t kHalvesPerLine = kCacheLine / sizeof(std::uint32_t);
constexpr std::size_t kEight = sizeof(std::uint64_t);
// Places ahead in a run that are on their way into the processor's cache.
constexpr std::size_t kAheadMax = 512;

// Of the eight bytes from `bytes` on.
bool has_zero(const std::uint8_t* bytes) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  std::uint64_t eight = 0;
  std::memcpy(&eight, bytes, sizeof(eight));
  return ((eight - kOnes) & ~eight & (kOnes << 7)) != 0;
}

}  // namespace

template <typename T>
ResidencyTable::Array<T> ResidencyTable::allocate(std::size_t count) {
  std::size_t bytes = count * sizeof(T);
  const std::size_t alignment = bytes >= 2 * kHugePage ? kHugePage : kCacheLine;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) (void)::madvise(memory, bytes, MADV_HUGEPAGE);  // refused: only slower
  return Array<T>(static_cast<T*>(memory));
}

ResidencyTable::ResidencyTable(std::size_t room) {
  // At most three quarters of the slots are used.
  room = std::max(room, kRoomMin);
  bucket_count_ = (room * 4 + kSlots * 3 - 1) / (kSlots * 3);
  room_ = bucket_count_ * kSlots * 3 / 4;
  FLEXKV_ASSERT(room_ < kNowhere);
  buckets_ = allocate<Bucket>(bucket_count_);
  std::uninitialized_fill_n(buckets_.get(), bucket_count_, Bucket{});
  lows_ = allocate<std::uint32_t>(room_);
  highs_ = allocate<std::uint32_t>(room_);
  values_ = allocate<std::uint8_t>(room_);
}

bool ResidencyTable::locate(Tag tag, Slot& out) const {
  const std::uint8_t wanted = mark(tag);
  std::size_t b = home(tag);
  for (std::size_t visited = 0; visited < bucket_count_; ++visited, b = next(b)) {
    const Bucket& bucket = buckets_[b];
    for (unsigned i = 0; i < kSlots; ++i) {
      if (bucket.marks[i] != wanted || tag_at(bucket.places[i]) != tag) continue;
      out = {b, i};
      return true;
    }
    if (bucket.passed == 0) return false;
  }
  return false;
}

ResidencyTable::Place ResidencyTable::place_of(Tag tag) const {
  Slot slot;
  return locate(tag, slot) ? buckets_[slot.bucket].places[slot.index] : kNowhere;
}

void ResidencyTable::prefetch_place(Tag tag) const {
  const Bucket& bucket = buckets_[home(tag)];
  const std::uint8_t wanted = mark(tag);
  for (unsigned i = 0; i < kSlots; ++i) {
    if (bucket.marks[i] != wanted) continue;
    __builtin_prefetch(&lows_[bucket.places[i]]);
    __builtin_prefetch(&highs_[bucket.places[i]]);
    __builtin_prefetch(&values_[bucket.places[i]]);
  }
}

std::uint8_t ResidencyTable::find(Tag tag) const {
  const Place place = place_of(tag);
  return place == kNowhere ? 0 : values_[place];
}

std::span<const std::uint8_t> ResidencyTable::run(std::span<const key::BlockKey> keys, std::size_t likely) const {
  if (keys.empty()) return {};
  const Place place = place_of(tag_of(keys[0]));
  if (place == kNowhere) return {};
  const std::uint32_t* lows = &lows_[place];
  const std::uint8_t* values = &values_[place];
  const std::size_t most = std::min(keys.size(), end_ - place);
  std::size_t length = 1;
  std::size_t fetched = kHalvesPerLine;
  while (length + kEight <= most) {
    const std::size_t ahead = std::min(std::max(likely, 4 * length), kAheadMax);
    for (; fetched < std::min(length + ahead, most); fetched += kHalvesPerLine) {
      __builtin_prefetch(lows + fetched);
      if (fetched % kCacheLine == 0) __builtin_prefetch(values + fetched);
    }
    std::uint32_t different = 0;
    for (std::size_t i = length; i < length + kEight; ++i) different |= lows[i] ^ low(tag_of(keys[i]));
    if (different != 0 || has_zero(values + length)) break;
    length += kEight;
  }
  while (length < most && lows[length] == low(tag_of(keys[length])) && values[length] != 0) ++length;
  // A key says which ones come before it, so those before the last need not be compared in full.
  while (length > 1 && tag_at(place + length - 1) != tag_of(keys[length - 1])) --length;
  return {values, length};
}

void ResidencyTable::set(Tag tag, std::uint8_t value) {
  Slot slot;
  if (locate(tag, slot)) {
    Bucket& bucket = buckets_[slot.bucket];
    values_[bucket.places[slot.index]] = value;
    if (value != 0) return;
    --count_;
    bucket.marks[slot.index] = 0;
    for (std::size_t b = home(tag); b != slot.bucket; b = next(b)) {
      if (buckets_[b].passed != kManyPassed) --buckets_[b].passed;
    }
    return;
  }
  if (value == 0) return;
  FLEXKV_ASSERT(!full());
  ++count_;
  lows_[end_] = low(tag);
  highs_[end_] = high(tag);
  values_[end_] = value;
  const auto place = static_cast<Place>(end_++);
  for (std::size_t b = home(tag);; b = next(b)) {
    Bucket& bucket = buckets_[b];
    for (unsigned i = 0; i < kSlots; ++i) {
      if (bucket.marks[i] != 0) continue;
      bucket.places[i] = place;
      bucket.marks[i] = mark(tag);
      return;
    }
    if (bucket.passed != kManyPassed) ++bucket.passed;
  }
}

ResidencyTable ResidencyTable::resized() const {
  constexpr std::size_t kNext = 16;
  ResidencyTable other(count_ + count_ / 2);
  for (std::size_t place = 0; place < end_; ++place) {
    if (place + kNext < end_) other.prefetch(tag_at(place + kNext));
    if (values_[place] != 0) other.set(tag_at(place), values_[place]);
  }
  return other;
}

}  // namespace flexkv::cluster
