// How the library's entry point opens a GPU, and tests of the form do. Private to the CUDA form.
#pragma once

#include <cstdint>
#include <memory>

#include "flexkv/base/result.h"
#include "flexkv/device/device.h"

namespace flexkv::device {

// As open_cuda_device().
Result<std::shared_ptr<Device>> open_cuda_form(int ordinal, std::uint32_t stage_below);

}  // namespace flexkv::device
