// Blocks from beyond the machine, and those that are lent there.
#include "flexkv/node/fake_drives.h"
#include "flexkv/node/import_fixture.h"

namespace flexkv::node {
namespace {

TEST_F(NodeImportTest, FindsBehindItsOwnBlocksWhatOthersHave) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 5);
  keep(e, 1, 1, Keys(keys.begin(), keys.begin() + 2));
  store(keys);
  const auto found = lookup(e, 2, keys);
  EXPECT_EQ(found.matched_blocks, 5U);
  EXPECT_EQ(found.host_blocks, 2U);
  EXPECT_EQ(found.remote_blocks, 3U);
  ASSERT_EQ(load(e, 2, 10, keys), Reason::kNone);
  ASSERT_EQ(remote.reads.size(), 1U);
  EXPECT_EQ(remote.reads[0].first, 2U);
  EXPECT_EQ(remote.reads[0].keys, keys);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 10).front().blocks().size(), 2U);  // goes ahead
  bring(3);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
  EXPECT_EQ(node->stats().from_remote.blocks, 3U);
  EXPECT_EQ(lookup(e, 3, keys).host_blocks, 5U);  // kept here from now on
}

TEST_F(NodeImportTest, OfABrokenReadTheBeginningIsKept) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 5);
  store(keys);
  ASSERT_EQ(lookup(e, 1, keys).matched_blocks, 5U);
  ASSERT_EQ(load(e, 1, 10, keys), Reason::kNone);
  bring(3, RemoteOutcome::kUnreachable);
  report(agents[0], 10);
  EXPECT_EQ(failure(10), Reason::kPeerUnreachable);
  EXPECT_EQ(result(10)->good_blocks, 3U);
  remote.stored.clear();
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 3U);
}

TEST_F(NodeImportTest, OneReadForAllWhoWantABlock) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 6);
  store(keys);
  const Keys head(keys.begin(), keys.begin() + 4);
  ASSERT_EQ(lookup(e, 1, head).matched_blocks, 4U);
  ASSERT_EQ(load(e, 1, 10, head), Reason::kNone);
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 6U);
  ASSERT_EQ(load(e, 2, 11, keys), Reason::kNone);
  ASSERT_EQ(remote.reads.size(), 2U);
  EXPECT_EQ(remote.reads[1].first, 4U);
  std::swap(remote.reads[0], remote.reads[1]);
  bring(2);  // cannot be found before what precedes it
  remote.stored.clear();
  EXPECT_EQ(lookup(e, 3, keys).matched_blocks, 6U);  // all of it on its way
  EXPECT_EQ(lookup(e, 3, keys).host_blocks, 0U);
  bring(4);
  EXPECT_EQ(lookup(e, 3, keys).host_blocks, 6U);
  report(agents[0], 10);
  report(agents[0], 11);
  EXPECT_TRUE(done(10) && done(11));
}

TEST_F(NodeImportTest, WhatCameBehindAGapIsOfNoUse) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 6);
  store(keys);
  const Keys head(keys.begin(), keys.begin() + 4);
  lookup(e, 1, head);
  ASSERT_EQ(load(e, 1, 10, head), Reason::kNone);
  lookup(e, 2, keys);
  ASSERT_EQ(load(e, 2, 11, keys), Reason::kNone);
  std::swap(remote.reads[0], remote.reads[1]);
  bring(2);
  bring(1, RemoteOutcome::kChecksum);
  report(agents[0], 10);
  report(agents[0], 11);
  EXPECT_EQ(failure(10), Reason::kChecksum);
  EXPECT_EQ(failure(11), Reason::kChecksum);
  EXPECT_EQ(result(11)->good_blocks, 1U);
  EXPECT_EQ(node->spaces()[0].used, 1U);
}

TEST_F(NodeImportTest, APrefetchBringsWhatALoadThenFinds) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  store(keys);
  EXPECT_EQ(node->prefetch(e, {1, 0, keys}, now), Reason::kNone);
  ASSERT_EQ(remote.reads.size(), 1U);
  EXPECT_EQ(lookup(e, 1, keys).remote_blocks, 4U);
  bring(4);
  EXPECT_EQ(lookup(e, 1, keys).host_blocks, 4U);
}

TEST_F(NodeImportTest, WhatIsComputedFasterIsNotRead) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  store(keys);
  node->set_prefill(e, {0, 1e3, 0, 0});  // 16 us for a block
  remote.bytes_per_second = 4096e3;      // 1 ms
  const auto found = lookup(e, 1, keys);
  EXPECT_EQ(found.matched_blocks, 0U);
  EXPECT_EQ(found.reason, Reason::kNotWorthLoading);
  remote.bytes_per_second = 4096e6;
  EXPECT_EQ(lookup(e, 1, keys).matched_blocks, 4U);
}

TEST_F(NodeImportTest, ACanceledLoadCancelsItsReadUnlessAnotherWaits) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  store(keys);
  lookup(e, 1, keys);
  ASSERT_EQ(load(e, 1, 10, keys), Reason::kNone);
  lookup(e, 2, keys);
  ASSERT_EQ(load(e, 2, 11, keys), Reason::kNone);
  node->cancel(e, 10);
  EXPECT_TRUE(remote.canceled.empty());
  node->cancel(e, 11);
  EXPECT_EQ(remote.canceled.size(), 1U);
  lookup(e, 3, keys);
  ASSERT_EQ(load(e, 3, 12, keys), Reason::kNone);  // joins the read that is being canceled
  ASSERT_EQ(remote.reads.size(), 1U);
  bring(1, RemoteOutcome::kCanceled);
  ASSERT_EQ(remote.reads.size(), 1U);  // the rest of it, again
  EXPECT_EQ(remote.reads[0].first, 1U);
  bring(3);
  for (const JobId job : {10U, 11U}) report(agents[0], job, JobStatus::kCanceled);
  report(agents[0], 12);
  EXPECT_TRUE(done(12));
}

TEST_F(NodeImportTest, LendsWhatItHasAndKeepsItMeanwhile) {
  start(8);
  const auto e = engine("e");
  const auto keys = keys_of(1, 2);
  keep(e, 1, 1, keys);
  node->close_sequence(e, 1);
  const auto wanted = keys_of(1, 3);
  EXPECT_EQ(lend(1, wanted, 1).host_offsets.size(), 1U);
  EXPECT_EQ(loans[1].limit, Loan::Limit::kMissing);
  EXPECT_EQ(save(e, 2, 2, keys_of(2, 8)), Reason::kNone);
  EXPECT_EQ(node->stats().unsaved_blocks[static_cast<std::size_t>(Reason::kPoolFull)], 2U);  // what is lent stays
  report(agents[0], 2, JobStatus::kFailed);
  node->end_loan(1, now);
  EXPECT_EQ(save(e, 3, 3, keys_of(3, 8)), Reason::kNone);
  EXPECT_EQ(lend(2, wanted).host_offsets.size(), 0U);
  node->end_loan(2, now);
  report(agents[0], 3, JobStatus::kFailed);
}

TEST_F(NodeImportTest, LendsNothingOfBeforeAResetAndNotMoreThanItsShare) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 10);
  keep(e, 1, 1, keys);
  EXPECT_EQ(lend(1, keys, 2).host_offsets.size(), 6U) << "with the two before them, half of the pool";
  EXPECT_EQ(loans[1].limit, Loan::Limit::kBusy);
  EXPECT_EQ(lend(2, keys).host_offsets.size(), 0U);
  node->end_loan(1, now);
  node->end_loan(2, now);
  node->reset(e, now);
  EXPECT_EQ(lend(3, keys).host_offsets.size(), 0U);
  EXPECT_EQ(loans[3].limit, Loan::Limit::kMissing);
  node->end_loan(3, now);
}

TEST_F(NodeImportTest, AfterAResetNobodyWaitsForWhatWasAskedForBefore) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  store(keys);
  lookup(e, 1, keys);
  ASSERT_EQ(load(e, 1, 10, keys), Reason::kNone);
  node->reset(e, now);
  node->check_invariants();
  EXPECT_EQ(remote.canceled.size(), 1U);
  remote.stored.clear();
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 0U);
  store(keys);
  EXPECT_EQ(lookup(e, 3, keys).matched_blocks, 4U);
  ASSERT_EQ(load(e, 3, 11, keys), Reason::kNone);
  ASSERT_EQ(remote.reads.size(), 2U) << "the new load has a read of its own";
  bring(2, RemoteOutcome::kCanceled);
  bring(4);
  report(agents[0], 10, JobStatus::kCanceled);
  report(agents[0], 11);
  EXPECT_EQ(failure(10), Reason::kReset);
  EXPECT_TRUE(done(11));
}

TEST_F(NodeImportTest, WhatPrecedesALoadIsNotCanceledWithOthers) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 4);
  store(keys);
  EXPECT_EQ(node->prefetch(e, {1, 0, Keys(keys.begin(), keys.begin() + 2)}, now), Reason::kNone);
  lookup(e, 2, keys);
  ASSERT_EQ(load(e, 2, 10, keys, 2), Reason::kNone);
  lookup(e, 3, keys);
  ASSERT_EQ(load(e, 3, 11, keys, 2), Reason::kNone);
  node->cancel(e, 11);
  EXPECT_TRUE(remote.canceled.empty());
  bring(2);
  bring(2);
  report(agents[0], 10);
  report(agents[0], 11, JobStatus::kCanceled);
  EXPECT_TRUE(done(10));
}

class NodeLoansFromDrivesTest : public NodeImportTest {
 protected:
  NodeLoansFromDrivesTest() { drives = &disk; }

  // Blocks that are on drives only.
  Keys kept_on_drives() {
    NodeOptions options;
    options.pool_bytes = 16 * kPage;
    options.disk_admission = false;
    start(options);
    e = engine("e");
    const std::uint32_t slots[] = {32, 32};
    node->on_disk_opened(disk.spaces.rbegin()->first, slots, now);
    const auto keys = keys_of(1, 3);
    keep(e, 1, 1, keys);
    end_all(disk.writes);
    node->close_sequence(e, 1);
    EXPECT_EQ(save(e, 2, 2, keys_of(2, 16)), Reason::kNone);
    report(agents[0], 2, JobStatus::kFailed);
    node->close_sequence(e, 2);
    return keys;
  }
  void end_all(std::vector<DiskTransfer>& list, DiskOutcome outcome = DiskOutcome::kDone) {
    while (!list.empty()) {
      const DiskResult result{list.front().op, outcome};
      list.erase(list.begin());
      node->on_disk_done({&result, 1}, now);
      node->check_invariants();
    }
  }

  FakeDrives disk;
  EngineHandle e = 0;
};

TEST_F(NodeLoansFromDrivesTest, ReadsThemFirst) {
  const auto keys = kept_on_drives();
  lend(1, keys, 1);
  ASSERT_EQ(disk.reads.size(), 2U);
  EXPECT_TRUE(loans[1].host_offsets.empty());
  end_all(disk.reads);
  EXPECT_EQ(loans[1].host_offsets.size(), 2U);
  EXPECT_EQ(loans[1].limit, Loan::Limit::kNone);
  node->end_loan(1, now);
}

// Of a chain that is none, in the hope that a block is read from where another one lies.
TEST_F(NodeLoansFromDrivesTest, BelievesNoKeyThatABorrowerSays) {
  const auto keys = kept_on_drives();
  for (const std::size_t forged : {0U, 1U}) {
    Keys chain = keys;
    chain[forged] = {7, 7};
    EXPECT_EQ(lend(1, chain).limit, Loan::Limit::kMissing);
    EXPECT_EQ(disk.reads.size(), forged) << "what comes before it, at most";
    end_all(disk.reads);
    EXPECT_EQ(loans[1].host_offsets.size(), forged);
    node->end_loan(1, now);
  }
}

TEST_F(NodeLoansFromDrivesTest, GivesWhatCameBeforeABadBlock) {
  const auto keys = kept_on_drives();
  lend(1, keys);
  ASSERT_EQ(disk.reads.size(), 3U);
  std::swap(disk.reads[0], disk.reads[1]);
  std::vector<DiskTransfer> bad{disk.reads[0]};
  disk.reads.erase(disk.reads.begin());
  end_all(bad, DiskOutcome::kChecksum);
  end_all(disk.reads);
  EXPECT_EQ(loans[1].host_offsets.size(), 1U);
  EXPECT_EQ(loans[1].limit, Loan::Limit::kMissing);
  node->end_loan(1, now);
}

TEST_F(NodeLoansFromDrivesTest, AResetMeanwhileEndsThemWithoutBlocks) {
  const auto keys = kept_on_drives();
  lend(1, keys);
  node->reset(e, now);
  end_all(disk.reads);
  EXPECT_TRUE(loans[1].host_offsets.empty());
  EXPECT_EQ(loans[1].limit, Loan::Limit::kMissing);
  node->end_loan(1, now);
}

TEST_F(NodeLoansFromDrivesTest, AnswersAtItsDeadlineAndALoadGoesOn) {
  const auto keys = kept_on_drives();
  lend(1, keys);
  lookup(e, 3, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  EXPECT_EQ(disk.reads.size(), 3U);  // the same ones
  EXPECT_EQ(*node->next_deadline(), now + kSecond);
  now += kSecond;
  node->on_time(now);
  EXPECT_EQ(loans[1].limit, Loan::Limit::kDeadline);
  node->end_loan(1, now);
  end_all(disk.reads);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
}

TEST_F(NodeLoansFromDrivesTest, ALoadThatIsCanceledLeavesItsReadsToThem) {
  const auto keys = kept_on_drives();
  lookup(e, 3, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  lend(1, keys);
  node->cancel(e, 10);
  EXPECT_TRUE(disk.canceled.empty());
  end_all(disk.reads);
  EXPECT_EQ(loans[1].host_offsets.size(), 3U);
  node->end_loan(1, now);
  report(agents[0], 10, JobStatus::kCanceled);
}

TEST_F(NodeImportTest, WhatLiesBeyondIsCalledInItsTime) {
  start(16);
  EXPECT_FALSE(node->next_deadline());
  remote.time = now + kSecond;
  EXPECT_EQ(node->next_deadline(), now + kSecond);
  node->on_time(now);
  EXPECT_TRUE(remote.time);
  node->on_time(now + kSecond);
  EXPECT_FALSE(remote.time);
}

TEST_F(NodeImportTest, WhatLiesBeyondIsToldWhatABlockIsWorth) {
  start(16);
  const EngineHandle e = engine("e");
  const auto keys = keys_of(1, 4);
  lookup(e, 1, keys);
  EXPECT_EQ(remote.block_worth, 0) << "the engine has not told how fast it computes";
  node->set_prefill(e, {0, 1000, 1, 0});
  lookup(e, 2, keys);
  EXPECT_DOUBLE_EQ(remote.block_worth, 16 * 1000 + 16 * (3 * 16 + 8.5)) << "the last one, behind three others";
}

}  // namespace
}  // namespace flexkv::node
