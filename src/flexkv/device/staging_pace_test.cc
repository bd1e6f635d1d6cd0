#include "flexkv/device/cuda/staging_pace.h"

#include <gtest/gtest.h>

namespace flexkv::device {
namespace {

constexpr std::uint64_t kGroup = 32U << 20;

TEST(StagingPace, stages_until_staged_blocks_wait_then_pauses) {
  StagingPace pace;
  Nanos now = kSecond;
  EXPECT_TRUE(pace.stage(now));
  pace.arrived(now, 600'000, kGroup, true);
  pace.arrived(now, 1'000'000, kGroup, true);  // slower, but not by so much
  EXPECT_TRUE(pace.stage(now));
  pace.arrived(now, 3'000'000, kGroup, true);
  EXPECT_FALSE(pace.stage(now));
  EXPECT_FALSE(pace.stage(now + StagingPace::kPause - 1));
  EXPECT_TRUE(pace.stage(now + StagingPace::kPause));
}

TEST(StagingPace, slow_copies_in_place_say_nothing) {
  StagingPace pace;
  pace.arrived(kSecond, 600'000, kGroup, true);
  pace.arrived(kSecond, 9'000'000, kGroup, false);
  EXPECT_TRUE(pace.stage(kSecond));
}

TEST(StagingPace, fast_copies_in_place_show_what_the_link_can_do) {
  StagingPace pace;
  pace.arrived(kSecond, 600'000, kGroup, false);
  pace.arrived(kSecond, 3'000'000, kGroup, true);
  EXPECT_FALSE(pace.stage(kSecond));
}

TEST(StagingPace, nothing_measured_changes_nothing) {
  StagingPace pace;
  pace.arrived(kSecond, 0, kGroup, true);
  pace.arrived(kSecond, 100, 0, true);
  EXPECT_TRUE(pace.stage(kSecond));
}

}  // namespace
}  // namespace flexkv::device
