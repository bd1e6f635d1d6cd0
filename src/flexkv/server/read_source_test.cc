#include "flexkv/server/read_source.h"

#include <gtest/gtest.h>

#include "flexkv/base/prng.h"

namespace flexkv::server {
namespace {

constexpr std::uint64_t kBlock = 1 << 20;

class ReadSourceTest : public ::testing::Test {
 protected:
  // All of it comes, the first block after `first`, then one after each `each`.
  void read(Nanos first, Nanos each, std::uint32_t blocks, Tier tier = Tier::kMemory) {
    ReadSource::Read one = source.begin(tier, kBlock, blocks, now);
    for (std::uint32_t i = 0; i < blocks; ++i) {
      now += i == 0 ? first : each;
      source.came(one, now);
    }
    source.end(one, ReadSource::End::kAnswered, all, now);
  }
  Nanos patience(const ReadSource::Read& one) { return source.stops_at(one, all, now) - one.latest; }

  Nanos now = 1000 * kSecond;
  TierCosts all;
  ReadSource source;
};

TEST_F(ReadSourceTest, TellsDistanceFromSpeed) {
  for (std::uint32_t i = 1; i <= 10; ++i) read(21 * kMillisecond, kMillisecond, i);
  const plan::TransferTime time = source.time(Tier::kMemory, all, now);
  EXPECT_NEAR(time.fixed, 20.0 * kMillisecond, 0.5 * kMillisecond);
  EXPECT_NEAR(time.per_byte * kBlock, 1.0 * kMillisecond, 0.1 * kMillisecond);
}

TEST_F(ReadSourceTest, ReadsThatOverlapShareTheSpeed) {
  for (int i = 0; i < 10; ++i) {
    std::vector<ReadSource::Read> reads;
    for (int k = 0; k < 4; ++k) reads.push_back(source.begin(Tier::kMemory, kBlock, 8, now));
    for (int block = 0; block < 8; ++block) {
      for (auto& one : reads) source.came(one, now += kMillisecond);
    }
    for (const auto& one : reads) source.end(one, ReadSource::End::kAnswered, all, now);
  }
  EXPECT_NEAR(source.time(Tier::kMemory, all, now).estimate(100 * kBlock), 100.0 * kMillisecond, 5.0 * kMillisecond);
}

TEST_F(ReadSourceTest, WhatIsNotKnownOfOneIsTakenFromTheOthersAndWhatIsOldFades) {
  EXPECT_FALSE(source.time(Tier::kMemory, all, now).known());
  ReadSource slow;
  for (int i = 0; i < 20; ++i) {
    ReadSource::Read one = slow.begin(Tier::kMemory, kBlock, 1, now);
    slow.came(one, now += kSecond);
    slow.end(one, ReadSource::End::kAnswered, all, now);
  }
  EXPECT_NEAR(source.time(Tier::kMemory, all, now).estimate(kBlock), 1.0 * kSecond, 1.0 * kMillisecond);
  TierCosts fast;
  for (int i = 0; i < 20; ++i) fast[0].observe(kBlock, kMillisecond, now);
  EXPECT_GT(slow.time(Tier::kMemory, fast, now).estimate(kBlock), 0.8 * kSecond);
  EXPECT_LT(slow.time(Tier::kMemory, fast, now + 120 * kSecond).estimate(kBlock), 0.05 * kSecond);
}

TEST_F(ReadSourceTest, DrivesHaveASpeedOfTheirOwn) {
  for (int i = 0; i < 10; ++i) read(kMillisecond, kMillisecond, 16);
  for (int i = 0; i < 10; ++i) read(100 * kMillisecond, kMillisecond, 16, Tier::kDrives);
  EXPECT_LT(source.time(Tier::kMemory, all, now).estimate(16 * kBlock), 18.0 * kMillisecond);
  EXPECT_GT(source.time(Tier::kDrives, all, now).estimate(16 * kBlock), 100.0 * kMillisecond);
}

TEST_F(ReadSourceTest, AReadHasStoppedAfterLongerThanItUsuallyTakes) {
  ReadSource::Read one = source.begin(Tier::kMemory, kBlock, 8, now);
  EXPECT_EQ(patience(one), kPatienceUnknown);
  source.came(one, now += 10 * kMillisecond);
  EXPECT_EQ(patience(one), kPatienceMin);
  source.came(one, now += kSecond * 3);
  EXPECT_GE(patience(one), 6 * kSecond) << "such gaps are usual";
  source.end(one, ReadSource::End::kCut, all, now);
  for (int i = 0; i < 30; ++i) read(2 * kSecond, 2 * kSecond, 4);
  one = source.begin(Tier::kMemory, kBlock, 4, now);
  EXPECT_GE(patience(one), 20 * kSecond) << "it is slow";
  EXPECT_LE(patience(one), 100 * kSecond);
  for (int i = 0; i < 60; ++i) read(kMillisecond, kMillisecond, 4);
  EXPECT_EQ(patience(one), kPatienceMin) << "it is not any more";
  ReadSource::Read cold = source.begin(Tier::kDrives, kBlock, 4, now);
  EXPECT_EQ(patience(cold), kPatienceUnknown) << "nothing came from its drives yet";
}

TEST_F(ReadSourceTest, WhoHasStoppedIsGivenLongerUntilItDelivers) {
  for (int i = 0; i < 10; ++i) read(kMillisecond, kMillisecond, 4);
  ReadSource::Read one = source.begin(Tier::kMemory, kBlock, 8, now);
  source.stopped(one, now += kPatienceMin);
  EXPECT_TRUE(one.given_up);
  EXPECT_EQ(patience(one), 2 * kPatienceMin);
  source.came(one, now += kMillisecond);
  EXPECT_FALSE(one.given_up);
  source.end(one, ReadSource::End::kFailed, all, now);
  EXPECT_TRUE(source.resting(now));
  EXPECT_FALSE(source.resting(now + kRestMin));
  read(kMillisecond, kMillisecond, 4);
  one = source.begin(Tier::kMemory, kBlock, 8, now);
  EXPECT_EQ(patience(one), kPatienceMin);
}

// Whatever happens: nothing is left of reads that have ended, and every time is one that can be waited for.
TEST_F(ReadSourceTest, AccountsAreClosed) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Prng random(seed);
    ReadSource place(random.chance(50) ? 0 : 8 * kBlock);
    TierCosts others;
    std::vector<ReadSource::Read> reads;
    for (int step = 0; step < 300; ++step) {
      now += static_cast<Nanos>(random.below(random.chance(5) ? 20 * kSecond : kMillisecond));
      if (reads.empty() || random.chance(20)) {
        const auto blocks = static_cast<std::uint32_t>(1 + random.below(20));
        reads.push_back(place.begin(random.chance(30) ? Tier::kDrives : Tier::kMemory, kBlock, blocks, now));
        continue;
      }
      const std::size_t at = random.below(reads.size());
      ReadSource::Read& one = reads[at];
      const Nanos stops = place.stops_at(one, others, now);
      ASSERT_GE(stops, one.latest + kPatienceMin);
      ASSERT_LE(stops, one.latest + 7200 * kSecond);
      if (stops <= now) place.stopped(one, now);
      if (one.came < one.blocks && random.chance(80)) {
        place.came(one, now);
        continue;
      }
      place.end(one, static_cast<ReadSource::End>(random.below(3)), others, now);
      reads.erase(reads.begin() + static_cast<std::ptrdiff_t>(at));
      for (const Tier tier : {Tier::kMemory, Tier::kDrives}) {
        const plan::TransferTime time = place.time(tier, others, now);
        ASSERT_GE(time.fixed, 0);
        ASSERT_GE(time.per_byte, 0);
        ASSERT_LT(time.estimate(kBlock), 1e15);
      }
    }
    for (const auto& one : reads) place.end(one, ReadSource::End::kCut, others, now);
    EXPECT_EQ(place.waiting_bytes(), 0U);
    EXPECT_TRUE(place.idle());
  }
}

TEST(ReadWatchTest, TellsOfEachOnceAtItsTime) {
  ReadWatch watch;
  EXPECT_FALSE(watch.next());
  watch.watch(1, 10);
  watch.watch(2, 5);
  watch.watch(3, 7);
  watch.watch(2, 8);
  watch.forget(3);
  watch.forget(4);
  EXPECT_EQ(watch.next(), 8);
  EXPECT_TRUE(watch.take_due(7).empty());
  EXPECT_EQ(watch.take_due(10), (std::vector<std::uint64_t>{2, 1}));
  EXPECT_FALSE(watch.next());
}

}  // namespace
}  // namespace flexkv::server
