// The speed of a flow of transfers while there are any: bytes over busy time, of about the last kMemory of it, so that
// idle time does not count and transfers that overlap are not counted twice. Thread-compatible.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::plan {

class FlowRate {
 public:
  void begin(std::uint64_t bytes, Nanos now) {
    advance(now);
    waiting_bytes_ += bytes;
    ++waiting_;
  }
  // Of what was begun. `moved`: it went well.
  void end(std::uint64_t bytes, bool moved, Nanos now) {
    advance(now);
    waiting_bytes_ -= bytes;
    --waiting_;
    if (moved) bytes_ += static_cast<double>(bytes);
  }

  // 0: not known yet.
  double bytes_per_second() const { return busy_ < kLeast ? 0 : bytes_ / (busy_ / static_cast<double>(kSecond)); }
  // The same for what is begun now: an estimate that nothing has confirmed for a while is trusted less and less, and
  // doubles with each minute, so that a slow spell is found to be over.
  double expected_bytes_per_second(Nanos now) const {
    const Nanos idle = waiting_ == 0 && now > now_ ? now - now_ : 0;
    return bytes_per_second() * std::exp2(std::min(static_cast<double>(idle) / kDoubling, 60.0));
  }
  // Begun and not ended.
  std::uint64_t waiting_bytes() const { return waiting_bytes_; }

 private:
  static constexpr double kMemory = 2.0 * kSecond;
  static constexpr double kDoubling = 60.0 * kSecond;
  static constexpr double kLeast = 1.0 * kMillisecond;

  void advance(Nanos now) {
    const auto passed = static_cast<double>(now > now_ ? now - now_ : 0);
    now_ = now > now_ ? now : now_;
    if (waiting_ == 0) return;
    const double kept = kMemory / (kMemory + passed);
    bytes_ *= kept;
    busy_ = busy_ * kept + passed;
  }

  Nanos now_ = 0;
  double bytes_ = 0;
  double busy_ = 0;  // nanoseconds
  std::uint64_t waiting_bytes_ = 0;
  std::uint32_t waiting_ = 0;
};

}  // namespace flexkv::plan
