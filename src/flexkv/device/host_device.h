// The device form for KV in this process's own memory (engines on CPUs, tests): copies run in the submitting thread, so
// every ordering holds by itself. Thread-safe.
#pragma once

#include <memory>

#include "flexkv/device/device.h"

namespace flexkv::device {

// A sum takes the thread about as long as a copy, so few blocks are summed.
constexpr std::uint32_t kHostSavesPerSum = 64;

Result<std::shared_ptr<Device>> open_host_device(std::uint32_t saves_per_sum = kHostSavesPerSum);

}  // namespace flexkv::device
