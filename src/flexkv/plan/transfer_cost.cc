#include "flexkv/plan/transfer_cost.h"

#include <algorithm>
#include <cmath>

namespace flexkv::plan {
namespace {

// Transfers whose sizes vary less than that (standard deviation of the mean) do not tell distance from speed.
constexpr double kSpread = 0.05;
// Of the time of a transfer of mean size, at least so much is speed: what is read next may be larger.
constexpr double kSpeedShare = 0.01;

constexpr double kOthers = 0.1;  // what the others count, in transfers: they matter once what is known here is old

}  // namespace

void TransferCost::observe(std::uint64_t bytes, Nanos duration, Nanos now) {
  if (bytes == 0) return;
  const auto size = static_cast<double>(bytes);
  const auto time = static_cast<double>(std::max<Nanos>(duration, 1));
  const auto add = [](double& sum, double value) { sum = sum * kForget + value; };
  add(count_, 1);
  add(bytes_, size);
  add(nanos_, time);
  add(bytes_bytes_, size * size);
  add(bytes_nanos_, size * time);
  latest_ = now;
  fit();
}

void TransferCost::fit() {
  const double mean_bytes = bytes_ / count_;
  const double mean_nanos = nanos_ / count_;
  const double variance = std::max(bytes_bytes_ / count_ - mean_bytes * mean_bytes, 0.0);
  double fixed = fitted_.fixed;  // what was known of it, where these say nothing
  if (variance > kSpread * kSpread * mean_bytes * mean_bytes) {
    const double slope = (bytes_nanos_ / count_ - mean_bytes * mean_nanos) / variance;
    fixed = mean_nanos - slope * mean_bytes;
  }
  fitted_.fixed = std::clamp(fixed, 0.0, mean_nanos * (1 - kSpeedShare));
  fitted_.per_byte = (mean_nanos - fitted_.fixed) / mean_bytes;
}

TransferTime TransferCost::time(const TransferTime& others, Nanos now) const {
  if (count_ == 0) return others;
  if (!others.known()) return fitted_;
  const double age = static_cast<double>(std::max<Nanos>(now - latest_, 0));
  const double own = count_ * std::exp2(-age / kHalf);
  const auto mixed = [&](double here, double there) { return (own * here + kOthers * there) / (own + kOthers); };
  return {mixed(fitted_.fixed, others.fixed), mixed(fitted_.per_byte, others.per_byte)};
}

}  // namespace flexkv::plan
