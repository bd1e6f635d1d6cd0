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
  for (const PrefillTime truth :
       {PrefillTime{5e6, 3e4, 0.4, 0}, PrefillTime{2e7, 1e6, 20, 0}, PrefillTime{1e6, 1e4, 0, 0}}) {
    const PrefillTime learned = learn(truth, prng, 200);
    for (const double tokens : {1000.0, 8000.0, 20'000.0}) {
      const double expected =
          PrefillTime{truth.fixed, truth.per_token, truth.per_pair, learned.step_tokens}.estimate(tokens, 1000);
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

TEST(FlowRate, AFewTransfersTellThatASlowSpellIsOver) {
  FlowRate flow;
  Nanos now = kSecond;
  const auto run = [&](Nanos each, int count) {
    for (int i = 0; i < count; ++i) {
      flow.begin(1'000'000, now);
      now += each;
      flow.end(1'000'000, true, now);
    }
  };
  run(kSecond, 10);
  EXPECT_NEAR(flow.bytes_per_second() / 1e6, 1, 0.01);
  now += 3600 * kSecond;
  EXPECT_NEAR(flow.bytes_per_second() / 1e6, 1, 0.01) << "still known";
  run(kMillisecond, 16);
  EXPECT_GT(flow.bytes_per_second() / 1e6, 500);
}

TEST(FlowRate, KnowsWhatIsStillToCome) {
  FlowRate flow;
  flow.begin(100, 0);
  const std::uint64_t position = flow.begun_bytes();
  flow.begin(50, 0);
  EXPECT_EQ(flow.waiting_bytes(), 150U);
  EXPECT_EQ(flow.waiting_bytes_until(position), 100U);
  EXPECT_EQ(flow.idle(kSecond), 0);
  flow.end(100, true, kSecond);
  EXPECT_EQ(flow.waiting_bytes_until(position), 0U);
  flow.end(50, true, 2 * kSecond);
  EXPECT_EQ(flow.idle(5 * kSecond), 3 * kSecond);
}

// Against every possible place to stop, for an engine that has nothing else to do.
RC_GTEST_PROP(ChooseLoad, IsTheBestPlaceToStop, ()) {
  std::vector<Stretch> stretches;
  std::vector<double> arrives{0};  // of so many blocks
  const auto count = *rc::gen::inRange(1, 5);
  for (int i = 0; i < count; ++i) {
    const auto blocks = *rc::gen::inRange(1U, 40U);
    const double load = *rc::gen::inRange(1, 2'000'000);
    const double first = *rc::gen::inRange(0, 5'000'000);
    const double begin = arrives.back() + first;
    for (std::uint32_t block = 1; block <= blocks; ++block) arrives.push_back(begin + block * load);
    stretches.push_back({blocks, arrives.back(), 0});
  }
  LoadQuestion question;
  question.stretches = stretches;
  question.block_tokens = 16;
  question.prompt_blocks = static_cast<std::uint32_t>(arrives.size() - 1) + *rc::gen::inRange(0U, 40U);
  question.prefill = {1e6, static_cast<double>(*rc::gen::inRange(1, 100'000)), *rc::gen::inRange(0, 100) / 10.0, 0};

  const auto cost = [&](std::size_t blocks) {
    const double loaded = static_cast<double>(blocks) * 16.0;
    const double left = question.prompt_blocks * 16.0 - loaded;
    return arrives[blocks] + question.prefill.estimate(left < 1 ? 1 : left, loaded);
  };
  double best = cost(0);
  for (std::size_t blocks = 1; blocks < arrives.size(); ++blocks) best = std::min(best, cost(blocks));
  const LoadChoice choice = choose_load(question);
  RC_ASSERT(choice.nanos <= best * 1.02 + 1);
  RC_ASSERT(std::abs(choice.nanos - cost(choice.blocks)) <= best * 1e-6 + 1);
}

class ChooseAmongOthers : public ::testing::Test {
 protected:
  // Ten blocks of 16 tokens, 16 ms each to compute; `arrives` in milliseconds.
  std::uint32_t choose(double arrives) {
    const Stretch stretch{10, arrives * kMillisecond, arrives * kMillisecond};
    question.stretches = {&stretch, 1};
    question.block_tokens = 16;
    question.prompt_blocks = 10;
    question.prefill = {0, 1e6, 0, 0};
    return choose_load(question).blocks;
  }
  LoadQuestion question;
};

TEST_F(ChooseAmongOthers, WhatArrivesWhileTheEngineIsBusyCostsNothing) {
  EXPECT_EQ(choose(170), 0U);
  question.engine_free = 100 * kMillisecond;
  EXPECT_EQ(choose(170), 10U);
}

TEST_F(ChooseAmongOthers, ComputingKeepsWaitingWhoseBlocksArriveMeanwhile) {
  const Arrival soon{100 * kMillisecond, 1 * kMillisecond};
  const Arrival late{1000 * kMillisecond, 1 * kMillisecond};
  question.arrivals = {&late, 1};
  EXPECT_EQ(choose(170), 0U);
  question.arrivals = {&soon, 1};
  EXPECT_EQ(choose(170), 10U);
  EXPECT_EQ(choose(300), 0U);
}

TEST_F(ChooseAmongOthers, ThoseBehindWaitForTheLesserOfEngineAndDrives) {
  question.behind = 20;
  EXPECT_EQ(choose(150), 10U);
  EXPECT_EQ(choose(170), 0U);
  // Half of the prompt, in almost the time that computing that half takes: slower for itself, not for those behind.
  const Stretch half{5, 100 * kMillisecond, 85 * kMillisecond};
  question.stretches = {&half, 1};
  EXPECT_EQ(choose_load(question).blocks, 5U);
  question.behind = 0;
  EXPECT_EQ(choose_load(question).blocks, 0U);
}

TEST(ChooseLoad, LoadsAllWhileItDoesNotKnowBetter) {
  const Stretch stretches[] = {{10, 10e6, 10e6}, {20, 20e9, 20e9}};
  LoadQuestion question;
  question.stretches = stretches;
  question.prompt_blocks = 30;
  question.block_tokens = 16;
  EXPECT_EQ(choose_load(question).blocks, 30U);
  question.prefill = {1e6, 1e6, 0, 0};  // a block takes 16 ms to compute
  EXPECT_EQ(choose_load(question).blocks, 10U);
}

}  // namespace
}  // namespace flexkv::plan
