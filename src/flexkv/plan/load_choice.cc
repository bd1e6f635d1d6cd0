#include "flexkv/plan/load_choice.h"

namespace flexkv::plan {

LoadChoice choose_load(const LoadQuestion& question) {
  LoadChoice choice;
  for (const Stretch& stretch : question.stretches) choice.blocks += stretch.blocks;
  if (!question.prefill.known() || choice.blocks == 0) return choice;
  const double tokens = double{1} * question.block_tokens;
  const auto compute_behind = [&](std::uint32_t blocks) {
    const double left = (question.prompt_blocks - blocks) * tokens;
    // Even a prompt that is loaded whole has its last token computed.
    return question.prefill.estimate(left < 1 ? 1 : left, blocks * tokens);
  };
  choice.nanos_if_none = compute_behind(0);
  choice.nanos = choice.nanos_if_none;
  choice.blocks = 0;
  std::uint32_t blocks = 0;
  double loading = 0;
  for (const Stretch& stretch : question.stretches) {
    blocks += stretch.blocks;
    loading += stretch.wait + stretch.blocks * stretch.load_per_block;
    choice.nanos_if_all = loading + compute_behind(blocks);
    // In doubt, loading: it leaves the engine's processors to others.
    if (choice.nanos_if_all <= choice.nanos) {
      choice.nanos = choice.nanos_if_all;
      choice.blocks = blocks;
    }
  }
  return choice;
}

}  // namespace flexkv::plan
