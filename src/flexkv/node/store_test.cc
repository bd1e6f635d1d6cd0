// What is kept in a store beyond the machine: what is offered to it, in which pieces, and what of refusals and resets.
#include "flexkv/node/fake_store.h"

namespace flexkv::node {
namespace {

class NodeStoreTest : public NodeWithStoreTest {
 protected:
  static constexpr Nanos kLong = 10 * kSecond;  // what is gathered waits less

  std::uint64_t unstored(Reason reason) const {
    return node->stats().unstored_blocks[static_cast<std::size_t>(reason)];
  }
};

TEST_F(NodeStoreTest, WritesWholePiecesAtOnceAndTheRestOnceNothingFollows) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 10);
  keep(e, 1, 1, keys);
  ASSERT_EQ(shared.writes.size(), 2U);
  EXPECT_EQ(shared.writes[0].keys, part(keys, 0, 4));
  EXPECT_EQ(shared.writes[0].parent, key::BlockKey{});
  EXPECT_EQ(shared.writes[1].keys, part(keys, 4, 8));
  EXPECT_EQ(shared.writes[1].parent, keys[3]);
  EXPECT_EQ(shared.writes[1].host_offsets.size(), 4U);
  ASSERT_TRUE(node->next_deadline());
  pass(*node->next_deadline() - now);
  ASSERT_EQ(shared.writes.size(), 3U);
  EXPECT_EQ(shared.writes[2].keys, part(keys, 8, 10));
  for (int i = 0; i < 3; ++i) end_write();
  EXPECT_EQ(node->stats().to_store.blocks, 10U);
  EXPECT_EQ(node->store_queue(), 0U);
  EXPECT_FALSE(node->next_deadline());
}

TEST_F(NodeStoreTest, GathersWhatIsSavedBlockByBlock) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 9);
  for (std::size_t blocks = 1; blocks <= keys.size(); ++blocks) keep(e, 1, blocks, part(keys, 0, blocks));
  ASSERT_EQ(shared.writes.size(), 2U);
  EXPECT_EQ(shared.writes[1].keys, part(keys, 4, 8));
  EXPECT_EQ(node->store_queue(), 9U);
  node->flush_store(now);
  ASSERT_EQ(shared.writes.size(), 3U);
  EXPECT_EQ(shared.writes[2].keys, part(keys, 8, 9));
}

TEST_F(NodeStoreTest, WhatTheStoreHasIsNotWrittenAgain) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 8);
  shared.stored.insert(keys.begin(), keys.begin() + 4);
  keep(e, 1, 1, keys);
  ASSERT_EQ(shared.writes.size(), 1U);
  EXPECT_EQ(shared.writes[0].keys, part(keys, 4, 8));
  shared.stored.clear();  // it may forget, and scan anew: here is known what was given
  lookup(e, 2, keys);
  keep(e, 3, 3, keys_of(1, 8));
  EXPECT_EQ(shared.writes.size(), 1U);
}

TEST_F(NodeStoreTest, WhatWasNotWrittenIsOfferedAgainWhenItIsUsed) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  keep(e, 1, 1, keys);
  end_write(RemoteOutcome::kStoreFailed);
  EXPECT_EQ(unstored(Reason::kStoreFailed), 4U);
  EXPECT_TRUE(shared.writes.empty());
  lookup(e, 2, keys);
  ASSERT_EQ(shared.writes.size(), 1U);
  EXPECT_EQ(shared.writes[0].keys, keys);
}

TEST_F(NodeStoreTest, AStoreThatIsOffIsOfferedNothing) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 6);
  keep(e, 1, 1, keys);
  shared.group = 0;
  pass(kLong);
  EXPECT_EQ(unstored(Reason::kStoreOff), 2U);  // what was gathered
  end_write();
  keep(e, 2, 2, keys_of(2, 6));
  EXPECT_EQ(node->store_queue(), 0U);
  shared.group = 4;
  lookup(e, 3, keys);
  pass(kLong);
  ASSERT_EQ(shared.writes.size(), 1U);
  EXPECT_EQ(shared.writes[0].keys, part(keys, 4, 6));
}

TEST_F(NodeStoreTest, AtMostAQuarterOfHostMemoryWaitsAndSavesFindRoom) {
  start(16);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 8));
  EXPECT_EQ(node->store_queue(), 4U);
  EXPECT_EQ(unstored(Reason::kQueueFull), 4U);
  node->close_sequence(e, 1);
  keep(e, 2, 2, keys_of(2, 8));
  node->close_sequence(e, 2);
  keep(e, 3, 3, keys_of(3, 8));  // the first prompt's end goes, not what is being written
  EXPECT_TRUE(done(3));
  ASSERT_EQ(shared.writes.size(), 1U);
  EXPECT_GE(lookup(e, 4, keys_of(1, 8)).matched_blocks, 4U);
}

TEST_F(NodeStoreTest, AResetTakesBackWhatIsGathered) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 6);
  keep(e, 1, 1, keys);
  node->reset_all(1, now);
  node->check_invariants();
  EXPECT_EQ(unstored(Reason::kReset), 2U);
  EXPECT_EQ(node->store_queue(), 4U);
  end_write(RemoteOutcome::kCanceled);
  EXPECT_EQ(unstored(Reason::kReset), 6U);
  shared.stored.clear();
  node->close_sequence(e, 1);
  keep(e, 2, 2, keys);
  ASSERT_EQ(shared.writes.size(), 1U);
  EXPECT_EQ(shared.writes[0].keys, part(keys, 0, 4));
}

TEST_F(NodeStoreTest, WhatIsNotWhatTheDeviceHeldIsDroppedAndItsPlaceKeptUntilTheWriteHasEnded) {
  start(8);
  shared.group = 2;
  const auto e = engine("e");
  const auto keys = keys_of(1, 2);
  ASSERT_EQ(save(e, 1, 1, keys), Reason::kNone);
  node->on_report(agents[0], {1, JobStatus::kDone, 0, {11, 12}}, now);
  node->close_sequence(e, 1);
  ASSERT_EQ(shared.writes.size(), 1U);
  ASSERT_EQ(shared.writes[0].sums.size(), 2U);
  EXPECT_EQ(shared.writes[0].sums[1][0].sum, 12U);
  node->on_store_damaged(shared.writes[0].op, 1, now);
  node->check_invariants();
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 1U);
  EXPECT_EQ(node->blocks_in_use(), 2U);
  end_write(RemoteOutcome::kDamaged);
  EXPECT_EQ(node->blocks_in_use(), 1U);
  EXPECT_EQ(unstored(Reason::kDamaged), 2U);
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
}

TEST_F(NodeStoreTest, WhatWasReadFromThereIsNotWrittenBack) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  shared.stored.insert(keys.begin(), keys.end());
  store(keys);
  ASSERT_EQ(lookup(e, 1, keys).matched_blocks, 4U);
  ASSERT_EQ(load(e, 1, 10, keys), Reason::kNone);
  bring(4);
  report(agents[0], 10);
  lookup(e, 2, keys);
  pass(kLong);
  EXPECT_TRUE(shared.writes.empty());
}

}  // namespace
}  // namespace flexkv::node
