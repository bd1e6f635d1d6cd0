// One KV tensor as an engine registers it: memory that holds block_count blocks. Thread-compatible value.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flexkv::layout {

struct TensorDesc {
  std::string name;  // for messages only
  std::uint64_t address = 0;
  std::uint32_t element_bytes = 1;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> stride;  // in elements, one for each axis
  unsigned block_axis = 0;           // the axis that numbers the blocks
  // Consecutive entries of the block axis that make up one block: above 1 where the engine's kernels page in smaller
  // units than its block manager.
  std::uint32_t kernel_blocks_per_block = 1;
};

}  // namespace flexkv::layout
