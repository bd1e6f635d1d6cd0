#include "flexkv/cluster/residency_table.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "flexkv/base/assert.h"

namespace flexkv::cluster {
namespace {

constexpr std::size_t kHugePage = 2 << 20;

}  // namespace

ResidencyTable::ResidencyTable(Order order, std::size_t room) : order_(order) {
  // At most three quarters of the places are used.
  room = std::max(room, kRoomMin);
  bucket_count_ = (room * 4 + kPlaces * 3 - 1) / (kPlaces * 3);
  FLEXKV_ASSERT(bucket_count_ <= UINT32_MAX);
  room_ = bucket_count_ * kPlaces * 3 / 4;
  std::size_t bytes = memory_bytes();
  const std::size_t alignment = bytes >= 2 * kHugePage ? kHugePage : alignof(Bucket);
  bytes = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, bytes);
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) (void)::madvise(memory, bytes, MADV_HUGEPAGE);  // refused: only slower
  buckets_.reset(static_cast<Bucket*>(memory));
  std::uninitialized_fill_n(buckets_.get(), bucket_count_, Bucket{});
}

bool ResidencyTable::locate(Tag tag, Place& out) const {
  std::size_t b = home(tag);
  for (std::size_t visited = 0; visited < bucket_count_; ++visited, b = next(b)) {
    const Bucket& bucket = buckets_[b];
    for (unsigned i = 0; i < kPlaces; ++i) {
      if (bucket.tags[i] != tag || bucket.values[i] == 0) continue;
      out = {b, i};
      return true;
    }
    if (bucket.passed == 0) return false;
  }
  return false;
}

std::uint8_t ResidencyTable::find(Tag tag) const {
  Place place;
  return locate(tag, place) ? buckets_[place.bucket].values[place.index] : 0;
}

void ResidencyTable::set(Tag tag, std::uint8_t value) {
  Place place;
  if (locate(tag, place)) {
    buckets_[place.bucket].values[place.index] = value;
    if (value != 0) return;
    --count_;
    for (std::size_t b = home(tag); b != place.bucket; b = next(b)) {
      if (buckets_[b].passed != kManyPassed) --buckets_[b].passed;
    }
    return;
  }
  if (value == 0) return;
  FLEXKV_ASSERT(!full());
  ++count_;
  for (std::size_t b = home(tag);; b = next(b)) {
    Bucket& bucket = buckets_[b];
    for (unsigned i = 0; i < kPlaces; ++i) {
      if (bucket.values[i] != 0) continue;
      bucket.tags[i] = tag;
      bucket.values[i] = value;
      return;
    }
    if (bucket.passed != kManyPassed) ++bucket.passed;
  }
}

ResidencyTable ResidencyTable::resized() const {
  ResidencyTable other(order_, count_ + count_ / 2);
  walk(0, bucket_count_, [&](Tag tag, std::uint8_t value) { other.set(tag, value); });
  return other;
}

}  // namespace flexkv::cluster
