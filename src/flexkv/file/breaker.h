// Decides whether a drive is fit to serve: it trips when an I/O hangs or too many fail in a row, and closes again when
// a probe succeeds. Pure: told what happens and what time it is. Owned by DriveQueue.
#pragma once

#include <cstdint>
#include <string>

#include "flexkv/base/time.h"

namespace flexkv::file {

struct BreakerLimits {
  Nanos stall_after = 2 * kSecond;  // an I/O older than this means that the drive hangs; others may take longer: Wait
  std::uint32_t failures_in_row_max = 8;
  Nanos probe_after = 100 * kMillisecond;  // doubles with every failed probe, and when the drive soon trips again
  Nanos probe_after_max = 30 * kSecond;
};

// What a drive is asked, by how long it may take.
enum class Wait : std::uint8_t {
  kTransfer,
  kSync,  // also what opens a file, or makes it longer: 5 times as long
  kFree,  // gives the space of a large file back: 30 times as long
};

// Errors that speak against the drive, not against one request (as no space, or a bad argument, do).
bool is_drive_fault(int error_number);

class Breaker {
 public:
  explicit Breaker(const BreakerLimits& limits) : limits_(limits), backoff_(limits.probe_after) {}

  bool available() const { return why_.empty(); }
  const std::string& why() const { return why_; }     // empty while available
  int error_number() const { return error_number_; }  // for requests refused meanwhile
  Nanos probe_at() const { return probe_at_; }        // while not available
  Nanos stall_after(Wait wait) const;

  void succeeded() { failures_in_row_ = 0; }
  // Both are to be called while available only. True: it tripped.
  bool failed(int error_number, Nanos now);
  void stalled(const char* what, Nanos age, Nanos now);
  // Of a probe while not available; 0: it succeeded, and the drive is available again.
  void probed(int error_number, Nanos now);

 private:
  void trip(std::string why, int error_number, Nanos now);

  const BreakerLimits limits_;
  std::uint32_t failures_in_row_ = 0;
  std::string why_;
  int error_number_ = 0;
  Nanos backoff_;
  Nanos probe_at_ = 0;
  Nanos available_since_ = 0;
  bool tripped_before_ = false;
};

}  // namespace flexkv::file
