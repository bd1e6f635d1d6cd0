#include "flexkv/admission/write_budget.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cmath>
#include <deque>

#include "flexkv/base/prng.h"

namespace flexkv::admission {
namespace {

using State = WriteBudget::State;
using Answer = WriteBudget::Answer;

constexpr std::uint64_t kTera = 1'000'000'000'000;
constexpr std::uint64_t kBlock = 4'000'000;
constexpr Endurance kOneWriteADay{.dwpd = 1, .capacity_bytes = kTera};
// What a new directory begins with: an hour of filling.
constexpr std::uint64_t kFirst = kTera / 64 * 56 / 24;

State decoded(const State& state) { return WriteBudget::decode(WriteBudget::encode(state)).value(); }

// Reserves all that may be reserved now.
void reserve(WriteBudget& budget, Nanos now) {
  while (budget.next_record(now)) budget.recorded();
}

// A machine that writes as much as it is granted, stops, crashes with a record written or not, and stays off; its
// monotonic clock begins anywhere at every start.
TEST(WriteBudget, IsNeverCrossedInAny24Hours) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    Prng prng(seed);
    const std::uint64_t capacity = kTera / (1 + prng.below(20));
    const Endurance endurance{.dwpd = 0.1 * static_cast<double>(1 + prng.below(30)), .capacity_bytes = capacity};
    std::optional<State> durable;
    Nanos real = 0;
    std::deque<std::pair<Nanos, std::uint64_t>> window;
    std::uint64_t in_window = 0;
    for (int run = 0; run < 20; ++run) {
      Nanos clock = static_cast<Nanos>(prng.below(1000)) * kDay;
      WriteBudget budget(endurance, kBlock, durable, clock);
      const bool idle = prng.chance(30);
      std::optional<State> on_its_way;
      const std::uint64_t steps = 1 + prng.below(prng.chance(50) ? 5 : 200);
      for (std::uint64_t step = 0; step < steps; ++step) {
        const auto passed = static_cast<Nanos>(prng.below(prng.chance(2) ? kDay : 20 * 60 * kSecond));
        real += passed, clock += passed;
        if (prng.chance(3)) clock -= kSecond;  // a caller whose times are out of order
        const std::uint64_t bytes = prng.chance(80) ? kBlock : 1 + prng.below(kBlock);
        const auto spend = [&] {
          std::uint64_t granted = 0;
          while (!idle && budget.take(bytes, clock) == Answer::kGranted) granted += bytes;
          if (granted > 0) window.emplace_back(real, granted), in_window += granted;
        };
        spend();
        // Records until there is nothing to reserve, or one takes its time.
        while (on_its_way || (on_its_way = budget.next_record(clock))) {
          if (prng.chance(5)) break;
          durable = decoded(*on_its_way);
          on_its_way.reset();
          budget.recorded();
          spend();
        }
        while (!window.empty() && real - window.front().first >= kDay) {
          in_window -= window.front().second;
          window.pop_front();
        }
        RC_ASSERT(in_window <= budget.daily_bytes() / 64 * 63);
      }
      if (on_its_way && prng.chance(50)) durable = decoded(*on_its_way);  // durable, but nobody was told
      if (prng.chance(40)) durable = decoded(budget.close(clock));
      if (prng.chance(10)) durable = State{};  // the record was damaged
      if (!durable) durable = State{};         // a second start without a record is no new drive
      if (prng.chance(20)) real += static_cast<Nanos>(prng.below(3 * kDay));
    }
  }));
}

TEST(WriteBudget, GivesASteadyWriterSevenEighths) {
  WriteBudget budget(kOneWriteADay, kBlock, State{}, 0);
  std::uint64_t written = 0;
  for (Nanos now = 0; now < 2 * kDay; now += 10 * kSecond) {
    reserve(budget, now);
    while (budget.take(kBlock, now) == Answer::kGranted) written += now >= kDay ? kBlock : 0;
  }
  EXPECT_NEAR(static_cast<double>(written), 0.875e12, 0.01e12);
  EXPECT_GT(budget.pressure(2 * kDay), 0.9);
}

// One for each start of a container, say, all on one drive.
TEST(WriteBudget, ANewDirectoryGetsAnHourOnly) {
  WriteBudget budget(kOneWriteADay, kBlock, std::nullopt, 0);
  std::uint64_t written = 0;
  for (reserve(budget, 0); budget.take(kBlock, 0) == Answer::kGranted; reserve(budget, 0)) written += kBlock;
  EXPECT_NEAR(static_cast<double>(written), static_cast<double>(kFirst), 0.1 * static_cast<double>(kFirst));
}

TEST(WriteBudget, GrantsNothingBeforeARecordIsDurable) {
  WriteBudget budget(kOneWriteADay, kBlock, std::nullopt, 0);
  EXPECT_EQ(budget.take(kBlock, 0), Answer::kLater);
  ASSERT_TRUE(budget.next_record(0));
  EXPECT_EQ(budget.take(kBlock, 0), Answer::kLater);
  EXPECT_FALSE(budget.next_record(0));  // one is under way
  budget.recorded();
  EXPECT_EQ(budget.take(kBlock, 0), Answer::kGranted);
}

TEST(WriteBudget, ACleanEndLosesNothingACrashAtMostTwoChunks) {
  WriteBudget budget(kOneWriteADay, kBlock, std::nullopt, 0);
  const auto record = budget.next_record(0);
  ASSERT_TRUE(record);
  budget.recorded();
  ASSERT_EQ(budget.take(kBlock, 0), Answer::kGranted);
  EXPECT_GE(record->level + kTera / 256, kFirst);
  const State closed = budget.close(0);
  EXPECT_EQ(closed.level, kFirst - kBlock);
  EXPECT_EQ(closed.written, kBlock);
  EXPECT_GT(closed.sequence, record->sequence);
  EXPECT_EQ(budget.take(1, 0), Answer::kRefused);
  EXPECT_FALSE(budget.next_record(kDay));
}

TEST(WriteBudget, TheLowerOfTwoLimitsCounts) {
  const Endurance both{.dwpd = 1, .capacity_bytes = kTera, .tbw = 365, .years = 2};
  EXPECT_EQ(WriteBudget(both, kBlock, std::nullopt, 0).daily_bytes(), kTera / 2);
}

TEST(WriteBudget, WithoutALimitEverythingIsGrantedAndCounted) {
  WriteBudget budget({}, kBlock, std::nullopt, 0);
  EXPECT_FALSE(budget.limited());
  for (int i = 0; i < 2000; ++i) ASSERT_EQ(budget.take(kBlock, 0), Answer::kGranted);
  EXPECT_EQ(budget.pressure(0), 0);
  const auto record = budget.next_record(0);
  ASSERT_TRUE(record);
  EXPECT_EQ(record->written, 2000 * kBlock);
  EXPECT_TRUE(std::isinf(budget.report(0).days_left));
}

TEST(WriteBudget, AWriteLargerThanAChunkIsReservedWhenItIsAskedFor) {
  WriteBudget budget(kOneWriteADay, kBlock, std::nullopt, 0);
  constexpr std::uint64_t kLarge = kTera / 100;
  reserve(budget, 0);
  EXPECT_EQ(budget.take(kLarge, 0), Answer::kLater);
  reserve(budget, 0);
  EXPECT_EQ(budget.take(kLarge, 0), Answer::kGranted);
  EXPECT_EQ(budget.take(kTera, 0), Answer::kRefused);  // never
  reserve(budget, 0);
  EXPECT_EQ(budget.take(kBlock, 0), Answer::kGranted);  // and it stands in nobody's way
}

TEST(WriteBudget, WhatMustBeWrittenIsCountedAlsoWhenNothingIsLeft) {
  WriteBudget budget(kOneWriteADay, kBlock, State{}, 0);
  EXPECT_EQ(budget.take(4096, 0), Answer::kRefused);
  budget.charge(4096, 0);
  EXPECT_EQ(budget.report(0).written_bytes, 4096u);
  WriteBudget first(kOneWriteADay, kBlock, std::nullopt, 0);
  reserve(first, 0);
  first.charge(kBlock, 0);
  EXPECT_EQ(first.close(0).level, kFirst - kBlock);
}

TEST(WriteBudget, WithoutALimitARecordIsDueAfterSomeSecondsOfWriting) {
  WriteBudget budget({}, kBlock, std::nullopt, 0);
  EXPECT_FALSE(budget.next_record(kDay));  // nothing written
  ASSERT_EQ(budget.take(kBlock, kDay), Answer::kGranted);
  ASSERT_TRUE(budget.next_record(kDay));
  budget.recorded();
  ASSERT_EQ(budget.take(kBlock, kDay + kSecond), Answer::kGranted);
  EXPECT_FALSE(budget.next_record(kDay + kSecond));
  EXPECT_TRUE(budget.next_record(kDay + 11 * kSecond));
}

TEST(WriteBudget, TheLastDayIsOfRunningAndSurvivesARestart) {
  constexpr Nanos kHour = 3600 * kSecond;
  std::optional<State> saved;
  {
    WriteBudget budget({}, kBlock, saved, 0);
    for (int hour = 0; hour < 30; ++hour) ASSERT_EQ(budget.take(kBlock, hour * kHour), Answer::kGranted);
    EXPECT_EQ(budget.report(29 * kHour).last_day_bytes, 25 * kBlock);
    EXPECT_EQ(budget.report(29 * kHour + kHour / 2).last_day_bytes, 24 * kBlock + kBlock / 2);
    saved = decoded(budget.close(30 * kHour - kSecond));
  }
  WriteBudget again({}, kBlock, saved, 77);
  EXPECT_NEAR(static_cast<double>(again.report(77).last_day_bytes), 24.0 * kBlock, 0.001 * kBlock);
  EXPECT_EQ(again.report(77 + 10 * kHour).last_day_bytes / kBlock, 14u);
  EXPECT_EQ(again.report(77 + 100 * kHour).last_day_bytes, 0u);
}

TEST(WriteBudget, ReportsTheRateAndTheDaysLeft) {
  WriteBudget budget({.tbw = 100, .years = 1}, kBlock, std::nullopt, 0);
  Nanos now = 0;
  for (; now < 5 * kDay; now += 60 * kSecond) {
    reserve(budget, now);
    ASSERT_EQ(budget.take(100'000'000, now), Answer::kGranted);  // 0.144 TB a day
  }
  const auto report = budget.report(now);
  EXPECT_EQ(report.written_bytes, std::uint64_t{7200} * 100'000'000);
  EXPECT_NEAR(report.bytes_per_day, 0.144e12, 0.002e12);
  EXPECT_NEAR(report.days_left, (100e12 - 0.72e12) / 0.144e12, 10);
}

TEST(WriteBudget, DamagedRecordsAreRefused) {
  State some{7, 1, 2, 3, {}};
  some.hours[24] = 5;
  const auto good = WriteBudget::encode(some);
  const State back = WriteBudget::decode(good).value();
  EXPECT_EQ(back.sequence, 7u);
  EXPECT_EQ(back.level, 1u);
  EXPECT_EQ(back.written, 2u);
  EXPECT_EQ(back.observed_seconds, 3u);
  EXPECT_EQ(back.hours, some.hours);
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    auto bad = good;
    bad[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_FALSE(WriteBudget::decode(bad)) << bit;
  }
  EXPECT_FALSE(WriteBudget::decode(std::span(good).first(good.size() - 1)));
}

}  // namespace
}  // namespace flexkv::admission
