// Addresses of a block's elements, one by one, straight from shape and strides: slow, and independent of BlockLayout,
// so that a copy plan can be checked against it. Pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "flexkv/layout/tensor_desc.h"

namespace flexkv::layout {

// Calls fn(address) for each element of `block` in the order of the host form.
// REQUIRES: BlockLayout::derive accepts the tensor, with more than `block` blocks.
template <typename Fn>
void for_each_element(const TensorDesc& tensor, std::uint32_t block, Fn&& fn) {
  const std::size_t rank = tensor.shape.size();
  std::vector<std::int64_t> first(rank, 0);
  std::vector<std::int64_t> last = tensor.shape;
  first[tensor.block_axis] = std::int64_t{block} * tensor.kernel_blocks_per_block;
  last[tensor.block_axis] = first[tensor.block_axis] + tensor.kernel_blocks_per_block;

  // Axes by falling stride; one of size 1 has no say in the order and may have any stride.
  std::vector<std::size_t> axes(rank);
  std::iota(axes.begin(), axes.end(), 0U);
  std::stable_sort(axes.begin(), axes.end(),
                   [&](std::size_t a, std::size_t b) { return tensor.stride[a] > tensor.stride[b]; });

  std::vector<std::int64_t> index = first;
  while (true) {
    std::int64_t element = 0;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      // Where there is one entry its stride is arbitrary: do not multiply by it.
      if (index[axis] != 0) element += index[axis] * tensor.stride[axis];
    }
    fn(tensor.address + static_cast<std::uint64_t>(element) * tensor.element_bytes);
    std::size_t turning = rank;  // the innermost axis turns fastest
    while (turning > 0 && ++index[axes[turning - 1]] == last[axes[turning - 1]]) {
      index[axes[turning - 1]] = first[axes[turning - 1]];
      --turning;
    }
    if (turning == 0) return;
  }
}

// A contiguous piece of a block and its place in the host form.
struct Piece {
  std::uint64_t address = 0;
  std::uint64_t host_offset = 0;
  std::uint64_t bytes = 0;
  std::size_t tensor = 0;  // which of the descriptions it belongs to
};

// All elements of a block, neighbours joined, in the order of the host form; repeated tensors count once.
inline std::vector<Piece> pieces_of_block(std::span<const TensorDesc> tensors, std::uint32_t block) {
  std::vector<Piece> pieces;
  std::uint64_t host_offset = 0;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const TensorDesc& tensor = tensors[t];
    const bool repeated = std::any_of(tensors.begin(), tensors.begin() + static_cast<std::ptrdiff_t>(t), [&](auto& e) {
      return e.address == tensor.address && e.shape == tensor.shape && e.stride == tensor.stride &&
             e.element_bytes == tensor.element_bytes;
    });
    if (repeated) continue;
    std::size_t start = pieces.size();
    for_each_element(tensor, block, [&](std::uint64_t address) {
      if (pieces.size() > start && pieces.back().address + pieces.back().bytes == address) {
        pieces.back().bytes += tensor.element_bytes;
      } else {
        pieces.push_back({address, host_offset, tensor.element_bytes, t});
      }
      host_offset += tensor.element_bytes;
    });
  }
  return pieces;
}

}  // namespace flexkv::layout
