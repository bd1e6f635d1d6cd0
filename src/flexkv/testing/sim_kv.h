// What KV bytes must look like. A block's bytes follow from its tag (which names the model, its weights, and every
// token up to the block's end), its shard and its layer; so right bytes in a wrong place are wrong. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/prng.h"
#include "flexkv/testing/sim_loop.h"

namespace flexkv::testing {

// Tags of wrong KV: no block's right tag is one.
constexpr std::uint64_t kGarbage = 0xBADBADBAD;

// Stands for damage: no block has a sum that ends like this, so whoever compares takes the block for damaged.
constexpr std::uint64_t kWrongSum = 0xBAD5BAD5;
inline bool is_wrong_sum(std::uint64_t sum) { return (sum & 0xFFFFFFFF) == kWrongSum; }
// What a device held is what is there, but where that was made up. False: some of it was.
inline bool check_sums(std::span<const std::byte> slot, std::span<const SummedExtent> extents) {
  bool right = true;
  for (const SummedExtent& extent : extents) {
    SIM_CHECK(is_wrong_sum(extent.sum) || holds_sums(slot, {&extent, 1}));
    right = right && !is_wrong_sum(extent.sum);
  }
  return right;
}

inline std::uint64_t next_tag(std::uint64_t tag, std::uint32_t chunk) { return Prng::mix(tag ^ Prng::mix(chunk + 77)); }

inline std::uint64_t kv_word(std::uint64_t tag, std::uint32_t shard, std::size_t word) {
  return Prng::mix(tag + 0x9E3779B97F4A7C15ULL * ((std::uint64_t{shard} << 32) + word + 1));
}

inline void fill_kv(std::span<std::byte> bytes, std::uint64_t tag, std::uint32_t shard) {
  for (std::size_t word = 0; word < bytes.size() / 8; ++word) {
    const std::uint64_t value = kv_word(tag, shard, word);
    std::memcpy(bytes.data() + word * 8, &value, 8);
  }
}

inline bool holds_kv(std::span<const std::byte> bytes, std::uint64_t tag, std::uint32_t shard) {
  for (std::size_t word = 0; word < bytes.size() / 8; ++word) {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes.data() + word * 8, 8);
    if (value != kv_word(tag, shard, word)) return false;
  }
  return true;
}

}  // namespace flexkv::testing
