#include "flexkv/admission/admission_filter.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include "flexkv/base/prng.h"

namespace flexkv::admission {
namespace {

using Keys = std::vector<key::BlockKey>;

Keys fresh_keys(Prng& prng, std::size_t count) {
  Keys keys(count);
  for (auto& key : keys) key = {prng.next(), prng.next()};
  return keys;
}

Origin prompt_of(std::size_t blocks) { return {0, static_cast<std::uint32_t>(blocks), 0, nullptr}; }

TEST(AdmissionFilter, SwitchedOffAdmitsEverythingAndRemembersNothing) {
  AdmissionFilter filter({.enabled = false});
  Prng prng(1);
  const Keys keys = fresh_keys(prng, 10);
  filter.on_save(keys, prompt_of(10));
  EXPECT_EQ(filter.admit(keys, 1).count, 10u);
  EXPECT_EQ(filter.memory_bytes(), 0u);
}

TEST(AdmissionFilter, AdmitsNewBlocksUntilItKnowsBetter) {
  AdmissionFilter filter({});
  Prng prng(1);
  const Keys keys = fresh_keys(prng, 100);
  filter.on_save(keys, prompt_of(100));
  EXPECT_EQ(filter.admit(keys, 0).count, 100u);
}

TEST(AdmissionFilter, PressureAsksForUses) {
  AdmissionFilter filter({});
  Prng prng(1);
  const Keys keys = fresh_keys(prng, 4);
  filter.on_save(keys, prompt_of(4));
  EXPECT_EQ(filter.admit(keys, 0.5).why, Refusal::kOnce);
  filter.on_hit(keys);
  EXPECT_EQ(filter.admit(keys, 0.5).count, 4u);
  EXPECT_EQ(filter.admit(keys, 0.75).why, Refusal::kRare);
  filter.on_hit(keys);
  EXPECT_EQ(filter.admit(keys, 0.75).count, 4u);
  EXPECT_EQ(filter.admit(keys, 1).why, Refusal::kRare);
  for (int i = 0; i < 7; ++i) filter.on_hit(keys);
  EXPECT_EQ(filter.admit(keys, 1).count, 4u);
}

TEST(AdmissionFilter, NothingIsAdmittedBehindARefusedBlock) {
  AdmissionFilter filter({});
  Prng prng(1);
  const Keys keys = fresh_keys(prng, 6);
  filter.on_save(keys, prompt_of(6));
  filter.on_hit(std::span(keys).first(2));
  filter.on_hit(std::span(keys).last(2));
  const auto verdict = filter.admit(keys, 0.5);
  EXPECT_EQ(verdict.count, 2u);
  EXPECT_EQ(verdict.why, Refusal::kOnce);
  EXPECT_EQ(filter.stats().admitted, 2u);
  EXPECT_EQ(filter.stats().refused_once, 4u);
}

// Short prompts come back once, long ones never: the filter has to find out.
TEST(AdmissionFilter, LearnsWhatIsUsedAgain) {
  AdmissionFilter filter({.remembered_blocks = 1 << 20});
  Prng prng(1);
  std::uint64_t short_admitted = 0;
  std::uint64_t long_admitted = 0;
  constexpr int kRounds = 4000;
  for (int round = 0; round < kRounds; ++round) {
    const Keys brief = fresh_keys(prng, 4);
    filter.on_save(brief, prompt_of(4));
    const Keys lengthy = fresh_keys(prng, 64);
    filter.on_save(lengthy, prompt_of(64));
    const auto a = filter.admit(brief, 0).count;
    const auto b = filter.admit(lengthy, 0).count;
    if (round >= kRounds / 2) short_admitted += a, long_admitted += b;
    if (a == brief.size()) filter.on_hit(brief);
  }
  EXPECT_EQ(short_admitted, kRounds / 2 * 4u);
  EXPECT_LT(long_admitted, kRounds / 2 * 64u / 20);
}

// After a restart drives bring back blocks that the filter has not seen come in: their hits say nothing of new blocks.
TEST(AdmissionFilter, HitsOfRecoveredBlocksDoNotSpeakAgainstNewOnes) {
  AdmissionFilter filter({.remembered_blocks = 1 << 20});
  Prng prng(1);
  const Keys recovered = fresh_keys(prng, 100'000);
  filter.on_hit(recovered);
  EXPECT_EQ(filter.admit(recovered, 0.5).count, recovered.size());
  std::size_t admitted = 0;
  for (int i = 0; i < 50; ++i) {
    const Keys keys = fresh_keys(prng, 100);
    filter.on_save(keys, prompt_of(100));
    admitted += filter.admit(keys, 0).count;
  }
  EXPECT_EQ(admitted, 5000u);
}

// Blocks come back or not by pure chance, so that refusing always costs: the loss is held where it was asked for.
TEST(AdmissionFilter, HoldsLostHitsBelowTheShareAskedFor) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    Prng prng(seed);
    AdmissionFilter filter({.remembered_blocks = 1 << 20, .lost_hits_max = 0.05});
    const auto percent = static_cast<unsigned>(10 + prng.below(60));
    for (int round = 0; round < 4000; ++round) {
      const Keys keys = fresh_keys(prng, 1 + prng.below(60));
      filter.on_save(keys, prompt_of(keys.size()));
      const std::size_t kept = filter.admit(keys, 0).count;
      if (!prng.chance(percent)) continue;
      filter.on_hit(std::span(keys).first(kept));
      const auto at = static_cast<std::uint32_t>(kept);
      filter.on_save(std::span(keys).subspan(kept), {at, static_cast<std::uint32_t>(keys.size()), at, nullptr});
    }
    const auto& stats = filter.stats();
    RC_ASSERT(static_cast<double>(stats.lost_hits) <= 0.08 * static_cast<double>(stats.hits + stats.lost_hits) + 2000);
  }));
}

// Engines call 16 tokens a block, or more: the same prompts have to be judged alike.
TEST(AdmissionFilter, LearnsAsMuchFromATokenWhateverTheBlocks) {
  constexpr std::uint32_t kParts = 32;
  AdmissionFilter large({.remembered_blocks = 1 << 20, .block_tokens = 512});
  AdmissionFilter small({.remembered_blocks = 1 << 20, .block_tokens = 512 / kParts});
  const auto serve = [](AdmissionFilter& filter, const Keys& keys, bool again) {
    filter.on_save(keys, prompt_of(keys.size()));
    const std::size_t kept = filter.admit(keys, 0).count;
    if (again) filter.on_hit(std::span(keys).first(kept));
    const auto at = static_cast<std::uint32_t>(kept);
    if (again) {
      filter.on_save(std::span(keys).subspan(kept), {at, static_cast<std::uint32_t>(keys.size()), at, nullptr});
    }
  };
  Prng prng(1);
  double threshold_max = 0;
  for (int round = 0; round < 2000; ++round) {
    const std::size_t blocks = 1 + prng.below(60);
    const bool again = prng.chance(blocks < 20 ? 60 : 5);
    serve(large, fresh_keys(prng, blocks), again);
    serve(small, fresh_keys(prng, blocks * kParts), again);
    threshold_max = std::max(threshold_max, large.threshold());
    ASSERT_NEAR(small.threshold(), large.threshold(), 0.15) << "round " << round;
  }
  EXPECT_GT(threshold_max, 0.2);
  const auto admitted = [](const AdmissionFilter& filter) {
    const auto& stats = filter.stats();
    return static_cast<double>(stats.admitted) / static_cast<double>(stats.admitted + stats.refused_unlikely);
  };
  EXPECT_LT(admitted(large), 0.95);
  EXPECT_NEAR(admitted(small), admitted(large), 0.05);
}

TEST(AdmissionFilter, MemoryIsBoundedAndForgettingIsSafe) {
  AdmissionFilter filter({.remembered_blocks = 1024});
  const std::size_t bytes = filter.memory_bytes();
  EXPECT_LE(bytes, 1024u * 8 + 24 * 1024);
  Prng prng(1);
  const Keys first = fresh_keys(prng, 16);
  filter.on_save(first, prompt_of(16));
  filter.on_hit(first);
  for (int i = 0; i < 1000; ++i) filter.on_save(fresh_keys(prng, 64), prompt_of(64));
  EXPECT_EQ(filter.memory_bytes(), bytes);
  EXPECT_EQ(filter.admit(first, 0.5).why, Refusal::kOnce);
}

}  // namespace
}  // namespace flexkv::admission
