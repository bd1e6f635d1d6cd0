// Whether the next blocks are to be staged, decided from how fast the last ones arrived. While long kernels of the
// model hold all processors, staged blocks wait for them: 10 GB/s beside matrix products that let copies in place make
// 40 to 50. Pure logic; private to the CUDA form; owned by its copy stream's thread.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flexkv/base/time.h"

namespace flexkv::device {

class StagingPace {
 public:
  // In place for so long after staged blocks were found to wait.
  static constexpr Nanos kPause = 50 * kMillisecond;
  // They wait if they take so many times as long as they did at best.
  static constexpr double kSlower = 2.5;

  bool stage(Nanos now) const { return now >= in_place_until_; }

  // `bytes` have arrived since the last call, without a pause between them; all of them staged, or not all.
  void arrived(Nanos now, Nanos took, std::uint64_t bytes, bool staged) {
    if (bytes == 0 || took <= 0) return;
    const double rate = static_cast<double>(bytes) / static_cast<double>(took);
    if (staged && rate * kSlower < best_) in_place_until_ = now + kPause;
    best_ = std::max(best_, rate);
  }

 private:
  double best_ = 0;  // bytes a nanosecond, staged or not
  Nanos in_place_until_ = 0;
};

}  // namespace flexkv::device
