#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <vector>

#include "flexkv/base/prng.h"
#include "flexkv/plan/flow_rate.h"
#include "flexkv/plan/load_choice.h"

namespace flexkv::plan {
namespace {

double noise(Prng& prng, double share) { return 1 + share * (static_cast<double>(prng.below(2001)) / 1000.0 - 1); }

// Steps of a real mix: chunks of prefill at various depths, decodes beside them, and now and then a stalled machine.
PrefillTime learn(const PrefillTime& truth, Prng& prng, int steps) {
  PrefillCost cost;
  for (int i = 0; i < steps; ++i) {
    const auto tokens = static_cast<std::uint32_t>(1 + prng.below(8192));
    const double pairs = PrefillTime::pairs(tokens, static_cast<double>(prng.below(30'000)));
    double duration = (truth.fixed + truth.per_token * tokens + truth.per_pair * pairs) * noise(prng, 0.05);
    if (i > 10 && prng.below(20) == 0) duration *= 10;
    cost.observe(tokens, pairs, static_cast<Nanos>(duration));
  }
  return cost.time();
}

TEST(PrefillCost, LearnsWhatPrefillTakes) {
  Prng prng(7);
  for (const PrefillTime truth : {PrefillTime{5e6, 3e4, 0.4}, PrefillTime{2e7, 1e6, 20}, PrefillTime{1e6, 1e4, 0}}) {
    const PrefillTime learned = learn(truth, prng, 200);
    for (const double tokens : {1000.0, 8000.0, 20'000.0}) {
      const double expected = truth.estimate(tokens, 1000);
      EXPECT_NEAR(learned.estimate(tokens, 1000) / expected, 1, 0.15) << tokens;
    }
  }
}

TEST(PrefillCost, KnowsNothingFromFewStepsOrDecodes) {
  PrefillCost cost;
  for (int i = 0; i < 100; ++i) cost.observe(8, 8000, kMillisecond);
  EXPECT_FALSE(cost.time().known());
  for (int i = 0; i < 3; ++i) cost.observe(1000, 1e6, 30 * kMillisecond);
  EXPECT_FALSE(cost.time().known());
  cost.observe(1000, 1e6, 30 * kMillisecond);
  EXPECT_TRUE(cost.time().known());
}

RC_GTEST_PROP(PrefillCost, NeverExpectsLessThanNothing, ()) {
  PrefillCost cost;
  const auto steps = *rc::gen::container<std::vector<std::uint32_t>>(rc::gen::inRange(1U, 20'000U));
  for (const std::uint32_t step : steps) {
    cost.observe(step, PrefillTime::pairs(step, step % 977), static_cast<Nanos>(step % 13) * kMillisecond + 1);
  }
  const PrefillTime time = cost.time();
  RC_ASSERT(time.fixed >= 0 && time.per_token >= 0 && time.per_pair >= 0);
}

TEST(FlowRate, CountsBusyTimeOnly) {
  FlowRate flow;
  EXPECT_EQ(flow.bytes_per_second(), 0);
  Nanos now = kSecond;
  for (int i = 0; i < 50; ++i) {
    flow.begin(1'000'000, now);
    flow.begin(1'000'000, now);
    now += kMillisecond;
    flow.end(1'000'000, true, now);
    now += kMillisecond;
    flow.end(1'000'000, true, now);
    now += 100 * kMillisecond;  // idle
  }
  EXPECT_NEAR(flow.bytes_per_second() / 1e9, 1, 0.05);
  EXPECT_EQ(flow.waiting_bytes(), 0U);
}

TEST(FlowRate, FollowsADriveThatSlowsDown) {
  FlowRate flow;
  Nanos now = 0;
  const auto run = [&](Nanos each, int count) {
    for (int i = 0; i < count; ++i) {
      flow.begin(1'000'000, now);
      now += each;
      flow.end(1'000'000, true, now);
    }
  };
  run(kMillisecond, 10'000);
  run(10 * kMillisecond, 1'000);
  EXPECT_NEAR(flow.bytes_per_second() / 1e8, 1, 0.1);
}

TEST(FlowRate, IsTriedAgainAfterASlowSpell) {
  FlowRate flow;
  EXPECT_EQ(flow.expected_bytes_per_second(kSecond), 0);
  flow.begin(1'000'000, kSecond);
  EXPECT_EQ(flow.expected_bytes_per_second(3600 * kSecond), 0) << "it still waits";
  flow.end(1'000'000, true, 2 * kSecond);
  EXPECT_DOUBLE_EQ(flow.expected_bytes_per_second(2 * kSecond), flow.bytes_per_second());
  EXPECT_DOUBLE_EQ(flow.expected_bytes_per_second(182 * kSecond), 8 * flow.bytes_per_second());
  EXPECT_TRUE(std::isfinite(flow.expected_bytes_per_second(std::int64_t{100} * 365 * 86'400 * kSecond)));
}

// Against every possible place to stop.
RC_GTEST_PROP(ChooseLoad, IsTheBestPlaceToStop, ()) {
  std::vector<Stretch> stretches;
  std::vector<double> per_block;
  std::vector<double> wait;  // before each block
  const auto count = *rc::gen::inRange(1, 5);
  for (int i = 0; i < count; ++i) {
    const auto blocks = *rc::gen::inRange(1U, 40U);
    const double load = *rc::gen::inRange(1, 2'000'000);
    const double first = *rc::gen::inRange(0, 5'000'000);
    stretches.push_back({blocks, load, first});
    per_block.insert(per_block.end(), blocks, load);
    wait.push_back(first);
    wait.insert(wait.end(), blocks - 1, 0);
  }
  LoadQuestion question;
  question.stretches = stretches;
  question.block_tokens = 16;
  question.prompt_blocks = static_cast<std::uint32_t>(per_block.size()) + *rc::gen::inRange(0U, 40U);
  question.prefill = {1e6, static_cast<double>(*rc::gen::inRange(1, 100'000)), *rc::gen::inRange(0, 100) / 10.0};

  const auto cost = [&](std::uint32_t blocks) {
    double load = 0;
    for (std::uint32_t i = 0; i < blocks; ++i) load += wait[i] + per_block[i];
    const double left = (question.prompt_blocks - blocks) * 16.0;
    return load + question.prefill.estimate(left < 1 ? 1 : left, blocks * 16.0);
  };
  double best = cost(0);
  for (std::uint32_t blocks = 1; blocks <= per_block.size(); ++blocks) best = std::min(best, cost(blocks));
  const LoadChoice choice = choose_load(question);
  RC_ASSERT(choice.nanos <= best * 1.0001 + 1);
  RC_ASSERT(std::abs(choice.nanos - cost(choice.blocks)) <= best * 1e-6 + 1);
}

TEST(ChooseLoad, LoadsAllWhileItDoesNotKnowBetter) {
  const Stretch stretches[] = {{10, 1e6, 0}, {20, 1e9, 0}};
  LoadQuestion question;
  question.stretches = stretches;
  question.prompt_blocks = 30;
  question.block_tokens = 16;
  EXPECT_EQ(choose_load(question).blocks, 30U);
  question.prefill = {1e6, 1e6, 0};  // a block takes 16 ms to compute
  EXPECT_EQ(choose_load(question).blocks, 10U);
}

}  // namespace
}  // namespace flexkv::plan
