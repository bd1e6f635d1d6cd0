#include "flexkv/server/read_choice.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "flexkv/base/prng.h"

namespace flexkv::server {
namespace {

constexpr double kWorth = 100;

TEST(ReadChoice, ALittleMoreBehindASlowPlaceDoesNotWin) {
  const std::vector<ReadPlace> places{{100, 0, 1, 0}, {104, 0, 50, 0}};
  const ReadChoice choice = choose_read(places, kWorth);
  EXPECT_EQ(choice.first, 0U);
  EXPECT_EQ(choice.then, 1U) << "the four more take less than they are worth";
  EXPECT_EQ(choice.blocks, 104U);
  EXPECT_DOUBLE_EQ(choice.reading, 300);
  // Not from there, if it is far away.
  const std::vector<ReadPlace> far{{100, 0, 1, 0}, {104, 1000, 50, 0}};
  EXPECT_FALSE(choose_read(far, kWorth).then);
  EXPECT_EQ(choose_read(far, kWorth).blocks, 100U);
  // But where nobody says what they are worth.
  EXPECT_EQ(choose_read(far, 0).first, 0U);
  EXPECT_EQ(choose_read(far, 0).then, 1U);
}

TEST(ReadChoice, MuchMoreWins) {
  const std::vector<ReadPlace> places{{10, 0, 1, 0}, {100, 0, 2, 0}};
  EXPECT_EQ(choose_read(places, kWorth).first, 1U);
  EXPECT_FALSE(choose_read(places, kWorth).then) << "two places are worth it only if that saves something";
}

TEST(ReadChoice, DistanceMattersForLittleAndSpeedForMuch) {
  std::vector<ReadPlace> places{{2, 100, 1, 0}, {2, 0, 10, 1}};
  EXPECT_EQ(choose_read(places, kWorth).first, 1U);
  for (ReadPlace& place : places) place.blocks = 1000;
  EXPECT_EQ(choose_read(places, kWorth).first, 0U);
}

TEST(ReadChoice, ReadersSpreadOverPlacesThatAreAlike) {
  std::vector<int> taken(4);
  Prng random(1);
  for (int i = 0; i < 1000; ++i) {
    std::vector<ReadPlace> places(4, {10, 5, 1, 0});
    for (ReadPlace& place : places) {
      place.per_block = 1 + static_cast<double>(random.below(5)) / 100;
      place.order = random.next();
    }
    ++taken[choose_read(places, i % 2 == 0 ? kWorth : 0).first];
  }
  for (const int count : taken) EXPECT_GT(count, 150);
}

// Against all that could be chosen.
TEST(ReadChoice, IsHardlyWorseThanTheBest) {
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    Prng random(seed);
    std::vector<ReadPlace> places(1 + random.below(6));
    std::uint32_t most = 0;
    for (ReadPlace& place : places) {
      place = {static_cast<std::uint32_t>(1 + random.below(20)), static_cast<double>(random.below(100)),
               static_cast<double>(1 + random.below(30)), random.next()};
      most = std::max(most, place.blocks);
    }
    const double worth = random.chance(30) ? 0 : static_cast<double>(1 + random.below(100));
    const auto cost = [&](std::uint32_t blocks, double time) { return time + (most - blocks) * worth; };
    double least = 1e18;
    for (const ReadPlace& a : places) {
      if (worth > 0 || a.blocks == most) least = std::min(least, cost(a.blocks, a.wait + a.blocks * a.per_block));
      for (const ReadPlace& b : places) {
        if (b.blocks <= a.blocks || (worth <= 0 && b.blocks < most)) continue;
        const double time = a.wait + a.blocks * a.per_block + b.wait + (b.blocks - a.blocks) * b.per_block;
        least = std::min(least, cost(b.blocks, time));
      }
    }
    const ReadChoice choice = choose_read(places, worth);
    ASSERT_LT(choice.first, places.size());
    ASSERT_TRUE(worth > 0 || choice.blocks == most) << "seed " << seed;
    ASSERT_EQ(choice.blocks, places[choice.then.value_or(choice.first)].blocks);
    ASSERT_LE(cost(choice.blocks, choice.wait + choice.reading), least * 1.1 * 1.1 + 1e-9) << "seed " << seed;
  }
}

}  // namespace
}  // namespace flexkv::server
