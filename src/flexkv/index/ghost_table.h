// What is remembered of blocks that left the index: when, why, and how much they had been used. Thread-compatible.
// Bounded: buckets of four, chosen by key; a bucket that is full forgets its oldest. O(1), one cache line a call.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/key/block_key.h"

namespace flexkv::index {

enum class MissReason : std::uint8_t {
  kNone,        // not missing
  kNeverSeen,   // or forgotten since
  kEvicted,     // a tier needed the room
  kReset,       // clear()
  kDamaged,     // drop(): its bytes were others
  kUnreadable,  // drop(): its tier could not give it
};

struct Ghost {
  MissReason reason = MissReason::kNeverSeen;
  unsigned uses = 0;  // as its tier's policy counted them, at most kUsesMax
  Nanos gone_at = 0;  // rounded down to 1,024 ns
};

class GhostTable {
 public:
  static constexpr unsigned kUsesMax = 63;

  // Holds `count_max` ghosts rounded down to a power of two of buckets; none if that is less than one bucket.
  explicit GhostTable(std::size_t count_max);

  void record(const key::BlockKey& key, const Ghost& ghost);
  // Begins to fetch what record() will touch for this key.
  void prefetch(const key::BlockKey& key) const {
    if (!buckets_.empty()) __builtin_prefetch(&bucket_of(key), 1);
  }
  // A ghost with reason kNeverSeen if nothing is known. A wrong answer has a probability of about 2^-62.
  Ghost find(const key::BlockKey& key) const;

  std::size_t memory_bytes() const { return buckets_.capacity() * sizeof(Bucket); }

 private:
  struct Entry {
    std::uint64_t fingerprint = 0;
    std::uint64_t packed = 0;  // gone_at / 1,024, then 4 bits of reason and 6 of uses; 0 = empty
  };
  struct alignas(64) Bucket {
    std::array<Entry, 4> entries;
  };

  const Bucket& bucket_of(const key::BlockKey& key) const { return buckets_[key.low & (buckets_.size() - 1)]; }

  std::vector<Bucket> buckets_;  // size is zero or a power of two
};

}  // namespace flexkv::index
