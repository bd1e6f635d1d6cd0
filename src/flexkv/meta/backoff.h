// When to try again what failed: after a time that doubles with every failure in a row, up to a bound, of which the
// second half is left to chance, so that the nodes of a cluster do not come back all at once. Thread-compatible.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flexkv/base/prng.h"
#include "flexkv/base/time.h"

namespace flexkv::meta {

class Backoff {
 public:
  Backoff(Nanos first, Nanos most, std::uint64_t seed) : first_(first), most_(most), next_(first), random_(seed) {}

  // The time to wait after one more failure.
  Nanos failed() {
    const Nanos half = std::max<Nanos>(next_ / 2, 1);
    next_ = std::min(next_ * 2, most_);
    return half + static_cast<Nanos>(random_.below(static_cast<std::uint64_t>(half)));
  }
  void succeeded() { next_ = first_; }

 private:
  const Nanos first_;
  const Nanos most_;
  Nanos next_;
  Prng random_;
};

}  // namespace flexkv::meta
