#include "flexkv/plan/load_choice.h"

#include <algorithm>

namespace flexkv::plan {

LoadChoice choose_load(const LoadQuestion& question) {
  LoadChoice choice;
  for (const Stretch& stretch : question.stretches) choice.blocks += stretch.blocks;
  if (!question.prefill.known() || choice.blocks == 0) return choice;
  const double tokens = double{1} * question.block_tokens;
  double least = 0;  // cost: of this prompt's time, and of the others'
  const auto consider = [&](std::uint32_t blocks, double arrives) {
    const double left = (question.prompt_blocks - blocks) * tokens;
    const double begin = std::max(arrives, question.engine_free);
    // Even a prompt that is loaded whole has its last token computed.
    const double end = begin + question.prefill.estimate(left < 1 ? 1 : left, blocks * tokens);
    double cost = end;
    for (const double other : question.others) cost += std::max(end - std::max(other, begin), 0.0);
    // In doubt, loading: it leaves the engine's processors to others.
    if (blocks == 0 || cost <= least) {
      least = cost;
      choice.nanos = end;
      choice.blocks = blocks;
    }
    return end;
  };
  choice.nanos_if_none = consider(0, 0);
  std::uint32_t blocks = 0;
  for (const Stretch& stretch : question.stretches) {
    blocks += stretch.blocks;
    choice.nanos_if_all = consider(blocks, stretch.arrives);
  }
  return choice;
}

}  // namespace flexkv::plan
