// Runs of a block gathered into rectangles, each of which a copy engine moves with one 2D copy. Pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flexkv::layout {

// One contiguous piece of a block, on the device (for block 0) and in the host form.
struct Run {
  std::uint64_t address = 0;
  std::uint64_t block_stride = 0;
  std::uint32_t host_offset = 0;
  std::uint32_t bytes = 0;
};

// `rows` equal runs at constant, ascending steps on both sides; `rows` 1 (and steps of row_bytes) for a lone run.
struct Rectangle {
  std::uint64_t address = 0;  // of the first row in block 0
  std::uint64_t block_stride = 0;
  std::uint64_t row_step = 0;  // bytes on the device
  std::uint32_t host_offset = 0;
  std::uint32_t host_step = 0;
  std::uint32_t row_bytes = 0;
  std::uint32_t rows = 1;
};

// Every run is in exactly one rectangle. Greedy; looks for rows among every 1st, 2nd, ... kMaxInterleave-th run, so K
// and V tensors that alternate become two rectangles. Time: O(kMaxInterleave * runs).
std::vector<Rectangle> gather_rectangles(std::span<const Run> runs);

constexpr std::size_t kMaxInterleave = 16;

}  // namespace flexkv::layout
