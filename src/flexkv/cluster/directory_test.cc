// What the simulation (tests/cpp/directory_sim_test.cc) does not single out.
#include "flexkv/cluster/directory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

class DirectoryTest : public ::testing::Test {
 protected:
  static DirectoryOptions options() {
    DirectoryOptions options;
    options.incarnation = 7;
    return options;
  }

  // Two rounds, in which the store says that the cluster is in `epoch`. Whether they ask for a reset; the request that
  // does ends them, and is answered or `lost`.
  bool asks_for_reset(std::uint64_t epoch, bool lost = false) {
    for (int i = 0; i < 4; ++i) {
      now += 20 * kSecond;  // a round is due
      const auto request = directory.next_order(now);
      if (!request) continue;
      const bool resets =
          std::ranges::any_of(*request, [](const meta::Op& op) { return op.kind == meta::Op::Kind::kIncrement; });
      meta::Answers answers(request->size());
      answers[0].found = true;
      answers[0].value = std::to_string(epoch);
      if (resets && lost) {
        directory.order_done(Error{ErrorCode::kPeer, "lost"}, now);
      } else {
        directory.order_done(answers, now);
      }
      if (resets) return true;
    }
    return false;
  }
  void enter(std::uint64_t epoch) {
    EXPECT_FALSE(asks_for_reset(epoch));
    ASSERT_EQ(directory.epoch_to_enter(), epoch);
    directory.enter_epoch(now);
  }

  // A round, in which the store has this heartbeat of node 8.
  void round_with(const std::string& beat) {
    now += options().time_to_live / 3;
    for (int i = 0; i < 2; ++i) {
      const auto request = directory.next_order(now);
      ASSERT_TRUE(request);
      meta::Answers answers(request->size());
      const Names names(options().cluster);
      if (request->front().key == names.epoch()) answers[1].members = {hex(8)};
      if (request->front().key == names.beat(8)) {
        answers[0].found = true;
        answers[0].value = beat;
      }
      directory.order_done(answers, now);
    }
    directory.expire(now);
  }
  static std::string beat_of_8(std::uint64_t number) {
    return encode_beat({number, "eight", "address", {}}, Names(options().cluster).beat(8));
  }

  static Change block_in(SpaceIndex space) {
    Change change;
    change.space = space;
    change.key = {1, 1};
    return change;
  }

  Nanos now = 100 * kSecond;
  Replica replica{1000};
  Directory directory{options(), replica};
};

TEST_F(DirectoryTest, WhatWasKeptBeforeTheClusterWasMetIsForgottenIfThereWasAReset) {
  const auto space = directory.add_space({}, now);
  ASSERT_TRUE(space);
  directory.apply(block_in(*space), now);
  EXPECT_FALSE(asks_for_reset(0)) << "there was none";
  EXPECT_FALSE(directory.epoch_to_enter());

  Replica other_replica{1000};
  Directory late{options(), other_replica};
  const auto its_space = late.add_space({}, now);
  late.apply(block_in(*its_space), now);
  const auto look = late.next_order(now + 20 * kSecond);
  ASSERT_TRUE(look);
  meta::Answers answers(look->size());
  answers[0].found = true;
  answers[0].value = std::to_string(3);
  late.order_done(answers, now + 20 * kSecond);
  EXPECT_EQ(late.epoch_to_enter(), 3U);
}

TEST_F(DirectoryTest, WhoHoldsNothingTakesTheEpochThatThereIs) {
  EXPECT_FALSE(asks_for_reset(3));
  EXPECT_FALSE(directory.epoch_to_enter());
  EXPECT_EQ(directory.stats().epoch, 3U);
}

TEST_F(DirectoryTest, AResetIsAskedForUntilItIsKnownToHaveHappened) {
  EXPECT_FALSE(asks_for_reset(3));
  directory.reset_cluster(now);
  EXPECT_TRUE(asks_for_reset(3, true));
  EXPECT_TRUE(asks_for_reset(3)) << "nobody heard the first";
  enter(4);
  EXPECT_FALSE(asks_for_reset(4));

  directory.reset_cluster(now);
  EXPECT_TRUE(asks_for_reset(4, true));
  enter(5);  // so the store had heard it
  EXPECT_FALSE(asks_for_reset(5));
}

TEST_F(DirectoryTest, AHeartbeatThatTheStoreKeepsDoesNotBringADeadNodeBack) {
  round_with(beat_of_8(1));
  round_with(beat_of_8(2));
  EXPECT_EQ(directory.stats().peers, 1U);
  for (int i = 0; i < 20; ++i) round_with(beat_of_8(2));
  EXPECT_EQ(directory.stats().peers, 0U);
  for (int i = 0; i < 20; ++i) {
    round_with(beat_of_8(2));
    EXPECT_EQ(directory.stats().peers, 0U);
  }
  round_with(beat_of_8(3));
  EXPECT_EQ(directory.stats().peers, 1U) << "it was only slow";
}

}  // namespace
}  // namespace flexkv::cluster
