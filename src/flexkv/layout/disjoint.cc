#include "flexkv/layout/disjoint.h"

#include <algorithm>

namespace flexkv::layout {
namespace {

// The distance between a run of `a` and one of `b` is a sum of steps: index * stride, index within [low, high].
struct Step {
  std::int64_t stride;
  std::int64_t low;
  std::int64_t high;
  // Least and greatest sum of all steps behind this one.
  std::int64_t rest_low = 0;
  std::int64_t rest_high = 0;
};

std::int64_t floor_divide(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

class Search {
 public:
  Search(const StridedSet& a, const StridedSet& b)
      : a_run_(static_cast<std::int64_t>(a.run_bytes)), b_run_(static_cast<std::int64_t>(b.run_bytes)) {
    for (const Loop& loop : a.loops) add(loop, 1);
    for (const Loop& loop : b.loops) add(loop, -1);
    std::sort(steps_.begin(), steps_.end(), [](const Step& x, const Step& y) { return x.stride > y.stride; });
    for (std::size_t i = steps_.size(); i-- > 1;) {
      steps_[i - 1].rest_low = steps_[i].rest_low + steps_[i].low * steps_[i].stride;
      steps_[i - 1].rest_high = steps_[i].rest_high + steps_[i].high * steps_[i].stride;
    }
  }

  // Can the steps from `level` on bring two runs, now `distance` apart, to where they share a byte?
  bool can_meet(std::size_t level, std::int64_t distance) {
    if (++searched_ > kMaxSearch) return true;
    if (level == steps_.size()) return distance > -a_run_ && distance < b_run_;
    const Step& step = steps_[level];
    // They meet where -a_run < distance + index * stride + rest < b_run.
    const std::int64_t least = -a_run_ + 1 - distance - step.rest_high;
    const std::int64_t most = b_run_ - 1 - distance - step.rest_low;
    const std::int64_t last = std::min(step.high, floor_divide(most, step.stride));
    for (std::int64_t i = std::max(step.low, -floor_divide(-least, step.stride)); i <= last; ++i) {
      if (can_meet(level + 1, distance + i * step.stride)) return true;
    }
    return false;
  }

 private:
  // Equal strides of both sets make one step: only the difference of the two indices matters.
  void add(const Loop& loop, int sign) {
    const auto stride = static_cast<std::int64_t>(loop.stride);
    const auto reach = static_cast<std::int64_t>(loop.count) - 1;
    auto step = std::find_if(steps_.begin(), steps_.end(), [&](const Step& s) { return s.stride == stride; });
    if (step == steps_.end()) step = steps_.insert(steps_.end(), Step{stride, 0, 0});
    if (sign > 0) {
      step->high += reach;
    } else {
      step->low -= reach;
    }
  }

  std::int64_t a_run_;
  std::int64_t b_run_;
  std::vector<Step> steps_;
  std::uint32_t searched_ = 0;
};

}  // namespace

bool disjoint(const StridedSet& a, const StridedSet& b) {
  Search search(a, b);
  return !search.can_meet(0, static_cast<std::int64_t>(a.address) - static_cast<std::int64_t>(b.address));
}

}  // namespace flexkv::layout
