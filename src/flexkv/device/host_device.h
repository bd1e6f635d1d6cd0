// The device form for KV in this process's own memory (engines on CPUs, tests): copies run in the submitting thread, so
// every ordering holds by itself. Thread-safe.
#pragma once

#include <memory>

#include "flexkv/device/device.h"

namespace flexkv::device {

Result<std::shared_ptr<Device>> open_host_device();

}  // namespace flexkv::device
