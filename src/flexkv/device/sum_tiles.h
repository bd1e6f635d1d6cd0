// How many threads share out the sum of a block that lies scattered on a device (base/block_sum.h). Pure; usable in
// CUDA code, and run by tests on the host just as the GPU runs it.
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/layout/block_layout.h"

namespace flexkv::device {

// Its runs, none longer than this, in the order of the host form. A warp sums one at a time.
constexpr std::uint32_t kTileBytes = 32U << 10;

inline std::vector<layout::Run> tiles_of(const layout::BlockLayout& layout) {
  std::vector<layout::Run> tiles;
  for (layout::Run run : layout.runs()) {
    while (run.bytes > 0) {
      layout::Run tile = run;
      // Cut where a lane begins.
      tile.bytes = std::min(run.bytes, kTileBytes - run.host_offset % kTileBytes);
      tiles.push_back(tile);
      run.address += tile.bytes;
      run.host_offset += tile.bytes;
      run.bytes -= tile.bytes;
    }
  }
  return tiles;
}

// Sums the part of one thread, of `threads` that work on one tile together. Lanes belong to the tile in which they
// begin; what is missing of its last one lies in those that follow.
class TileSummer {
 public:
  FLEXKV_HOST_DEVICE TileSummer(const layout::Run* tiles, std::uint32_t tile_count, std::uint32_t block)
      : tiles_(tiles), tile_count_(tile_count), block_(block) {}

  FLEXKV_HOST_DEVICE void add(std::uint32_t tile, std::uint32_t thread, std::uint32_t threads) {
    const layout::Run& run = tiles_[tile];
    const std::uint32_t first = run.host_offset / kSumLaneBytes + (run.host_offset % kSumLaneBytes != 0);
    const std::uint32_t skipped = first * kSumLaneBytes - run.host_offset;
    if (skipped >= run.bytes) return;
    const std::uint32_t whole = (run.bytes - skipped) / kSumLaneBytes;
    const std::uint64_t address = address_of(run) + skipped;
    if (address % sizeof(SumLane) == 0) {
      add_whole<SumLane>(address, first, whole, thread, threads);
    } else if (address % sizeof(std::uint32_t) == 0) {
      add_whole<std::uint32_t>(address, first, whole, thread, threads);
    } else {
      add_whole<std::uint8_t>(address, first, whole, thread, threads);
    }
    if (thread == 0 && skipped + whole * kSumLaneBytes < run.bytes) add_ragged(tile, first + whole);
  }

  FLEXKV_HOST_DEVICE const BlockSum& sum() const { return sum_; }

 private:
  // Lanes that a thread reads before it needs the first.
  static constexpr std::uint32_t kInFlight = 8;

  FLEXKV_HOST_DEVICE std::uint64_t address_of(const layout::Run& run) const {
    return run.address + block_ * run.block_stride;
  }

  template <typename Unit>
  FLEXKV_HOST_DEVICE static SumLane load(std::uint64_t address, std::uint32_t number) {
    const auto* const units = reinterpret_cast<const Unit*>(address + std::uint64_t{number} * kSumLaneBytes);
    if constexpr (sizeof(Unit) == sizeof(SumLane)) {
      return *units;
    } else {
      constexpr std::uint32_t kPerHalf = sizeof(std::uint64_t) / sizeof(Unit);
      SumLane lane;
      for (std::uint32_t i = 0; i < kPerHalf; ++i) {
        lane.low |= std::uint64_t{units[i]} << (8 * sizeof(Unit) * i);
        lane.high |= std::uint64_t{units[kPerHalf + i]} << (8 * sizeof(Unit) * i);
      }
      return lane;
    }
  }

  template <typename Unit>
  FLEXKV_HOST_DEVICE void add_whole(std::uint64_t address, std::uint32_t first, std::uint32_t count,
                                    std::uint32_t thread, std::uint32_t threads) {
    std::uint32_t lane = thread;
    for (; lane + (kInFlight - 1) * threads < count; lane += kInFlight * threads) {
      SumLane lanes[kInFlight];
      for (std::uint32_t i = 0; i < kInFlight; ++i) lanes[i] = load<Unit>(address, lane + i * threads);
      for (std::uint32_t i = 0; i < kInFlight; ++i) sum_.add_lane(first + lane + i * threads, lanes[i]);
    }
    for (; lane < count; lane += threads) sum_.add_lane(first + lane, load<Unit>(address, lane));
  }

  FLEXKV_HOST_DEVICE void add_ragged(std::uint32_t tile, std::uint32_t number) {
    std::uint64_t halves[2] = {0, 0};
    for (std::uint32_t i = 0; i < kSumLaneBytes; ++i) {
      const std::uint32_t at = number * kSumLaneBytes + i;
      while (tile < tile_count_ && at >= tiles_[tile].host_offset + tiles_[tile].bytes) ++tile;
      if (tile == tile_count_) break;
      const auto* const byte =
          reinterpret_cast<const std::uint8_t*>(address_of(tiles_[tile]) + (at - tiles_[tile].host_offset));
      halves[i / 8] |= std::uint64_t{*byte} << (8 * (i % 8));
    }
    sum_.add_lane(number, SumLane{halves[0], halves[1]});
  }

  const layout::Run* const tiles_;
  const std::uint32_t tile_count_;
  const std::uint32_t block_;
  BlockSum sum_;
};

}  // namespace flexkv::device
