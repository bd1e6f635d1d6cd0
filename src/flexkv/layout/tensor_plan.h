// One tensor's part of a block as nested loops around a contiguous run. Values; thread-compatible.
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/layout/tensor_desc.h"

namespace flexkv::layout {

struct Loop {
  std::uint64_t count = 1;
  std::uint64_t stride = 0;  // bytes

  friend bool operator==(const Loop&, const Loop&) = default;
};

// The axis label of the loop over kernel blocks. Logical axes are numbered from 0 with the block axis left out.
constexpr int kKernelBlockAxis = -1;

struct Axis {
  int label = 0;
  std::uint64_t size = 1;

  friend bool operator==(const Axis&, const Axis&) = default;
};

struct TensorPlan {
  std::uint64_t address = 0;       // of block 0
  std::uint64_t block_stride = 0;  // bytes from a block to the next
  std::uint64_t block_bytes = 0;   // bytes of one block in this tensor
  std::uint64_t run_bytes = 0;
  std::vector<Loop> loops;  // around a run, within one block, outermost first, merged as far as possible
  std::vector<Axis> axes;   // the same before merging: the physical order of the logical axes longer than 1
  std::uint64_t span = 0;   // bytes from the first to past the last byte of all blocks
};

// Largest address, and so largest distance, that a plan may hold: leaves room for sums in signed 64 bits.
constexpr std::uint64_t kMaxAddress = 1ULL << 61;

// Refuses, naming tensor and axis: shapes without elements, strides below 1, axes that overlap one another (so that
// two blocks, or two elements of a block, share bytes), fewer blocks than block_count, numbers beyond kMaxAddress.
Result<TensorPlan> plan_tensor(const TensorDesc& tensor, std::uint32_t block_count);

}  // namespace flexkv::layout
