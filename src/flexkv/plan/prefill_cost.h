// How long an engine takes to compute a prompt, learned from its steps: a step that computes n tokens, each of which
// attends to those before it, takes about fixed + per_token * n + per_pair * pairs. Thread-compatible.
#pragma once

#include <array>
#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::plan {

// In nanoseconds; all zero: not known.
struct PrefillTime {
  double fixed = 0;  // of each step
  double per_token = 0;
  double per_pair = 0;
  double step_tokens = 0;  // a prompt of more is computed in several steps; 0: in one

  bool known() const { return per_token > 0 || per_pair > 0; }
  // Of `tokens` tokens behind `context` others.
  double estimate(double tokens, double context) const {
    const double steps = step_tokens > 0 && tokens > step_tokens ? tokens / step_tokens : 1;
    return fixed * steps + per_token * tokens + per_pair * pairs(tokens, context);
  }
  static double pairs(double tokens, double context) { return tokens * (context + (tokens + 1) / 2); }
};

// Least squares over the latest steps, older ones counting less. A step that took much longer than expected (the
// machine was busy with something else) counts less, too.
class PrefillCost {
 public:
  // Steps that compute little say little about prefill: below kTokensMin they are left out.
  static constexpr std::uint32_t kTokensMin = 32;

  void observe(std::uint32_t tokens, double pairs, Nanos duration);
  // Known from kStepsMin steps on.
  PrefillTime time() const { return steps_ < kStepsMin ? PrefillTime{} : time_; }

 private:
  static constexpr std::uint32_t kStepsMin = 4;
  using Vector = std::array<double, 3>;

  void fit();

  // Sums over {1, tokens, pairs} and the duration, scaled to keep them comparable.
  std::array<Vector, 3> moments_{};
  Vector products_{};
  std::uint32_t steps_ = 0;
  std::uint32_t step_tokens_ = 0;  // of the largest one
  PrefillTime time_;
};

}  // namespace flexkv::plan
