#include "flexkv/layout/rectangles.h"

namespace flexkv::layout {
namespace {

// How many rows a rectangle that starts at `first` and takes every `stride`-th run would have.
std::uint32_t count_rows(std::span<const Run> runs, const std::vector<bool>& taken, std::size_t first,
                         std::size_t stride) {
  const std::size_t second = first + stride;
  if (second >= runs.size() || runs[second].address < runs[first].address + runs[first].bytes) return 1;
  const std::uint64_t row_step = runs[second].address - runs[first].address;
  const std::uint32_t host_step = runs[second].host_offset - runs[first].host_offset;
  std::uint32_t rows = 1;
  for (std::size_t i = second; i < runs.size(); i += stride) {
    const Run& previous = runs[i - stride];
    const bool fits = !taken[i] && runs[i].bytes == previous.bytes && runs[i].block_stride == previous.block_stride &&
                      runs[i].address == previous.address + row_step &&
                      runs[i].host_offset == previous.host_offset + host_step;
    if (!fits) break;
    ++rows;
  }
  return rows;
}

}  // namespace

std::vector<Rectangle> gather_rectangles(std::span<const Run> runs) {
  std::vector<Rectangle> rectangles;
  std::vector<bool> taken(runs.size(), false);
  for (std::size_t first = 0; first < runs.size(); ++first) {
    if (taken[first]) continue;
    std::uint32_t rows = 1;
    std::size_t stride = 1;
    for (std::size_t candidate = 1; candidate <= kMaxInterleave; ++candidate) {
      const std::uint32_t candidate_rows = count_rows(runs, taken, first, candidate);
      if (candidate_rows > rows) {
        rows = candidate_rows;
        stride = candidate;
      }
    }
    const Run& run = runs[first];
    const Run& next = runs[rows > 1 ? first + stride : first];
    rectangles.push_back({.address = run.address,
                          .block_stride = run.block_stride,
                          .row_step = rows > 1 ? next.address - run.address : run.bytes,
                          .host_offset = run.host_offset,
                          .host_step = rows > 1 ? next.host_offset - run.host_offset : run.bytes,
                          .row_bytes = run.bytes,
                          .rows = rows});
    for (std::size_t i = 0; i < rows; ++i) taken[first + i * stride] = true;
  }
  return rectangles;
}

}  // namespace flexkv::layout
