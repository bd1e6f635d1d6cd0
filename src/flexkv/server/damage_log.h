// What is said of blocks in host memory that are not what the device held (docs/decisions/0028). Thread-safe.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <string>

#include "flexkv/base/log.h"

namespace flexkv::server {

// `use`: what the block was dropped instead of. The 1st, 2nd, 4th, 8th, ... is told.
inline void log_damaged_block(const std::string& use) {
  static std::atomic<std::uint64_t> count{0};
  const std::uint64_t number = ++count;
  if (!std::has_single_bit(number)) return;
  log_error("a block in host memory was not what the device held when it was saved (number " + std::to_string(number) +
            "); it was dropped, not " + use + ". Memory, the link to the device or its driver may be faulty");
}

}  // namespace flexkv::server
