// How long it takes to get bytes from somewhere, learned from what came: fixed + per_byte * bytes. Distance and speed
// are told apart, because what is far and fast is worth it for much and not for little. Thread-compatible.
#pragma once

#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::plan {

// In nanoseconds; all zero: not known.
struct TransferTime {
  double fixed = 0;
  double per_byte = 0;

  bool known() const { return per_byte > 0; }
  double estimate(double bytes) const { return fixed + per_byte * bytes; }
};

// Least squares over the latest transfers, older ones counting less.
class TransferCost {
 public:
  // What came within that time: of transfers that overlap, also what the others brought.
  void observe(std::uint64_t bytes, Nanos duration, Nanos now);
  // As measured here, and the more so the newer that is; the rest as `others` are. Not known if neither is.
  TransferTime time(const TransferTime& others, Nanos now) const;

 private:
  static constexpr double kForget = 0.875;         // what a transfer counts after the next one
  static constexpr double kHalf = 10.0 * kSecond;  // after so long it counts half of that

  void fit();

  // Sums over {1, bytes} and the duration.
  double count_ = 0;
  double bytes_ = 0;
  double nanos_ = 0;
  double bytes_bytes_ = 0;
  double bytes_nanos_ = 0;
  Nanos latest_ = 0;
  TransferTime fitted_;
};

}  // namespace flexkv::plan
