// The sum of a block's bytes: one number that a device computes from its scattered pages and the host from its copy of
// them, to see whether they are the same (docs/decisions/0028). Not cryptographic. Pure; usable in CUDA code.
//
// A block's host form is cut into lanes of 16 bytes, the last one filled up with zeros. Each lane is mixed with its
// number and multiplied down; the products are added, so lanes may come in any order and be shared out among threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "flexkv/base/prng.h"

#if defined(__CUDACC__)
#define FLEXKV_HOST_DEVICE __host__ __device__
#else
#define FLEXKV_HOST_DEVICE
#endif

namespace flexkv {

// What no block's sum is: for "not known".
constexpr std::uint64_t kNoSum = 0;

struct alignas(16) SumLane {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};
constexpr std::uint32_t kSumLaneBytes = sizeof(SumLane);

// Of some lanes of a block. Trivially copyable.
class BlockSum {
 public:
  BlockSum() = default;
  FLEXKV_HOST_DEVICE BlockSum(std::uint64_t low, std::uint64_t high) : sum_(Wide{high} << 64 | low) {}

  FLEXKV_HOST_DEVICE static SumLane key_of(std::uint32_t number) {
    // Keys that grew by a step from lane to lane would let equal changes of neighbours cancel each other out.
    std::uint64_t key = number * kStep + kStart;
    key = (key ^ (key >> 32)) * kLowFactor;
    key ^= key >> 29;
    const std::uint64_t low = key;
    key *= kHighFactor;
    key ^= key >> 32;
    return {low, key};
  }
  // Two lanes that differ in one half only have different products, but if the other half is its key.
  FLEXKV_HOST_DEVICE void add_lane(const SumLane& key, const SumLane& lane) {
    sum_ += Wide{lane.low ^ key.low} * (lane.high ^ key.high);
  }
  FLEXKV_HOST_DEVICE void add_lane(std::uint32_t number, const SumLane& lane) { add_lane(key_of(number), lane); }
  FLEXKV_HOST_DEVICE void add(const BlockSum& other) { sum_ += other.sum_; }

  FLEXKV_HOST_DEVICE std::uint64_t low() const { return static_cast<std::uint64_t>(sum_); }
  FLEXKV_HOST_DEVICE std::uint64_t high() const { return static_cast<std::uint64_t>(sum_ >> 64); }

  // Of a block of so many bytes, once all its lanes are in.
  std::uint64_t value(std::uint64_t bytes) const {
    const std::uint64_t mixed = Prng::mix(low() + Prng::mix(high() + bytes * kStep));
    return mixed == kNoSum ? 1 : mixed;
  }

 private:
  __extension__ typedef unsigned __int128 Wide;

  // Digits of e and pi; the factors are odd.
  static constexpr std::uint64_t kStep = 0xB7E151628AED2A6B;
  static constexpr std::uint64_t kStart = 0xBF7158809CF4F3C7;
  static constexpr std::uint64_t kLowFactor = 0x243F6A8885A308D3;
  static constexpr std::uint64_t kHighFactor = 0x13198A2E03707345;

  Wide sum_ = 0;
};

// Adds whole lanes, numbered from `first` on. REQUIRES: no part of a lane
using AddLanes = void (*)(BlockSum& sum, std::uint32_t first, std::span<const std::byte> bytes);
// On the host: the ways that this processor has, the fastest one first. All come to the same.
std::span<const AddLanes> ways_to_add_lanes();

// On the host, of a block whose bytes come in order, in pieces of any size. Thread-compatible.
class BlockSummer {
 public:
  void add(std::span<const std::byte> bytes) {
    bytes_ += bytes.size();
    if (held_ > 0) {
      const auto taken = bytes.first(std::min(bytes.size(), kSumLaneBytes - held_));
      hold(taken);
      bytes = bytes.subspan(taken.size());
      if (held_ < kSumLaneBytes) return;
      sum_.add_lane(number_++, part_);
      part_ = {};
      held_ = 0;
    }
    const std::size_t whole = bytes.size() / kSumLaneBytes;
    static const AddLanes add_lanes = ways_to_add_lanes().front();
    add_lanes(sum_, number_, bytes.first(whole * kSumLaneBytes));
    number_ += static_cast<std::uint32_t>(whole);
    hold(bytes.subspan(whole * kSumLaneBytes));
  }
  std::uint64_t value() const {
    BlockSum sum = sum_;
    if (held_ > 0) sum.add_lane(number_, part_);
    return sum.value(bytes_);
  }

 private:
  void hold(std::span<const std::byte> bytes) {
    if (!bytes.empty()) std::memcpy(reinterpret_cast<std::byte*>(&part_) + held_, bytes.data(), bytes.size());
    held_ += bytes.size();
  }

  BlockSum sum_;
  std::uint32_t number_ = 0;
  std::uint64_t bytes_ = 0;
  SumLane part_;          // a lane that has begun
  std::size_t held_ = 0;  // bytes of it
};

inline std::uint64_t block_sum(std::span<const std::byte> bytes) {
  BlockSummer summer;
  summer.add(bytes);
  return summer.value();
}

// Part of a slot, and what its bytes must add up to.
struct SummedExtent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
  std::uint64_t sum = kNoSum;
};

// Whether the bytes of a slot are what the extents say. REQUIRES: they are within it.
inline bool holds_sums(std::span<const std::byte> slot, std::span<const SummedExtent> extents) {
  return std::ranges::all_of(extents, [&](const SummedExtent& extent) {
    return block_sum(slot.subspan(extent.offset, extent.bytes)) == extent.sum;
  });
}

}  // namespace flexkv
