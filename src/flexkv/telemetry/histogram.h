// Latency histogram with fixed logarithmic buckets (four per doubling, 1 us to about 70 s).
// Thread-compatible: the owner's lock guards it. 32 + 8 * kBucketCount bytes, never grows.
#pragma once

#include <array>
#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::telemetry {

class Histogram {
 public:
  static constexpr unsigned kBucketCount = 106;

  void record(Nanos latency);

  std::uint64_t count() const { return count_; }
  Nanos max() const { return max_; }
  double sum_us() const { return static_cast<double>(sum_) / kMicrosecond; }
  // Upper bound, in microseconds, of the bucket that holds the given quantile (0..1); 0 when empty.
  double quantile_us(double quantile) const;
  std::uint64_t bucket(unsigned index) const { return buckets_[index]; }
  // Upper bound of a bucket in microseconds; the last one has no bound (infinity).
  static double bound_us(unsigned index);

 private:
  std::array<std::uint64_t, kBucketCount> buckets_{};
  std::uint64_t count_ = 0;
  Nanos sum_ = 0;
  Nanos max_ = 0;
};

}  // namespace flexkv::telemetry
