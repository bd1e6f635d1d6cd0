// What the simulation (tests/cpp/directory_sim_test.cc) does not single out.
#include "flexkv/cluster/directory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

DirectoryOptions options_of_node(std::uint64_t epoch = 0) {
  DirectoryOptions options;
  options.incarnation = 7;
  options.epoch = epoch;
  return options;
}

class DirectoryTest : public ::testing::Test {
 protected:
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
    ASSERT_TRUE(directory.epoch_to_enter());
    EXPECT_EQ(directory.epoch_to_enter()->number, epoch);
    directory.enter_epoch(now);
  }

  // A round, in which the store has this heartbeat of node 8.
  void round_with(const std::string& beat) {
    now += options_of_node().time_to_live / 3;
    for (int i = 0; i < 2; ++i) {
      const auto request = directory.next_order(now);
      ASSERT_TRUE(request);
      meta::Answers answers(request->size());
      const Names names(options_of_node().cluster);
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
    return encode_beat({number, "eight", "address", {}, 0}, Names(options_of_node().cluster).beat(8));
  }

  Nanos now = 100 * kSecond;
  Replica replica{1000};
  Directory directory{options_of_node(), replica};
};

// What a node that holds blocks of one epoch has to enter when it meets the cluster in another.
std::optional<NewEpoch> meets(std::uint64_t held, std::uint64_t met) {
  Replica replica{1000};
  Directory directory{options_of_node(held), replica};
  const auto look = directory.next_order(0);
  meta::Answers answers(look->size());
  answers[0].found = true;
  answers[0].value = std::to_string(met);
  directory.order_done(answers, 0);
  return directory.epoch_to_enter();
}

TEST_F(DirectoryTest, WhatWasKeptBeforeTheClusterWasMetIsForgottenIfThereWasAReset) {
  EXPECT_FALSE(meets(0, 0)) << "there was none";
  EXPECT_FALSE(meets(3, 3));
  for (const auto& [held, met] : {std::pair<std::uint64_t, std::uint64_t>{0, 3}, {2, 3}, {3, 2}}) {
    const auto epoch = meets(held, met);
    ASSERT_TRUE(epoch) << "it holds blocks of epoch " << held;
    EXPECT_EQ(epoch->number, met);
    EXPECT_TRUE(epoch->late);
  }
}

TEST_F(DirectoryTest, AResetIsAskedForUntilItIsKnownToHaveHappened) {
  enter(3);
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
