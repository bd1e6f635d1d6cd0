// Load or compute: with the real node, client and agent in the simulated world, requests that come together are served
// under three policies: the node's choice (auto), loading all that is kept (always), and computing everything (never).
// The choice may not take more than 3 % longer than the better of the two others, neither until all prompts are
// computed nor on average. Where it misses that, and why, is in docs/decisions/0016; here such cells are counted, and
// bounded by their kind. FLEXKV_CELLS=1 prints every cell.
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
  std::uint32_t waves = 1;           // of so many requests; one begins two seconds after the one before has ended
  Nanos changes_after = 0;           // from when the first requests come; 0: never
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

// In nanoseconds.
struct Wave {
  double mean = 0;
  double last = 0;
};
struct Figures {
  double learning = 0;
  std::vector<Wave> waves;
};

// Names of blocks: nothing but the prompt's number and the place tell them apart.
std::vector<std::uint32_t> chunks_of(std::uint32_t prompt, std::uint32_t begin, std::uint32_t end) {
  std::vector<std::uint32_t> chunks;
  for (std::uint32_t at = begin; at < end; ++at) chunks.push_back(prompt * 1000 + at + 1);
  return chunks;
}

class Trial {
 public:
  Trial(const Cell& cell, Policy policy) : cell_(cell), world_(plan_of(cell, policy)) {}

  Figures run() {
    store();
    Figures figures;
    figures.learning = learn();
    if (cell_.changes_after > 0) {
      world_.loop().after(cell_.changes_after,
                          [this] { world_.script().block_times = cell_.block_times(cell_.new_slowness); });
    }
    for (std::uint32_t wave = 0; wave < cell_.waves; ++wave) {
      if (wave > 0) world_.pass(2 * kSecond);
      std::vector<std::vector<std::uint32_t>> prompts;
      for (std::uint32_t i = 0; i < cell_.requests; ++i) prompts.push_back(measured(wave * cell_.requests + i));
      const std::vector<double> times = serve(prompts);
      const double sum = std::accumulate(times.begin(), times.end(), 0.0);
      figures.waves.push_back({sum / static_cast<double>(times.size()), std::ranges::max(times)});
    }
    return figures;
  }

  // What the node chose, and from what.
  void print_choices() {
    const auto [fixed, per_token, per_pair, step_tokens] = world_.node()->core().engines().at(0).prefill;
    std::printf("       prefill known as %.2f ms + %.2f us a token + %.1f ns a pair, %.0f tokens a step\n",
                fixed / kMillisecond, per_token / kMicrosecond, per_pair, step_tokens);
    for (const node::Choice& choice : world_.node()->core().choices()) {
      std::printf(
          "       at %.1f ms: %u of %u engine, %u host, %u coming, %u on drives; drives %.1f blocks/s after %.1f ms, "
          "engine after %.1f ms, %u behind: %.1f ms (all %.1f, none %.1f)\n",
          static_cast<double>(choice.at) / kMillisecond, choice.chosen_blocks, choice.engine_blocks, choice.host_blocks,
          choice.coming_blocks, choice.drive_blocks, choice.read_bytes_per_second / 4096,
          choice.read_wait / kMillisecond, choice.engine_wait / kMillisecond, choice.behind,
          choice.expected / kMillisecond, choice.expected_if_all / kMillisecond,
          choice.expected_if_none / kMillisecond);
    }
  }

 private:
  static SimPlan plan_of(const Cell& cell, Policy policy) {
    SimPlan plan;
    SimPlan::Kind kind;
    kind.engines = 1;
    plan.kinds = {kind};
    plan.engine_kinds = {0};
    const std::uint32_t most = 2 * (cell.requests * cell.waves + 4) * cell.blocks + 400;
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
    for (std::uint32_t i = 0; i < cell_.requests * cell_.waves; ++i) {
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
};

std::string name_of(const Cell& cell) {
  char text[200];
  std::snprintf(text, sizeof text, "%s, %u blocks, %u on %zu drives, %u shared, %u requests%s, slowness %.2f",
                cell.prefill.name, cell.blocks, cell.stored, cell.drives.size(), cell.shared, cell.requests,
                cell.prefetch ? ", prefetched" : "", cell.slowness);
  return text;
}

struct Ratio {
  double mean = 0;
  double last = 0;
  bool ok() const { return mean <= kAllowed && last <= kAllowed; }
};

// At worst; see docs/decisions/0016 for how many cells of each kind miss kAllowed.
double bound_of(const Cell& cell) {
  if (cell.requests == 1 || cell.shared > 0) return kAllowed;
  if (!cell.prefetch) return 1.81;  // the node cannot know who waits behind a request
  if (cell.stored < cell.blocks) return 1.10;
  return kAllowed;
}

class LoadChoice : public ::testing::Test {
 protected:
  void SetUp() override { set_log_level(LogLevel::kError); }
  void TearDown() override {
    std::printf("%d cells, %d missed, worst: mean %.3f, last %.3f; learning %.3f\n", cells_, missed_, worst_.mean,
                worst_.last, learning_);
  }

  // Of each wave, to the better of the two extremes.
  std::vector<Ratio> compare(const Cell& cell) {
    static const bool all = std::getenv("FLEXKV_CELLS") != nullptr;
    Trial run(cell, Policy::kAuto);
    const Figures chosen = run.run();
    const Figures always = Trial(cell, Policy::kAlways).run();
    const Figures never = Trial(cell, Policy::kNever).run();
    learning_ = std::max(learning_, chosen.learning / std::min(always.learning, never.learning));
    ++cells_;
    std::vector<Ratio> ratios;
    for (std::size_t i = 0; i < chosen.waves.size(); ++i) {
      const Wave& wave = chosen.waves[i];
      const Wave& a = always.waves[i];
      const Wave& n = never.waves[i];
      ratios.push_back({wave.mean / std::min(a.mean, n.mean), wave.last / std::min(a.last, n.last)});
      if (!all && ratios.back().ok()) continue;
      std::printf("%s %s: mean %.1f (always %.1f, never %.1f) ms, ratio %.3f; last %.1f (%.1f, %.1f), ratio %.3f\n",
                  ratios.back().ok() ? "    " : "SLOW", name_of(cell).c_str(), wave.mean / kMillisecond,
                  a.mean / kMillisecond, n.mean / kMillisecond, ratios.back().mean, wave.last / kMillisecond,
                  a.last / kMillisecond, n.last / kMillisecond, ratios.back().last);
      if (!ratios.back().ok() && cell.waves == 1) run.print_choices();
    }
    return ratios;
  }

  void check(const Cell& cell) {
    // Where simulations are told to do with fewer seeds, as under sanitizers: one cell in seven.
    static const bool few = std::getenv("FLEXKV_SEEDS") != nullptr;
    if (few && asked_++ % 7 != 0) return;
    const Ratio ratio = compare(cell).at(0);
    worst_.mean = std::max(worst_.mean, ratio.mean);
    worst_.last = std::max(worst_.last, ratio.last);
    missed_ += !ratio.ok();
    EXPECT_LE(ratio.mean, bound_of(cell)) << name_of(cell);
    EXPECT_LE(ratio.last, bound_of(cell)) << name_of(cell);
  }

  Ratio worst_;
  double learning_ = 0;
  int asked_ = 0;
  int cells_ = 0;
  int missed_ = 0;
};

constexpr double kSlowness[] = {0.05, 0.3, 0.7, 0.95, 1.05, 1.4, 3, 10};

TEST_F(LoadChoice, OneDrive) {
  for (const Prefill& prefill : {kLinear, kChunked, kQuadratic}) {
    for (const std::uint32_t blocks : {32U, 96U}) {
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
              check(cell);
            }
          }
        }
      }
    }
  }
  EXPECT_LE(missed_, 24);  // of 768
}

TEST_F(LoadChoice, SharedPrefixes) {
  for (const Prefill& prefill : {kChunked, kQuadratic}) {
    for (const std::uint32_t shared : {48U, 96U}) {
      for (const std::uint32_t requests : {2U, 16U}) {
        for (const bool prefetch : {false, true}) {
          for (const double slowness : kSlowness) {
            Cell cell;
            cell.prefill = prefill;
            cell.shared = shared;
            cell.requests = requests;
            cell.prefetch = prefetch;
            cell.slowness = slowness;
            check(cell);
          }
        }
      }
    }
  }
  EXPECT_EQ(missed_, 0);
}

TEST_F(LoadChoice, TwoDrives) {
  for (const std::vector<double>& drives : {std::vector<double>{0.5, 0.5}, std::vector<double>{0.8, 0.2}}) {
    for (const std::uint32_t requests : {1U, 4U, 16U}) {
      for (const bool prefetch : {false, true}) {
        for (const double slowness : kSlowness) {
          Cell cell;
          cell.prefill = kChunked;
          cell.drives = drives;
          cell.requests = requests;
          cell.prefetch = prefetch;
          cell.slowness = slowness;
          check(cell);
        }
      }
    }
  }
}

// While the first requests are served, the drive becomes ten times slower, or faster. That cannot be known, and who
// computes learns of it only from what is tried; after a few requests the choice is right again.
TEST_F(LoadChoice, TheSpeedChanges) {
  for (const auto& [before, after] : {std::pair{0.3, 3.0}, std::pair{3.0, 0.3}}) {
    for (const std::uint32_t requests : {1U, 4U}) {
      Cell cell;
      cell.prefill = kChunked;
      cell.requests = requests;
      cell.prefetch = true;
      cell.slowness = before;
      cell.new_slowness = after;
      cell.changes_after = 20 * kMillisecond;
      cell.waves = 8;
      const std::vector<Ratio> ratios = compare(cell);
      for (std::size_t wave = 4; wave < ratios.size(); ++wave) {
        EXPECT_TRUE(ratios[wave].ok()) << name_of(cell) << ", wave " << wave;
      }
    }
  }
}

}  // namespace
}  // namespace flexkv::testing
