// Two sources beyond a machine, a real node, and what becomes of a read when they fail.
#include "flexkv/server/beyond.h"

#include "flexkv/node/import_fixture.h"

namespace flexkv::server {
namespace {

using node::EngineHandle;
using node::Keys;
using node::keys_of;
using node::Reason;
using node::RemoteOutcome;

class BeyondTest : public node::NodeTest {
 protected:
  BeyondTest() {
    both.add(peers);
    both.add(store);
    beyond = &both;
  }

  static void give(node::FakeRemote& source, const Keys& keys, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) source.stored.insert(keys[i]);
  }
  // Of the source's oldest read: so many blocks, and the end.
  void bring(node::FakeRemote& source, std::uint32_t blocks, RemoteOutcome outcome = RemoteOutcome::kDone) {
    ASSERT_FALSE(source.reads.empty());
    const node::RemoteRead read = source.reads.front();
    source.reads.erase(source.reads.begin());
    for (std::uint32_t i = 0; i < blocks; ++i) both.on_block(*node, read.op, i, now);
    both.on_end(*node, read.op, outcome, now);
    node->check_invariants();
  }
  void begin_load(const Keys& keys, std::uint32_t found) {
    start(16);
    e = engine("e");
    now = monotonic_now();
    ASSERT_EQ(lookup(e, 1, keys).matched_blocks, found);
    ASSERT_EQ(load(e, 1, 10, Keys(keys.begin(), keys.begin() + found)), Reason::kNone);
  }

  node::FakeRemote peers;
  node::FakeRemote store;
  Beyond both;
  EngineHandle e = 0;
};

TEST_F(BeyondTest, WhoHasMoreIsAskedAndOfTwoTheNearer) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 4);
  give(store, keys, 0, 4);
  begin_load(keys, 4);
  EXPECT_EQ(peers.reads.size(), 1U);
  EXPECT_TRUE(store.reads.empty());
  bring(peers, 4);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
  give(store, keys, 4, 6);
  give(peers, keys, 4, 5);
  ASSERT_EQ(lookup(e, 2, keys).matched_blocks, 6U);
  ASSERT_EQ(load(e, 2, 11, keys), Reason::kNone);
  ASSERT_EQ(store.reads.size(), 1U);
  EXPECT_EQ(store.reads[0].first, 4U);
}

TEST_F(BeyondTest, APromptIsPutTogetherFromBoth) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 4);
  give(store, keys, 4, 6);
  begin_load(keys, 6);
  ASSERT_EQ(peers.reads.size(), 1U);
  EXPECT_EQ(peers.reads[0].keys, Keys(keys.begin(), keys.begin() + 4));
  EXPECT_TRUE(store.reads.empty());
  bring(peers, 4);
  ASSERT_EQ(store.reads.size(), 1U);
  EXPECT_EQ(store.reads[0].first, 4U);
  EXPECT_EQ(store.reads[0].keys, keys);
  bring(store, 2);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
}

TEST_F(BeyondTest, WhatOneDoesNotBringIsReadFromTheOther) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 6);
  give(store, keys, 0, 6);
  begin_load(keys, 6);
  bring(peers, 2, RemoteOutcome::kUnreachable);
  ASSERT_EQ(store.reads.size(), 1U);
  EXPECT_EQ(store.reads[0].first, 2U);
  bring(store, 4);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
}

TEST_F(BeyondTest, WhenNeitherBringsItTheBeginningIsKept) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 6);
  give(store, keys, 0, 6);
  begin_load(keys, 6);
  bring(peers, 2, RemoteOutcome::kUnreachable);
  bring(store, 1, RemoteOutcome::kChecksum);
  EXPECT_TRUE(peers.reads.empty());
  report(agents[0], 10);
  EXPECT_EQ(failure(10), Reason::kChecksum);
  EXPECT_EQ(result(10)->good_blocks, 3U);
}

TEST_F(BeyondTest, ALittleMoreInASlowStoreIsReadFromThereAndNothingElse) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 5);
  give(store, keys, 0, 6);
  peers.bytes_per_second = 1e9;
  store.bytes_per_second = 1e6;
  store.wait = 1000;
  begin_load(keys, 6);
  EXPECT_TRUE(store.reads.empty());
  ASSERT_EQ(peers.reads.size(), 1U);
  EXPECT_EQ(peers.reads[0].keys, Keys(keys.begin(), keys.begin() + 5));
  bring(peers, 5);
  ASSERT_EQ(store.reads.size(), 1U);
  EXPECT_EQ(store.reads[0].first, 5U);
  bring(store, 1);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
}

TEST_F(BeyondTest, WhatIsFarAwayIsLeftOutWhereComputingTakesLess) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 4);
  give(store, keys, 0, 6);
  start(16);
  const auto found = [&](double block_nanos) {
    return both.find(peers.spaces.begin()->first, keys, 0, block_nanos, 0);
  };
  peers.bytes_per_second = store.bytes_per_second = 1e9;
  e = engine("e");
  store.wait = 50 * kMillisecond;
  EXPECT_EQ(found(1.0 * kMillisecond).blocks, 4U);
  EXPECT_EQ(found(100.0 * kMillisecond).blocks, 6U);
  EXPECT_EQ(found(0).blocks, 6U);
  // Also what only the store has.
  store.stored.clear();
  give(store, keys, 4, 6);
  EXPECT_EQ(found(1.0 * kMillisecond).blocks, 4U);
  EXPECT_EQ(found(100.0 * kMillisecond).blocks, 6U);
}

TEST_F(BeyondTest, TheSourcesAreCalledInTheirTimes) {
  EXPECT_FALSE(both.next_time());
  store.time = 7;
  EXPECT_EQ(both.next_time(), 7);
  peers.time = 5;
  EXPECT_EQ(both.next_time(), 5);
  both.on_time(6);
  EXPECT_EQ(both.next_time(), 7);
}

TEST_F(BeyondTest, WhatNobodyWaitsForIsAskedOfNobodyElse) {
  const auto keys = keys_of(1, 6);
  give(peers, keys, 0, 6);
  give(store, keys, 0, 6);
  begin_load(keys, 6);
  const auto op = peers.reads[0].op;
  node->cancel(e, 10);
  EXPECT_TRUE(peers.canceled.contains(op));
  bring(peers, 1, RemoteOutcome::kCanceled);
  EXPECT_TRUE(store.reads.empty());
}

// Whatever they bring and say: each read ends once, with what came in order.
TEST_F(BeyondTest, EveryReadEnds) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    Prng prng(seed);
    agents.clear();
    messages.clear();
    results.clear();
    start(32);
    e = engine("e");
    now = monotonic_now();
    for (node::JobId job = 1; job < 20; ++job) {
      const auto keys = keys_of(1 + prng.below(4), 1 + prng.below(12), 3);
      for (node::FakeRemote* source : {&peers, &store}) {
        if (prng.chance(20)) source->stored.clear();
        give(*source, keys, 0, prng.below(keys.size() + 1));
        if (prng.chance(30)) give(*source, keys, prng.below(keys.size()), keys.size());
      }
      const std::uint32_t found = lookup(e, job, keys).matched_blocks;
      if (found > 0) {
        EXPECT_EQ(load(e, job, job, Keys(keys.begin(), keys.begin() + found)), Reason::kNone);
      }
      if (prng.chance(20)) node->cancel(e, job);
      while (!peers.reads.empty() || !store.reads.empty()) {
        node::FakeRemote& source = peers.reads.empty() || (!store.reads.empty() && prng.chance(50)) ? store : peers;
        const auto wanted = static_cast<std::uint32_t>(source.reads[0].host_offsets.size());
        const bool all = prng.chance(60);
        bring(source, all ? wanted : static_cast<std::uint32_t>(prng.below(wanted)),
              all ? RemoteOutcome::kDone : RemoteOutcome::kMissing);
        if (HasFatalFailure()) return;
      }
      if (found > 0 && !result(job)) report(agents[0], job, node::JobStatus::kDone);
      EXPECT_TRUE(found == 0 || result(job)) << "job " << job;
      node->close_sequence(e, job);
    }
  }
}

}  // namespace
}  // namespace flexkv::server
