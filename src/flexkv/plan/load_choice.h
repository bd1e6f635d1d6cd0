// How much of a matched prefix to load, and how much to compute anew. Pure functions, thread-safe.
//
// The blocks that are loaded come first, the rest of the prompt is computed behind them. The further back a block, the
// more it costs to compute (it attends to all before it), while one from the same tier costs the same to load: within a
// stretch of blocks of one tier the best place to stop is one of its ends. So only the ends are compared.
//
// An engine computes one prompt after the other, and drives read for one after the other. So what a prompt takes of
// them keeps others waiting: prompts whose blocks arrive meanwhile, and those that come next. Their delay is part of
// the cost.
#pragma once

#include <cstdint>
#include <span>

#include "flexkv/plan/prefill_cost.h"

namespace flexkv::plan {

// All times are nanoseconds from now.
struct Stretch {
  std::uint32_t blocks = 0;
  double arrives = 0;  // when the last of them is in host memory, and all before it
  double reading = 0;  // for how long drives read for it, from the first stretch to the end of this one
};

// A prompt of the same engine that waits for its blocks.
struct Arrival {
  double arrives = 0;
  double compute = 0;  // what the engine has to do for it then
};

struct LoadQuestion {
  std::span<const Stretch> stretches;  // in their order in the prompt
  std::uint32_t block_tokens = 0;
  std::uint32_t prompt_blocks = 0;  // all of its whole blocks, matched or not
  std::uint32_t engine_blocks = 0;  // leading ones, not more, that the engine has itself
  PrefillTime prefill;
  double engine_free = 0;             // when the engine has computed what it was given before
  std::span<const Arrival> arrivals;  // the earliest first
  std::uint32_t behind = 0;           // prompts that wait for their turn
};

struct LoadChoice {
  std::uint32_t blocks = 0;  // to load
  double nanos = 0;          // expected until the prompt is computed; 0: prefill is not known, and all is loaded
  double nanos_if_all = 0;
  double nanos_if_none = 0;
};

LoadChoice choose_load(const LoadQuestion& question);

}  // namespace flexkv::plan
