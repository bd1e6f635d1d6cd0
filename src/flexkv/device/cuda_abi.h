// What open_cuda_device() and libflexkv_cuda.so agree on. Both come from one build; the number tells when they do not.
#pragma once

#include <cstdint>
#include <memory>

#include "flexkv/device/device.h"

namespace flexkv::device {

constexpr std::uint32_t kCudaAbiVersion = 3;
constexpr std::uint32_t kCudaAbi = kCudaAbiVersion << 24 |
                                   static_cast<std::uint32_t>(sizeof(layout::BlockLayout)) << 12 |
                                   static_cast<std::uint32_t>(sizeof(layout::Strip));

enum class CudaOpened : int { kOk = 0, kFailed = 1, kOtherAbi = 2 };

// The one exported function, extern "C". With kOtherAbi nothing but `abi` was looked at; kFailed has filled *error.
using CudaOpen = CudaOpened (*)(std::uint32_t abi, int ordinal, std::uint32_t stage_below,
                                std::shared_ptr<Device>* device, Error* error);
constexpr const char* kCudaOpenName = "flexkv_cuda_open";

}  // namespace flexkv::device
