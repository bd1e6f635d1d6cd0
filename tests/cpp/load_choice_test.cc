// Load or compute: with the real node, client and agent in the simulated world, requests that come together are served
// under three policies: the node's choice (auto), loading all that is kept (always), and computing everything (never).
// In no cell of the grid may the choice take more than 3 % longer than the better of the two others, neither until all
// prompts are computed nor on average. FLEXKV_CELLS=1 prints every cell. See docs/decisions/0016.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "flexkv/base/log.h"
#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {
namespace {

constexpr double kAllowed = 1.03;
constexpr Nanos kPatience = 10'000 * kSecond;

enum class Policy { kAuto, kAlways, kNever };

struct Prefill {
  const char* name;
  plan::PrefillTime time;
  std::uint32_t step_tokens;  // at most, of all requests together
};
// Blocks of 4 tokens, 2 ms each.
constexpr Prefill kLinear = {"linear", {1e6, 5e5, 0, 0}, 4096};
constexpr Prefill kChunked = {"chunked", {4e6, 5e5, 0, 128}, 128};
constexpr Prefill kQuadratic = {"quadratic", {4e6, 2.5e5, 1300, 256}, 256};

struct Cell {
  Prefill prefill = kLinear;
  std::uint32_t blocks = 96;   // of each prompt,
  std::uint32_t stored = 96;   // of which so many lie on drives,
  std::uint32_t shared = 0;    // the first of them common to all prompts
  std::uint32_t requests = 1;  // at once
  bool prefetch = false;
  // What the drives take to read a prompt's worth of blocks, of what computing it takes.
  double slowness = 1;
  std::vector<double> drives = {1};  // each one's share of the speed
  Nanos changes_after = 0;           // from when the requests come; 0: never
  double new_slowness = 1;

  double prompt_nanos() const { return prefill.time.estimate(blocks * kBlockTokens, 0); }
  std::vector<Nanos> block_times(double slowness_now) const {
    std::vector<Nanos> times;
    for (const double share : drives) {
      times.push_back(static_cast<Nanos>(slowness_now * prompt_nanos() / blocks / share));
    }
    return times;
  }
};

struct Figures {
  double learning = 0;  // nanoseconds
  double mean = 0;
  double last = 0;
};

// Names of blocks: nothing but the prompt's number and the place tell them apart.
std::vector<std::uint32_t> chunks_of(std::uint32_t prompt, std::uint32_t begin, std::uint32_t end) {
  std::vector<std::uint32_t> chunks;
  for (std::uint32_t at = begin; at < end; ++at) chunks.push_back(prompt * 1000 + at + 1);
  return chunks;
}

class Run {
 public:
  Run(const Cell& cell, Policy policy) : cell_(cell), world_(plan_of(cell, policy)) {}

  Figures run() {
    store();
    Figures figures;
    figures.learning = learn();
    for (std::uint32_t i = 0; i < cell_.requests; ++i) prompts_.push_back(measured(i));
    if (cell_.changes_after > 0) {
      world_.loop().after(cell_.changes_after,
                          [this] { world_.script().block_times = cell_.block_times(cell_.new_slowness); });
    }
    const std::vector<double> times = serve(prompts_);
    figures.mean = std::accumulate(times.begin(), times.end(), 0.0) / static_cast<double>(times.size());
    figures.last = std::ranges::max(times);
    return figures;
  }

  // What the node chose, and from what.
  void print_choices() {
    const auto& [fixed, per_token, per_pair, step_tokens] = world_.node()->core().engines().at(0).prefill;
    std::printf("       prefill known as %.2f ms + %.2f us a token + %.1f ns a pair, %.0f tokens a step\n",
                fixed / kMillisecond, per_token / kMicrosecond, per_pair, step_tokens);
    for (const node::Choice& choice : world_.node()->core().choices()) {
      std::printf("       at %.1f ms: %u of %u host, %u coming, %u on drives; drives %.1f blocks/s after %.1f ms, "
                  "engine after %.1f ms: %.1f ms (all %.1f, none %.1f)\n",
                  static_cast<double>(choice.at) / kMillisecond, choice.chosen_blocks, choice.host_blocks,
                  choice.coming_blocks, choice.drive_blocks, choice.read_bytes_per_second / 4096,
                  choice.read_wait / kMillisecond, choice.engine_wait / kMillisecond, choice.expected / kMillisecond,
                  choice.expected_if_all / kMillisecond, choice.expected_if_none / kMillisecond);
    }
  }

 private:
  static SimPlan plan_of(const Cell& cell, Policy policy) {
    SimPlan plan;
    SimPlan::Kind kind;
    kind.engines = 1;
    plan.kinds = {kind};
    plan.engine_kinds = {0};
    const std::uint32_t most = 2 * (cell.requests + 4) * cell.blocks + 400;
    plan.device_blocks = most;
    plan.node.pool_bytes = std::uint64_t{most} * 4096;
    plan.node.disk_admission = false;
    plan.node.always_load = policy == Policy::kAlways;
    plan.node.load_timeout = plan.load_timeout = kPatience;
    plan.node.save_timeout = plan.save_timeout = kPatience;
    plan.running_max = 64;
    plan.arrivals = 0;
    plan.loads = policy != Policy::kNever;
    plan.prefetch_at_once = cell.prefetch;
    plan.embedded_port = true;
    plan.drives = static_cast<std::uint32_t>(cell.drives.size());
    plan.drive_slots = most;
    plan.disk_depth = 4096;
    plan.chunk_pieces = 8;
    plan.piece_time = 2 * kMicrosecond;
    return plan;
  }

  // All that is to lie on drives, in no time worth speaking of; then the node is another one.
  void store() {
    SimPlan& script = world_.script();
    script.forward_time = kMicrosecond;
    script.prefill_tokens_max = 1U << 20;
    script.block_times.assign(script.drives, kMicrosecond);
    world_.pass(10 * kMillisecond);
    for (std::uint32_t i = 0; i < cell_.requests; ++i) {
      auto chunks = measured(i);
      chunks.resize(cell_.stored);
      world_.engine(0).submit(chunks);
    }
    for (std::uint32_t i = 0; i < kLearned; ++i) world_.engine(0).submit(learned(i));
    world_.settle(kPatience);
    world_.restart_node();
    world_.pass(20 * kMillisecond);
    script.prefill = cell_.prefill.time;
    script.prefill_tokens_max = cell_.prefill.step_tokens;
    script.block_times = cell_.block_times(cell_.slowness);
  }

  // The learning phase: prompts that are kept nowhere, of all lengths, and then two that lie on drives, one by one.
  double learn() {
    double sum = 0;
    for (const std::uint32_t blocks : {8U, 64U, 32U, 96U, 48U, 16U}) {
      sum += serve({chunks_of(3000 + blocks, 0, blocks)})[0];
    }
    for (std::uint32_t i = 0; i < kLearned; ++i) sum += serve({learned(i)})[0];
    return sum;
  }

  // Times until the first token of each.
  std::vector<double> serve(const std::vector<std::vector<std::uint32_t>>& prompts) {
    SimEngine& engine = world_.engine(0);
    engine.forget_device_blocks();
    const Nanos begin = world_.loop().now();
    std::vector<std::uint64_t> ids;
    for (const auto& prompt : prompts) ids.push_back(engine.submit(prompt));
    world_.settle(kPatience);
    std::vector<double> times;
    for (const std::uint64_t id : ids) times.push_back(static_cast<double>(engine.first_token_at(id) - begin));
    return times;
  }

  std::vector<std::uint32_t> learned(std::uint32_t i) const { return chunks_of(2000 + i, 0, cell_.blocks); }
  std::vector<std::uint32_t> measured(std::uint32_t i) const {
    auto chunks = chunks_of(1000, 0, cell_.shared);
    const auto own = chunks_of(1 + i, cell_.shared, cell_.blocks);
    chunks.insert(chunks.end(), own.begin(), own.end());
    return chunks;
  }

  static constexpr std::uint32_t kLearned = 2;
  const Cell cell_;
  SimWorld world_;
  std::vector<std::vector<std::uint32_t>> prompts_;
};

std::string name_of(const Cell& cell) {
  char text[200];
  std::snprintf(text, sizeof text, "%s, %u blocks, %u on %zu drives, %u shared, %u requests%s, slowness %.2f",
                cell.prefill.name, cell.blocks, cell.stored, cell.drives.size(), cell.shared, cell.requests,
                cell.prefetch ? ", prefetched" : "", cell.slowness);
  return text;
}

struct Worst {
  double mean = 0;
  double last = 0;
  double learning = 0;
};

void check(const Cell& cell, Worst& worst) {
  static const bool all = std::getenv("FLEXKV_CELLS") != nullptr;
  Run run(cell, Policy::kAuto);
  const Figures chosen = run.run();
  const Figures always = Run(cell, Policy::kAlways).run();
  const Figures never = Run(cell, Policy::kNever).run();
  const double mean = chosen.mean / std::min(always.mean, never.mean);
  const double last = chosen.last / std::min(always.last, never.last);
  worst.mean = std::max(worst.mean, mean);
  worst.last = std::max(worst.last, last);
  worst.learning = std::max(worst.learning, chosen.learning / std::min(always.learning, never.learning));
  const bool ok = mean <= kAllowed && last <= kAllowed;
  if (all || !ok) {
    std::printf("%s %s: mean %.1f (always %.1f, never %.1f) ms, ratio %.3f; last %.1f (%.1f, %.1f), ratio %.3f\n",
                ok ? "    " : "SLOW", name_of(cell).c_str(), chosen.mean / kMillisecond, always.mean / kMillisecond,
                never.mean / kMillisecond, mean, chosen.last / kMillisecond, always.last / kMillisecond,
                never.last / kMillisecond, last);
    if (!ok) run.print_choices();
  }
  EXPECT_TRUE(ok) << name_of(cell);
}

void report(const Worst& worst) {
  std::printf("worst: mean %.3f, last %.3f, learning %.3f\n", worst.mean, worst.last, worst.learning);
}

constexpr double kSlowness[] = {0.05, 0.3, 0.7, 0.95, 1.05, 1.4, 3, 10};

class LoadChoice : public ::testing::Test {
 protected:
  void SetUp() override { set_log_level(LogLevel::kError); }
  void TearDown() override { report(worst_); }
  Worst worst_;
};

TEST_F(LoadChoice, OneDrive) {
  for (const Prefill& prefill : {kLinear, kChunked, kQuadratic}) {
    for (const std::uint32_t blocks : {16U, 96U}) {
      for (const std::uint32_t quarters : {4U, 2U}) {
        for (const std::uint32_t requests : {1U, 2U, 4U, 16U}) {
          for (const bool prefetch : {false, true}) {
            for (const double slowness : kSlowness) {
              Cell cell;
              cell.prefill = prefill;
              cell.blocks = blocks;
              cell.stored = blocks * quarters / 4;
              cell.requests = requests;
              cell.prefetch = prefetch;
              cell.slowness = slowness;
              check(cell, worst_);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flexkv::testing
