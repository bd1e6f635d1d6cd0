// A node that drains: what it still does, what it refuses, and when nothing is left.
#include "flexkv/node/fake_drives.h"
#include "flexkv/node/fake_store.h"

namespace flexkv::node {
namespace {

constexpr Nanos kMinute = 60 * kSecond;

class NodeDrainTest : public NodeWithStoreTest {
 protected:
  NodeDrainTest() {
    drives = &disk;
    storage = nullptr;
  }

  EngineHandle start_with_drives(std::uint64_t host_slots) {
    start(host_slots);
    const EngineHandle handle = engine("e");
    const std::uint32_t slots[] = {64, 64};
    node->on_disk_opened(disk.spaces.rbegin()->first, slots, now);
    return handle;
  }
  void end_disk_writes() {
    for (const DiskTransfer& write : std::exchange(disk.writes, {})) {
      const DiskResult result{write.op, DiskOutcome::kDone};
      node->on_disk_done({&result, 1}, now);
    }
  }
  std::uint64_t missed() const { return node->stats().missed_blocks[static_cast<std::size_t>(Reason::kDraining)]; }

  FakeDrives disk;
};

TEST_F(NodeDrainTest, EnginesFindAndSaveNothingMore) {
  start(64);
  const auto e = engine("e");
  const auto kept = keys_of(1, 4);
  keep(e, 1, 1, kept);
  store(keys_of(2, 4));
  node->drain(now, now + kMinute);
  for (const auto& keys : {kept, keys_of(2, 4)}) {
    const auto found = lookup(e, 10 + keys[1].low, keys);
    EXPECT_EQ(found.matched_blocks, 0U);
    EXPECT_EQ(found.reason, Reason::kDraining);
  }
  EXPECT_EQ(node->lookup_last(e, 4, kept, now).matched_blocks, 0U);
  EXPECT_EQ(missed(), 9U) << "each once, and the last one by itself";
  EXPECT_EQ(save(e, 5, 2, keys_of(3, 4)), Reason::kDraining);
  EXPECT_EQ(failure(2), Reason::kDraining);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 2).size(), 1U) << "a worker that has armed it waits for nothing";
  EXPECT_EQ(node->prefetch(e, {6, 0, keys_of(2, 4)}, now), Reason::kDraining);
  EXPECT_TRUE(remote.reads.empty());
}

TEST_F(NodeDrainTest, WhatWasFoundBeforeIsLoadedAndWhatRunsEnds) {
  const auto e = start_with_drives(64);
  const auto kept = keys_of(1, 4);
  keep(e, 1, 1, kept);
  end_disk_writes();
  ASSERT_EQ(lookup(e, 2, kept).matched_blocks, 4U);
  const auto late = keys_of(2, 3);
  ASSERT_EQ(save(e, 3, 2, late), Reason::kNone);
  node->drain(now, now + kMinute);
  node->stop_lending();
  ASSERT_EQ(load(e, 2, 3, kept), Reason::kNone);
  EXPECT_EQ(node->undone().jobs, 2U);
  report(agents[0], 3);
  EXPECT_TRUE(done(3));
  report(agents[0], 2);
  EXPECT_TRUE(done(2));
  EXPECT_EQ(node->undone().jobs, 0U);
  EXPECT_EQ(node->undone().disk_writes, 3U) << "of the save that ended meanwhile";
  EXPECT_FALSE(node->undone().none());
  end_disk_writes();
  EXPECT_TRUE(node->undone().none());
}

TEST_F(NodeDrainTest, LendsUntilItIsToldToStopAndWaitsForWhatItLent) {
  const auto e = start_with_drives(64);
  const auto kept = keys_of(1, 4);
  keep(e, 1, 1, kept);
  end_disk_writes();
  node->drain(now, now + kMinute);
  EXPECT_FALSE(node->undone().none()) << "somebody may have found it a moment ago";
  EXPECT_EQ(lend(1, kept).host_offsets.size(), 4U);
  node->stop_lending();
  EXPECT_TRUE(lend(2, kept).host_offsets.empty());
  EXPECT_EQ(loans[2].limit, Loan::Limit::kMissing) << "who asked goes on elsewhere";
  node->end_loan(2, now);
  EXPECT_EQ(node->undone().loans, 1U);
  node->end_loan(1, now);
  EXPECT_TRUE(node->undone().none());
}

// ---- to the store --------------------------------------------------------------------------------------------------

class NodeDrainToStoreTest : public NodeDrainTest {
 protected:
  NodeDrainToStoreTest() {
    drives = nullptr;
    storage = &shared;
  }

  // Saved while the store took nothing.
  void keep_here(EngineHandle e, std::uint64_t seed, const Keys& keys) {
    const std::uint32_t group = std::exchange(shared.group, 0);
    keep(e, seed, seed, keys);
    shared.group = group;
  }
  void drain() {
    node->drain(now, now + kMinute);
    node->stop_lending();
    look();
  }
  // Whatever it does by itself, until it waits for somebody or for a later time.
  void look() {
    while (node->next_deadline() && *node->next_deadline() <= now) pass(0);
  }
  // Until it has nothing more to do; the store takes all.
  void end_all() {
    for (int turn = 0; turn < 1000 && !node->undone().none(); ++turn) {
      while (!shared.writes.empty()) end_write();
      if (node->next_deadline()) pass(std::max<Nanos>(*node->next_deadline() - now, 0));
    }
  }
  Keys written() {
    Keys all;
    for (const StoreWrite& write : shared.writes) all.insert(all.end(), write.keys.begin(), write.keys.end());
    return all;
  }
};

TEST_F(NodeDrainToStoreTest, GivesWhatOnlyHostMemoryHasTheHottestFirst) {
  start(64);
  const auto e = engine("e");
  std::vector<Keys> prompts;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    now += kSecond;
    keep_here(e, seed, prompts.emplace_back(keys_of(seed, 4)));
  }
  now += kSecond;
  shared.group = 0;
  (void)lookup(e, 10, prompts[1]);  // the only one that was used again
  shared.group = 4;
  ASSERT_TRUE(shared.writes.empty());
  drain();
  ASSERT_EQ(shared.writes.size(), 4U);
  EXPECT_EQ(shared.writes[0].keys, prompts[1]);
  EXPECT_EQ(shared.writes[1].keys, prompts[3]) << "of equals the latest first";
  EXPECT_EQ(shared.writes[2].keys, prompts[2]);
  EXPECT_EQ(shared.writes[3].keys, prompts[0]);
  EXPECT_EQ(node->undone().store_writes, 16U);
  EXPECT_EQ(node->undone().offered, 16U);
  EXPECT_FALSE(node->undone().none());
  end_all();
  EXPECT_TRUE(node->undone().none());
  EXPECT_EQ(shared.stored.size(), 16U);
}

TEST_F(NodeDrainToStoreTest, WritesNothingThatTheStoreHas) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 8);
  keep(e, 1, 1, part(keys, 0, 4));  // taken at once
  end_write();
  const auto stranger = keys_of(2, 4);
  keep_here(e, 2, stranger);
  shared.stored.insert(stranger.begin(), stranger.end());  // another node wrote them
  ASSERT_TRUE(shared.writes.empty());
  keep_here(e, 3, keys);
  drain();
  EXPECT_EQ(written(), part(keys, 4, 8));
  EXPECT_EQ(shared.writes[0].parent, keys[3]);
  end_all();
  EXPECT_TRUE(node->undone().none());
  EXPECT_EQ(node->undone().offered, 4U);
}

TEST_F(NodeDrainToStoreTest, LeavesWhatDrivesHaveButNotWhatMustPrecedeOthers) {
  drives = &disk;
  const auto e = start_with_drives(64);
  const auto alone = keys_of(1, 4);
  const auto both = keys_of(2, 8);
  keep_here(e, 1, alone);
  keep_here(e, 2, part(both, 0, 4));
  end_disk_writes();
  disk.admission = DiskAdmission::kBudget;
  keep_here(e, 3, both);
  drain();
  EXPECT_EQ(written(), both) << "behind what the store lacks nobody finds the rest";
  end_all();
  EXPECT_TRUE(node->undone().none());
}

TEST_F(NodeDrainToStoreTest, WaitsForAStoreThatTakesNothingAndSaysWhatWasLeft) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 6);
  keep_here(e, 1, keys);
  shared.group = 0;
  drain();
  EXPECT_EQ(node->undone().host_only, 6U);
  EXPECT_FALSE(node->undone().looks);
  pass(kMinute / 2);
  EXPECT_TRUE(shared.writes.empty());
  pass(kMinute);
  shared.group = 4;
  pass(kMinute);
  EXPECT_TRUE(shared.writes.empty()) << "its time is over";
  EXPECT_FALSE(node->next_deadline()) << "nothing will change by itself";
  EXPECT_EQ(node->undone().host_only, 6U);
  EXPECT_FALSE(node->undone().none());
  drain();  // once more: there is time again
  EXPECT_EQ(written().size(), 6U);
  end_all();
  EXPECT_TRUE(node->undone().none());
}

TEST_F(NodeDrainToStoreTest, TriesAgainWhatTheStoreFailedToWrite) {
  start(64);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  keep_here(e, 1, keys);
  drain();
  ASSERT_EQ(written(), keys);
  end_write(RemoteOutcome::kStoreFailed);
  EXPECT_FALSE(node->undone().none()) << "it is known to be left at once";
  end_all();
  EXPECT_TRUE(node->undone().none());
  EXPECT_EQ(shared.stored.size(), 4U);
}

TEST_F(NodeDrainToStoreTest, HoldsNoMoreMemoryForTheStoreThanEver) {
  start(64);
  const auto e = engine("e");
  for (std::uint64_t seed = 1; seed <= 4; ++seed) keep_here(e, seed, keys_of(seed, 15));
  drain();
  EXPECT_EQ(written().size(), 16U) << "a quarter of the pool";
  EXPECT_EQ(node->undone().host_only, 44U);
  end_all();
  EXPECT_TRUE(node->undone().none());
  EXPECT_EQ(shared.stored.size(), 60U);
}

TEST_F(NodeDrainToStoreTest, TakesWhatIsSavedMeanwhile) {
  start(64);
  const auto e = engine("e");
  keep_here(e, 1, keys_of(1, 4));
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 4)), Reason::kNone);
  drain();
  while (!shared.writes.empty()) end_write();
  shared.group = 0;  // when it is saved
  report(agents[0], 2);
  ASSERT_TRUE(done(2));
  look();
  EXPECT_FALSE(node->undone().none());
  shared.group = 4;
  end_all();
  EXPECT_TRUE(node->undone().none());
  EXPECT_EQ(shared.stored.size(), 8U);
}

TEST_F(NodeDrainToStoreTest, AResetLeavesNothingToBeGiven) {
  start(64);
  const auto e = engine("e");
  keep_here(e, 1, keys_of(1, 4));
  shared.group = 0;
  drain();
  ASSERT_EQ(node->undone().host_only, 4U);
  node->reset_here(now);
  look();
  EXPECT_TRUE(node->undone().none());
}

}  // namespace
}  // namespace flexkv::node
