// The device form for NVIDIA GPUs, in a library of its own (libflexkv_cuda.so) that is loaded on first use, so that
// everything else builds and runs on machines without CUDA. Thread-safe.
#pragma once

#include <memory>

#include "flexkv/device/device.h"

namespace flexkv::device {

// The library is looked for where FLEXKV_CUDA_LIBRARY says, else beside the binary that contains this function. It
// stays loaded. Uses the device's primary context, the one of the engine in this process, and makes no other.
Result<std::shared_ptr<Device>> open_cuda_device(int ordinal);

}  // namespace flexkv::device
