// The speed of a flow of transfers while there are any: bytes over busy time, so that idle time does not count and
// transfers that overlap are not counted twice. What is older than about kMemory counts little, idle or busy since: a
// few transfers tell that a slow spell is over. Thread-compatible.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::plan {

class FlowRate {
 public:
  void begin(std::uint64_t bytes, Nanos now) {
    advance(now);
    begun_bytes_ += bytes;
    ++waiting_;
  }
  // Of what was begun. `moved`: it went well.
  void end(std::uint64_t bytes, bool moved, Nanos now) {
    advance(now);
    ended_bytes_ += bytes;
    --waiting_;
    if (moved) bytes_ += static_cast<double>(bytes);
  }

  // 0: not known yet.
  double bytes_per_second() const { return busy_ < kLeast ? 0 : bytes_ / (busy_ / static_cast<double>(kSecond)); }
  // Ever begun; with what was begun until some moment, what of it is still to come is known later.
  std::uint64_t begun_bytes() const { return begun_bytes_; }
  std::uint64_t waiting_bytes() const { return waiting_bytes_until(begun_bytes_); }
  std::uint64_t waiting_bytes_until(std::uint64_t begun) const { return begun > ended_bytes_ ? begun - ended_bytes_ : 0; }
  // For how long nothing has confirmed it.
  Nanos idle(Nanos now) const { return waiting_ == 0 && now > now_ ? now - now_ : 0; }

 private:
  static constexpr double kMemory = 1.0 * kSecond;
  static constexpr double kLeast = 1.0 * kMillisecond;

  void advance(Nanos now) {
    const auto passed = static_cast<double>(now > now_ ? now - now_ : 0);
    now_ = now > now_ ? now : now_;
    // What is known stays known.
    const double kept = busy_ > kLeast ? std::max(kMemory / (kMemory + passed), kLeast / busy_) : 1;
    bytes_ *= kept;
    busy_ *= kept;
    if (waiting_ > 0) busy_ += passed;
  }

  Nanos now_ = 0;
  double bytes_ = 0;
  double busy_ = 0;  // nanoseconds
  std::uint64_t begun_bytes_ = 0;
  std::uint64_t ended_bytes_ = 0;
  std::uint32_t waiting_ = 0;
};

}  // namespace flexkv::plan
