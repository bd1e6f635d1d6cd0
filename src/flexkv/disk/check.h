// Verifies what lies in a directory of the tier, for the command line. Changes nothing. Blocking; thread-compatible.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::disk {

struct CheckReport {
  std::uint64_t blocks = 0;  // found by their records
  std::uint64_t bytes = 0;
  std::uint64_t bad_blocks = 0;         // the payload is not what its record says: never served, read as a miss
  std::uint64_t unreadable_blocks = 0;  // the file system cannot read them
  std::vector<std::string> problems;    // in sentences; of blocks the first few
};

// By which its rate is kept.
struct CheckClock {
  std::function<Nanos()> now = monotonic_now;
  std::function<void(Nanos)> sleep = [](Nanos time) { std::this_thread::sleep_for(std::chrono::nanoseconds(time)); };
};

// Reads at most so many bytes a second (0: no limit) and calls `progress` now and then with the bytes done and in all.
// Fails when a node uses the directory, it is none of the tier's, or it cannot be read at all.
Result<CheckReport> check(const std::string& directory, std::uint64_t bytes_per_second,
                          const std::function<void(std::uint64_t done, std::uint64_t total)>& progress,
                          const CheckClock& clock = {});

}  // namespace flexkv::disk
