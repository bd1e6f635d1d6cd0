// The device form for NVIDIA GPUs, in a library of its own (libflexkv_cuda.so) that is loaded on first use, so that
// everything else builds and runs on machines without CUDA. Thread-safe.
#pragma once

#include <memory>

#include "flexkv/device/device.h"

namespace flexkv::device {

// As measured on an H200 (docs/benchmarks.md).
constexpr std::uint32_t kStageBelow = 64U << 10;

// The library is looked for where FLEXKV_CUDA_LIBRARY says, else beside the binary that contains this function. It
// stays loaded. Uses the device's primary context, the one of the engine in this process, and makes no other.
// Blocks whose runs are shorter than `stage_below` bytes on average are loaded through buffers of 16 MiB in device
// memory, from where a kernel scatters them; others, and all that are saved, are copied where they lie.
Result<std::shared_ptr<Device>> open_cuda_device(int ordinal, std::uint32_t stage_below = kStageBelow);

}  // namespace flexkv::device
