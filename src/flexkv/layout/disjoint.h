// Whether two strided sets of bytes share one. Pure functions.
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/layout/tensor_plan.h"

namespace flexkv::layout {

// The bytes [address, address + run_bytes) shifted by every combination of loop steps.
struct StridedSet {
  std::uint64_t address = 0;
  std::uint64_t run_bytes = 0;
  std::vector<Loop> loops;
};

// True when no byte is in both. Exact, but for pairs so entangled that kMaxSearch steps do not settle them: those count
// as overlapping. Tensors that interleave with equal strides (layers within a block) take a few steps.
// REQUIRES: the sets end below kMaxAddress.
bool disjoint(const StridedSet& a, const StridedSet& b);

constexpr std::uint32_t kMaxSearch = 1U << 16;

}  // namespace flexkv::layout
