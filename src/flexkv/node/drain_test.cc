// A node that drains: what it still does, what it refuses, and when nothing is left.
#include "flexkv/node/fake_drives.h"
#include "flexkv/node/import_fixture.h"

namespace flexkv::node {
namespace {

class NodeDrainTest : public NodeImportTest {
 protected:
  NodeDrainTest() { drives = &disk; }

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
  node->drain(now);
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
  node->drain(now);
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
  node->drain(now);
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

}  // namespace
}  // namespace flexkv::node
