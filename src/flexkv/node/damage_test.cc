// What devices say of blocks, on its way to whoever checks it; and blocks that turn out to be something else.
#include "flexkv/node/fake_drives.h"
#include "flexkv/node/import_fixture.h"

namespace flexkv::node {
namespace {

using Sums = std::vector<std::uint64_t>;

class NodeDamageTest : public NodeImportTest {
 protected:
  NodeDamageTest() { drives = &disk; }

  // One rank for each entry: the shard that it holds.
  EngineHandle start_with(std::uint64_t slots, const std::vector<std::uint32_t>& shards = {0}) {
    NodeOptions options;
    options.pool_bytes = slots * kPage * std::set<std::uint32_t>(shards.begin(), shards.end()).size();
    options.disk_admission = false;
    start(options);
    const auto ranks = static_cast<std::uint32_t>(shards.size());
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      auto hello = agent_hello("e", rank, ranks);
      hello.shard = shards[rank];
      agents.push_back(node->attach_agent(hello).value());
    }
    const EngineHandle handle = node->attach_client(client_hello("e", ranks)).value();
    const std::uint32_t drive_slots[] = {64, 64};
    node->on_disk_opened(disk.spaces.rbegin()->first, drive_slots, now);
    return handle;
  }
  void report_sums(AgentHandle agent, JobId job, Sums sums) {
    node->on_report(agent, {job, JobStatus::kDone, 0, std::move(sums)}, now);
    node->check_invariants();
  }
  void keep_summed(EngineHandle handle, SequenceId sequence, JobId job, const Keys& keys, Sums sums) {
    ASSERT_EQ(save(handle, sequence, job, keys), Reason::kNone);
    report_sums(agents[0], job, std::move(sums));
    node->close_sequence(handle, sequence);
  }
  void end(const DiskTransfer& transfer, DiskOutcome outcome) {
    const DiskResult result{transfer.op, outcome};
    node->on_disk_done({&result, 1}, now);
    node->check_invariants();
  }
  void end_writes(DiskOutcome outcome = DiskOutcome::kDone) {
    while (!disk.writes.empty()) {
      for (const DiskTransfer& transfer : std::exchange(disk.writes, {})) end(transfer, outcome);
    }
  }
  // Where the blocks of a save were put that takes all there is.
  std::set<std::uint64_t> places_of_a_save(EngineHandle handle, JobId job, std::uint64_t blocks) {
    EXPECT_EQ(save(handle, job, job, keys_of(job, blocks)), Reason::kNone);
    std::set<std::uint64_t> places;
    for (const auto& block : sent<proto::CopyCommand>(agents[0], job)[0].blocks()) places.insert(block.host_offset);
    report(agents[0], job, JobStatus::kFailed);
    node->close_sequence(handle, job);
    return places;
  }

  FakeDrives disk;
};

TEST_F(NodeDamageTest, WhatEachRankSaysOfItsShardGoesToTheDriveWithTheBlock) {
  const auto e = start_with(8, {0, 1});
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  report_sums(agents[1], 1, {21, kNoSum});
  report_sums(agents[0], 1, {11, 12});
  ASSERT_EQ(disk.writes.size(), 2U);
  ASSERT_EQ(disk.writes[0].sums.size(), 2U);
  for (std::size_t shard = 0; shard < 2; ++shard) {
    const SummedExtent& extent = disk.writes[0].sums[shard];
    EXPECT_EQ(extent.offset, shard * kPage);
    EXPECT_EQ(extent.bytes, 1000U);
    EXPECT_EQ(extent.sum, shard == 0 ? 11U : 21U);
  }
  ASSERT_EQ(disk.writes[1].sums.size(), 1U);
  EXPECT_EQ(disk.writes[1].sums[0].sum, 12U);
  end_writes();
  EXPECT_EQ(node->stats().blocks_checked, 2U);
}

TEST_F(NodeDamageTest, OfASaveInSlicesEachSumGoesToItsBlock) {
  const auto e = start_with(16, {0, 0, 0});
  constexpr std::uint64_t kBlocks = 7;
  for (JobId job = 1; job <= 3; ++job) {
    const Keys keys = keys_of(job, kBlocks);
    ASSERT_EQ(save(e, job, job, keys), Reason::kNone);
    for (const AgentHandle agent : agents) {
      Sums sums;  // of a block: where it was saved from
      for (const auto& block : sent<proto::CopyCommand>(agent, job)[0].blocks()) sums.push_back(block.device_block);
      report_sums(agent, job, sums);
    }
    ASSERT_EQ(disk.writes.size(), kBlocks);
    for (std::uint64_t i = 0; i < kBlocks; ++i) {
      ASSERT_EQ(disk.writes[i].sums.size(), 1U);
      EXPECT_EQ(disk.writes[i].sums[0].sum, 100 + i);
    }
    end_writes();
    node->close_sequence(e, job);
  }
}

TEST_F(NodeDamageTest, SumsThatFitNoCommandOrCameTooLateCountForNothing) {
  const auto e = start_with(16);
  keep_summed(e, 1, 1, keys_of(1, 2), {1, 2, 3});
  ASSERT_EQ(disk.writes.size(), 2U);
  EXPECT_TRUE(disk.writes[0].sums.empty());
  end_writes();
  // Its device blocks are about to be overwritten: what a rank says of them afterwards is no damage.
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 2)), Reason::kNone);
  node->cancel(e, 2);
  report_sums(agents[0], 2, {4, 5});
  EXPECT_TRUE(disk.writes.empty());
  EXPECT_EQ(failure(2), Reason::kCanceled);
  EXPECT_EQ(node->stats().blocks_damaged, 0U);
}

TEST_F(NodeDamageTest, ADamagedBlockIsCountedAndNotFoundAgainUntilItIsSavedAnew) {
  const auto e = start_with(16);
  const Keys keys = keys_of(1, 3);
  keep_summed(e, 1, 1, keys, {1, 2, 3});
  const auto writes = std::exchange(disk.writes, {});
  end(writes[1], DiskOutcome::kDamaged);
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
  EXPECT_EQ(node->stats().unwritten_blocks[static_cast<std::size_t>(Reason::kDamaged)], 1U);
  EXPECT_EQ(node->stats().blocks_checked, 0U);
  const auto found = lookup(e, 2, keys);
  EXPECT_EQ(found.matched_blocks, 1U);
  EXPECT_EQ(found.reason, Reason::kChecksum);
  EXPECT_EQ(load(e, 2, 10, keys, 1), Reason::kGone);
  node->close_sequence(e, 2);
  end(writes[0], DiskOutcome::kDone);
  end(writes[2], DiskOutcome::kDone);

  keep_summed(e, 3, 3, keys, {7, 8});
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 3U);
  ASSERT_EQ(disk.writes.size(), 1U);
  EXPECT_EQ(disk.writes[0].sums[0].sum, 7U);
  end_writes();
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
}

// A sequence that was looked up before must not be promised what is not there any more.
TEST_F(NodeDamageTest, ALookupFromBeforeFindsTheHole) {
  const auto e = start_with(16);
  const Keys keys = keys_of(1, 3);
  keep_summed(e, 1, 1, keys, {1, 2, 3});
  ASSERT_EQ(lookup(e, 2, keys).matched_blocks, 3U);
  end(disk.writes[0], DiskOutcome::kDamaged);
  EXPECT_EQ(load(e, 2, 10, keys), Reason::kGone);
}

TEST_F(NodeDamageTest, ItsSlotIsNotUsedAgainWhileALoadMayReadIt) {
  constexpr std::uint64_t kSlots = 4;
  const auto e = start_with(kSlots);
  const Keys keys = keys_of(1, 1);
  keep_summed(e, 1, 1, keys, {1});
  lookup(e, 2, keys);
  ASSERT_EQ(load(e, 2, 10, keys), Reason::kNone);
  const std::uint64_t place = sent<proto::CopyCommand>(agents[0], 10)[0].blocks()[0].host_offset;
  end(disk.writes[0], DiskOutcome::kDamaged);
  now += kMillisecond;
  EXPECT_EQ(places_of_a_save(e, 20, kSlots - 1).count(place), 0U);
  EXPECT_EQ(node->blocks_in_use(), 1U);
  report(agents[0], 10);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  EXPECT_EQ(places_of_a_save(e, 21, kSlots).count(place), 1U);
}

TEST_F(NodeDamageTest, ABlockThatIsDamagedWhenItIsLentIsDroppedAndStaysUntilItIsGivenBack) {
  const auto e = start_with(16);
  const Keys keys = keys_of(1, 3);
  keep_summed(e, 1, 1, keys, {1, kNoSum, 3});
  end_writes(DiskOutcome::kFailed);
  const Loan loan = lend(1, keys, 1);
  ASSERT_EQ(loan.sums.size(), 2U);
  EXPECT_TRUE(loan.sums[0].empty());
  ASSERT_EQ(loan.sums[1].size(), 1U);
  EXPECT_EQ(loan.sums[1][0].sum, 3U);
  lend(2, keys, 2);
  node->on_loan_damaged(1, 1, now);
  node->on_loan_damaged(1, 1, now);
  node->on_loan_damaged(1, 7, now);
  node->check_invariants();
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 2U);
  EXPECT_EQ(node->blocks_in_use(), 3U);
  node->end_loan(1, now);
  EXPECT_EQ(node->blocks_in_use(), 3U) << "the other loan has it still";
  node->on_loan_damaged(2, 0, now);
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
  node->end_loan(2, now);
  EXPECT_EQ(node->blocks_in_use(), 2U);
}

// Two find it at once, and between them it was saved anew.
TEST_F(NodeDamageTest, WhatWasSavedAnewIsNotTakenForWhatWasThere) {
  const auto e = start_with(8);
  const Keys keys = keys_of(1, 1);
  keep_summed(e, 1, 1, keys, {1});
  lend(1, keys);
  end(disk.writes[0], DiskOutcome::kDamaged);
  disk.writes.clear();
  keep_summed(e, 2, 2, keys, {2});
  node->on_loan_damaged(1, 0, now);
  EXPECT_EQ(lookup(e, 3, keys).matched_blocks, 1U);
  EXPECT_EQ(node->stats().blocks_damaged, 1U);
  node->end_loan(1, now);
  end_writes();
}

TEST_F(NodeDamageTest, ASlotForgetsItsSumWhenAnotherBlockComesToLieThere) {
  const auto e = start_with(2);
  keep_summed(e, 1, 1, keys_of(1, 2), {1, 2});
  end_writes();
  keep_summed(e, 2, 2, keys_of(2, 2), {});
  ASSERT_EQ(disk.writes.size(), 1U);
  EXPECT_TRUE(disk.writes[0].sums.empty());
  end_writes();
  // Nor is what comes from a drive what was saved there before.
  lookup(e, 3, keys_of(1, 1));
  ASSERT_EQ(load(e, 3, 10, keys_of(1, 1)), Reason::kNone);
  ASSERT_EQ(disk.reads.size(), 1U);
  end(disk.reads[0], DiskOutcome::kDone);
  report(agents[0], 10);
  EXPECT_TRUE(lend(1, keys_of(1, 1)).sums[0].empty());
  node->end_loan(1, now);
}

TEST_F(NodeDamageTest, OfWhatWasResetMeanwhileNothingIsLeftToDrop) {
  const auto e = start_with(8);
  keep_summed(e, 1, 1, keys_of(1, 1), {1});
  lend(1, keys_of(1, 1));
  node->reset(e, now);
  end(disk.writes[0], DiskOutcome::kDamaged);
  node->on_loan_damaged(1, 0, now);
  node->end_loan(1, now);
  node->check_invariants();
  EXPECT_EQ(node->stats().blocks_damaged, 0U);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

}  // namespace
}  // namespace flexkv::node
