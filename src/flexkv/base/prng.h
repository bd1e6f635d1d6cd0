// Seeded pseudo random numbers (splitmix64) for simulation, tests and benchmarks: the same seed gives the same run.
#pragma once

#include <cstdint>

namespace flexkv {

class Prng {
 public:
  explicit Prng(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    return mix(state_);
  }
  // Uniform in [0, bound). REQUIRES: bound > 0. (Modulo bias is below 2^-32 for the bounds used here.)
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }
  // True in `percent` of 100 calls.
  bool chance(unsigned percent) { return below(100) < percent; }

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }

 private:
  std::uint64_t state_;
};

}  // namespace flexkv
