#include "flexkv/telemetry/histogram.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flexkv::telemetry {

double Histogram::bound_us(unsigned index) {
  if (index + 1 >= kBucketCount) return std::numeric_limits<double>::infinity();
  return std::exp2(static_cast<double>(index) / 4.0);
}

void Histogram::record(Nanos latency) {
  latency = std::max<Nanos>(latency, 0);
  const double us = static_cast<double>(latency) / kMicrosecond;
  unsigned index = 0;
  if (us > 1.0) index = std::min(static_cast<unsigned>(std::ceil(std::log2(us) * 4.0)), kBucketCount - 1);
  ++buckets_[index];
  ++count_;
  sum_ += latency;
  max_ = std::max(max_, latency);
}

double Histogram::quantile_us(double quantile) const {
  if (count_ == 0) return 0;
  const double max_us = static_cast<double>(max_) / kMicrosecond;
  const auto rank = static_cast<std::uint64_t>(std::ceil(quantile * static_cast<double>(count_)));
  std::uint64_t seen = 0;
  for (unsigned index = 0; index < kBucketCount; ++index) {
    seen += buckets_[index];
    if (seen >= std::max<std::uint64_t>(rank, 1)) return std::min(bound_us(index), max_us);
  }
  return max_us;
}

}  // namespace flexkv::telemetry
