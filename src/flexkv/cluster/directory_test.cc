// What the simulation (tests/cpp/directory_sim_test.cc) does not single out.
#include "flexkv/cluster/directory.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>

#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

// The epoch that so many resets have led to.
Epoch after(std::uint64_t resets) { return {resets, resets == 0 ? 0 : resets + 100}; }

// Of a look at a store with this epoch, which has heard of the node's or not.
void answer_look(meta::Answers& answers, const Epoch& epoch, bool heard = true) {
  answers[0].found = true;
  answers[0].value = std::to_string(epoch.number);
  answers[1].found = epoch.reset != 0;
  answers[1].value = hex(epoch.reset);
  answers[2].found = heard;
}

bool resets(const meta::Request& request) {
  return std::ranges::any_of(request, [](const meta::Op& op) { return op.kind == meta::Op::Kind::kIncrement; });
}

DirectoryOptions options_of_node(const Epoch& epoch = {}) {
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
      meta::Answers answers(request->size());
      answer_look(answers, after(epoch));
      answers[3].found = heard_wanted;
      if (resets(*request) && lost) {
        directory.order_done(Error{ErrorCode::kPeer, "lost"}, now);
      } else {
        directory.order_done(answers, now);
      }
      if (resets(*request)) return true;
    }
    return false;
  }
  void enter(std::uint64_t epoch) {
    EXPECT_FALSE(asks_for_reset(epoch));
    ASSERT_TRUE(directory.epoch_to_enter());
    EXPECT_EQ(*directory.epoch_to_enter(), after(epoch));
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
      if (request->front().key == names.epoch()) answers[4].members = {hex(8)};
      if (request->front().key == names.beat(8)) {
        answers[0].found = true;
        answers[0].value = beat;
      }
      directory.order_done(answers, now);
    }
    directory.expire(now);
  }
  static std::string beat_of_8(std::uint64_t number, Condition condition = Condition::kServes) {
    return encode_beat({number, "eight", "address", {}, 0, condition}, Names(options_of_node().cluster).beat(8));
  }
  // What the request says of this node; nothing: it is none of those that do.
  static std::optional<Beat> own_beat(const meta::Request& request) {
    const std::string place = Names(options_of_node().cluster).beat(options_of_node().incarnation);
    for (const meta::Op& op : request) {
      if (op.key == place && op.kind == meta::Op::Kind::kPut) return decode_beat(op.value, place).value();
    }
    return std::nullopt;
  }
  // The one of the next round.
  Beat next_beat() {
    now += options_of_node().time_to_live / 3;
    std::optional<Beat> beat;
    for (int i = 0; i < 2 && !beat; ++i) {
      const auto request = directory.next_order(now);
      if (!request) break;
      beat = own_beat(*request);
      directory.order_done(meta::Answers(request->size()), now);
    }
    EXPECT_TRUE(beat);
    return beat.value_or(Beat());
  }

  Nanos now = 100 * kSecond;
  bool heard_wanted = false;  // the store has heard of the reset that this node asks for
  Replica replica{1000};
  Directory directory{options_of_node(), replica};
};

// What a node that holds blocks of one epoch does when it meets the store in another: docs/decisions/0033.
struct Met {
  std::optional<Epoch> enters;
  bool resets = false;  // all nodes
  std::map<std::string, std::string> written;
};
Met meets(const Epoch& held, const std::optional<Epoch>& met, bool heard) {
  Replica replica{1000};
  Directory directory{options_of_node(held), replica};
  meta::Answers answers(directory.next_order(0)->size());
  if (met) answer_look(answers, *met, heard);
  directory.order_done(answers, 0);
  Met done;
  done.enters = directory.epoch_to_enter();
  if (done.enters) {
    directory.enter_epoch(0);
    meta::Answers again(directory.next_order(0)->size());
    answer_look(again, *met);
    directory.order_done(again, 0);
  }
  const auto beat = directory.next_order(0);
  done.resets = resets(*beat);
  for (const meta::Op& op : *beat) done.written[op.key] = op.value;
  return done;
}

TEST_F(DirectoryTest, KeepsWhatItHoldsIfThereWasNoResetThatItDoesNotKnow) {
  const Names names("default");
  EXPECT_FALSE(meets({}, Epoch{}, false).enters) << "there was none";
  EXPECT_FALSE(meets(after(3), after(3), true).enters);
  EXPECT_FALSE(meets(after(3), Epoch{2, after(3).reset}, true).enters) << "a count that was lost";
  // Redis began anew: it is given what it has lost, whoever was there first.
  for (const auto& empty : {std::optional<Epoch>(), std::optional<Epoch>(Epoch{})}) {
    const Met met = meets(after(3), empty, false);
    EXPECT_FALSE(met.enters);
    EXPECT_FALSE(met.resets);
    auto written = met.written;
    EXPECT_EQ(written[names.epoch()], "3");
    EXPECT_EQ(written[names.reset()], hex(after(3).reset));
    // Not before it is seen there: another node may be giving back a later one, and must not take this one for later.
    EXPECT_FALSE(written.contains(names.heard(after(3).reset)));
  }
}

TEST_F(DirectoryTest, ForgetsWhatItHoldsIfThereWasAResetThatItDoesNotKnow) {
  struct Case {
    Epoch held, met;
    bool heard, resets;
  };
  for (const Case& one : {
           Case{{}, after(3), false, false},            // it was away, or is new
           Case{after(2), after(3), true, false},       // it was away
           Case{after(3), Epoch{3, 999}, false, true},  // Redis began anew, and counted to the same again
           Case{after(3), Epoch{1, 999}, false, true},  // and others may not know of the three
           Case{after(3), Epoch{9, 999}, false, true},
           Case{after(3), after(2), false, true},  // Redis came back with what it was some time ago
           Case{after(3), Epoch{2, 999}, true, false},
           Case{after(3), Epoch{5, after(3).reset}, true, false},  // a late repetition has overwritten the latest
           Case{{3, 0}, Epoch{4, 0}, true, false},                 // of older versions
       }) {
    const Met met = meets(one.held, one.met, one.heard);
    ASSERT_TRUE(met.enters) << one.held.number << " meets " << one.met.number;
    EXPECT_EQ(*met.enters, one.met);
    EXPECT_EQ(met.resets, one.resets) << one.held.number << " meets " << one.met.number;
  }
}

// Rounds of a node that something outlives, each a third of its time to live after the one before.
class NeedingAReset : public DirectoryTest {
 protected:
  static DirectoryOptions needing(const Epoch& held) {
    DirectoryOptions options = options_of_node(held);
    options.needs_reset = true;
    return options;
  }
  // The store says that this is the cluster's epoch. Whether the node asks for a reset.
  bool round(Directory& node, const Epoch& met) {
    now += options_of_node().time_to_live / 3;
    bool asked = false;
    for (int i = 0; i < 2 && !node.epoch_to_enter(); ++i) {
      const auto request = node.next_order(now);
      meta::Answers answers(request->size());
      if (i == 0) answer_look(answers, met);
      asked = asked || resets(*request);
      node.order_done(answers, now);
    }
    return asked;
  }
};

TEST_F(NeedingAReset, WhoFindsNoneResetsTheCluster) {
  for (const Epoch& without : {Epoch{}, Epoch{4, 0}}) {
    Directory node(needing(without), replica);
    EXPECT_TRUE(round(node, without));
    EXPECT_FALSE(node.current_epoch());
    round(node, after(without.number + 1));
    ASSERT_TRUE(node.epoch_to_enter());
  }
  Directory without_need(options_of_node(), replica);
  EXPECT_FALSE(round(without_need, Epoch{}));
  // Redis began anew: it is given what it has lost.
  Directory knows(needing(after(3)), replica);
  EXPECT_FALSE(round(knows, Epoch{}));
  EXPECT_FALSE(knows.current_epoch()) << "not before it is seen there";
}

TEST_F(NeedingAReset, TheEpochIsCurrentOnceItHasStoodForAWhileAndUntilAnotherOneIsSeenOrWanted) {
  Directory node(needing(after(3)), replica);
  EXPECT_FALSE(round(node, after(3)));
  EXPECT_FALSE(node.current_epoch()) << "others may know better";
  round(node, after(3));
  EXPECT_EQ(node.current_epoch(), after(3));
  now += options_of_node().time_to_live;
  ASSERT_TRUE(node.next_order(now));
  node.order_done(Error{ErrorCode::kPeer, "Redis is gone"}, now);
  EXPECT_EQ(node.current_epoch(), after(3)) << "as nobody has said otherwise";
  node.reset_cluster(after(4).reset, now);
  EXPECT_FALSE(node.current_epoch());
  EXPECT_TRUE(round(node, after(3)));
  EXPECT_FALSE(node.current_epoch());
  round(node, after(4));
  EXPECT_FALSE(node.current_epoch());
  node.enter_epoch(now);
  EXPECT_FALSE(node.current_epoch());
  round(node, after(4));
  round(node, after(4));
  EXPECT_EQ(node.current_epoch(), after(4));
  round(node, Epoch{9, after(4).reset});  // a late repetition: what was stored by that name may be older
  EXPECT_FALSE(node.current_epoch());
}

TEST_F(DirectoryTest, AResetIsAskedForUntilItIsKnownToHaveHappened) {
  enter(3);
  directory.reset_cluster(after(4).reset, now);
  EXPECT_TRUE(asks_for_reset(3, true));
  EXPECT_TRUE(asks_for_reset(3)) << "nobody heard the first";
  EXPECT_TRUE(asks_for_reset(3)) << "the store has taken it, and lost it";
  enter(4);
  EXPECT_FALSE(asks_for_reset(4));

  directory.reset_cluster(after(5).reset, now);
  EXPECT_TRUE(asks_for_reset(4, true));
  enter(5);  // so the store had heard it
  EXPECT_FALSE(asks_for_reset(5));
}

TEST_F(DirectoryTest, WhatTheStoreSaysOfAnEarlierResetIsNotSaidOfALaterOne) {
  enter(3);
  directory.reset_cluster(after(4).reset, now);
  EXPECT_TRUE(asks_for_reset(3, true));
  enter(4);
  now += 20 * kSecond;
  const auto look = directory.next_order(now);
  directory.reset_cluster(55, now);  // while the answer is on its way
  meta::Answers answers(look->size());
  answer_look(answers, after(4));
  answers[3].found = true;  // of the earlier one, which it asked for
  directory.order_done(answers, now);
  EXPECT_TRUE(asks_for_reset(4));
}

TEST_F(DirectoryTest, AResetThatIsWantedDuringTheFarewellIsSaidWithAnotherOne) {
  enter(3);
  directory.leave(now);
  const auto farewell = directory.next_order(now);
  EXPECT_FALSE(resets(*farewell));
  directory.reset_cluster(55, now);
  directory.order_done(meta::Answers(farewell->size()), now);
  EXPECT_FALSE(directory.left());
  const auto again = directory.next_order(now);
  ASSERT_TRUE(again);
  EXPECT_TRUE(resets(*again));
  directory.order_done(meta::Answers(again->size()), now);
  EXPECT_TRUE(directory.left());
}

TEST_F(DirectoryTest, AnothersResetDoesNotStandForOneThatWasAskedForHere) {
  enter(3);
  directory.reset_cluster(55, now);
  enter(4);  // which may have happened before
  EXPECT_TRUE(asks_for_reset(4));
  heard_wanted = true;
  enter(5);  // which happened after it
  EXPECT_FALSE(asks_for_reset(5));
}

TEST_F(DirectoryTest, SaysWhichResetsWereToldWhateverTheNumberOfTheEpoch) {
  using Resets = std::vector<ResetId>;
  enter(9);
  directory.reset_cluster(55, now);
  EXPECT_TRUE(asks_for_reset(9));
  EXPECT_EQ(directory.stats().told_resets, Resets{}) << "the store may lose it";
  enter(4);  // Redis came back older, and somebody has reset it
  EXPECT_EQ(directory.stats().told_resets, Resets{}) << "which may have been before";
  directory.reset_cluster(66, now);  // a later one will do for both
  EXPECT_TRUE(asks_for_reset(4));
  heard_wanted = true;
  enter(5);
  EXPECT_EQ(directory.stats().told_resets, (Resets{55, 66}));
}

TEST_F(DirectoryTest, WhoLeavesTellsOfAResetThatIsStillWanted) {
  enter(3);
  directory.reset_cluster(55, now);
  directory.leave(now);
  const auto farewell = directory.next_order(now);
  ASSERT_TRUE(farewell);
  EXPECT_TRUE(resets(*farewell));
  directory.order_done(Error{ErrorCode::kPeer, "lost"}, now);
  EXPECT_FALSE(directory.left());
  const auto again = directory.next_order(now);
  ASSERT_TRUE(again);
  EXPECT_TRUE(resets(*again));
  directory.order_done(meta::Answers(again->size()), now);
  EXPECT_TRUE(directory.left());
}

TEST_F(DirectoryTest, WhoDrainsShowsNoBlocksAndStaysInTheCluster) {
  ASSERT_TRUE(directory.add_space(SpaceId{1}, now));
  EXPECT_EQ(next_beat().spaces.size(), 1U);
  directory.say(Condition::kDrains, now);
  EXPECT_FALSE(directory.stats().left) << "nobody can have heard it";
  const Beat drains = next_beat();
  EXPECT_EQ(drains.condition, Condition::kDrains);
  EXPECT_TRUE(drains.spaces.empty());
  EXPECT_TRUE(directory.stats().left);
  directory.say(Condition::kDrained, now);
  EXPECT_EQ(next_beat().condition, Condition::kDrained);
  EXPECT_EQ(next_beat().condition, Condition::kDrained) << "it still gives signs of life";
  directory.leave(now);
  const auto farewell = directory.next_order(now);
  ASSERT_TRUE(farewell);
  EXPECT_EQ(own_beat(*farewell).value_or(Beat()).condition, Condition::kEnds);
  const std::string nodes = Names(options_of_node().cluster).nodes();
  EXPECT_TRUE(std::ranges::any_of(*farewell, [&](const meta::Op& op) {
    return op.kind == meta::Op::Kind::kDrop && op.key == nodes;
  })) << "who is named without a sign has died";
}

TEST_F(DirectoryTest, TellsTheConditionOfOthers) {
  for (std::uint64_t number = 1; number < 5; ++number) {
    const auto condition = static_cast<Condition>(number - 1);
    round_with(beat_of_8(number, condition));
    ASSERT_EQ(directory.peers(now).size(), 1U);
    EXPECT_EQ(directory.peers(now)[0].condition, condition);
  }
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
