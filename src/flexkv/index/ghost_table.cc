#include "flexkv/index/ghost_table.h"

#include <algorithm>
#include <bit>

namespace flexkv::index {
namespace {

constexpr unsigned kUseBits = 6;
constexpr unsigned kFlagBits = 10;  // reason and uses; as many bits as gone_at loses

std::uint64_t pack(const Ghost& ghost) {
  return (static_cast<std::uint64_t>(ghost.gone_at) >> kFlagBits) << kFlagBits |
         std::uint64_t{static_cast<std::uint8_t>(ghost.reason)} << kUseBits |
         std::min(ghost.uses, GhostTable::kUsesMax);
}

Ghost unpack(std::uint64_t packed) {
  const std::uint64_t flags = packed & ((1U << kFlagBits) - 1);
  return {static_cast<MissReason>(flags >> kUseBits), static_cast<unsigned>(flags & GhostTable::kUsesMax),
          static_cast<Nanos>(packed - flags)};
}

}  // namespace

GhostTable::GhostTable(std::size_t count_max) {
  const std::size_t bucket_count = count_max / std::tuple_size_v<decltype(Bucket::entries)>;
  if (bucket_count > 0) buckets_.resize(std::bit_floor(bucket_count));
}

void GhostTable::record(const key::BlockKey& key, const Ghost& ghost) {
  if (buckets_.empty()) return;
  auto& entries = const_cast<Bucket&>(bucket_of(key)).entries;
  Entry* victim = &entries[0];
  for (Entry& entry : entries) {
    if (entry.fingerprint == key.high) {
      victim = &entry;
      break;
    }
    if (entry.packed < victim->packed) victim = &entry;
  }
  *victim = {key.high, pack(ghost)};
}

Ghost GhostTable::find(const key::BlockKey& key) const {
  if (buckets_.empty()) return {};
  for (const Entry& entry : bucket_of(key).entries) {
    if (entry.fingerprint == key.high && entry.packed != 0) return unpack(entry.packed);
  }
  return {};
}

}  // namespace flexkv::index
