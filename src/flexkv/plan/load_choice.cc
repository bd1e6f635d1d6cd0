#include "flexkv/plan/load_choice.h"

#include <algorithm>

namespace flexkv::plan {
namespace {

// So much worse is as good: estimates are no better.
constexpr double kDoubt = 1.02;

}  // namespace

LoadChoice choose_load(const LoadQuestion& question) {
  LoadChoice choice;
  for (const Stretch& stretch : question.stretches) choice.blocks += stretch.blocks;
  if (!question.prefill.known() || choice.blocks == 0) return choice;
  const double tokens = double{1} * question.block_tokens;
  double least = 0;  // cost: of this prompt's time, and of the others'
  const auto consider = [&](std::uint32_t blocks, const Stretch& loaded) {
    const std::uint32_t there = std::max(blocks, question.engine_blocks);
    const double left = (question.prompt_blocks - there) * tokens;
    // Even a prompt that is loaded whole has its last token computed.
    const double compute = question.prefill.estimate(left < 1 ? 1 : left, there * tokens);
    const auto later = std::ranges::upper_bound(question.arrivals, loaded.arrives, {}, &Arrival::arrives);
    double before = question.engine_free;
    for (auto one = question.arrivals.begin(); one != later; ++one)
      before = std::max(before, one->arrives) + one->compute;
    const double end = std::max(before, loaded.arrives) + compute;
    double cost = end + question.behind * std::max(compute, loaded.reading);
    // Those that arrive later, without this prompt and with it.
    double after = end;
    for (auto one = later; one != question.arrivals.end() && before < after; ++one) {
      const double without = std::max(before, one->arrives);
      const double with = std::max(after, one->arrives);
      cost += with - without;
      before = without + one->compute;
      after = with + one->compute;
    }
    // In doubt, loading: it leaves the engine's processors to others.
    if (blocks == 0 || cost <= least * kDoubt) {
      least = blocks == 0 ? cost : std::min(least, cost);
      choice.nanos = end;
      choice.blocks = blocks;
    }
    return end;
  };
  choice.nanos_if_none = consider(0, {});
  std::uint32_t blocks = 0;
  for (const Stretch& stretch : question.stretches) {
    blocks += stretch.blocks;
    choice.nanos_if_all = consider(blocks, stretch);
  }
  return choice;
}

}  // namespace flexkv::plan
