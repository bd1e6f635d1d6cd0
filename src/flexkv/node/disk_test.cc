// The node with drives that do what the test says.
#include <set>

#include "flexkv/node/disk_slots.h"
#include "flexkv/node/fake_drives.h"
#include "flexkv/node/node_fixture.h"

namespace flexkv::node {
namespace {

class NodeDiskTest : public NodeTest {
 protected:
  NodeDiskTest() { drives = &disk; }

  // An engine whose space is open, with so many slots on each drive.
  EngineHandle start_with_engine(std::uint64_t host_slots, std::uint32_t drive_slots) {
    start(host_slots);
    host_slots_ = host_slots;
    const EngineHandle handle = engine("e");
    opened(drive_slots);
    return handle;
  }
  void opened(std::uint32_t drive_slots) {
    const std::uint32_t slots[] = {drive_slots, drive_slots};
    node->on_disk_opened(disk.spaces.rbegin()->first, slots, now);
    node->check_invariants();
  }
  void end(const DiskTransfer& transfer, DiskOutcome outcome = DiskOutcome::kDone) {
    const DiskResult result{transfer.op, outcome};
    node->on_disk_done({&result, 1}, now);
    node->check_invariants();
  }
  void end_all(std::vector<DiskTransfer>& list, DiskOutcome outcome = DiskOutcome::kDone) {
    while (!list.empty()) {
      for (const DiskTransfer& transfer : std::exchange(list, {})) end(transfer, outcome);
    }
  }
  // Keeps the blocks, has them written, and pushes them out of host memory.
  void keep_on_drives(EngineHandle handle, const Keys& keys) {
    keep(handle, 1, next_job++, keys);
    end_all(disk.writes);
    node->close_sequence(handle, 1);
    push_out(handle);
  }
  // Has the first of the keys loaded from its drive, which takes 100 ms.
  void read_one_slowly(EngineHandle handle, const Keys& keys) {
    ASSERT_EQ(load(handle, 3, 10, Keys(keys.begin(), keys.begin() + 1)), Reason::kNone);
    now += 100 * kMillisecond;
    end_all(disk.reads);
    report(agents[0], 10);
    node->close_sequence(handle, 3);
  }
  void push_out(EngineHandle handle) {
    const Keys other = keys_of(1000 + next_job, host_slots_);
    ASSERT_EQ(save(handle, 2, next_job, other), Reason::kNone);
    report(agents[0], next_job++, JobStatus::kFailed);
    node->close_sequence(handle, 2);
  }
  std::uint64_t unfetched(Reason reason) const {
    return node->stats().unfetched_blocks[static_cast<std::size_t>(reason)];
  }
  std::uint64_t unwritten(Reason reason) const {
    return node->stats().unwritten_blocks[static_cast<std::size_t>(reason)];
  }

  FakeDrives disk;
  JobId next_job = 100;

 private:
  std::uint64_t host_slots_ = 0;
};

TEST_F(NodeDiskTest, WritesWhatIsPublishedInOrderAndOverAllDrives) {
  const auto e = start_with_engine(8, 8);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 4)), Reason::kNone);
  EXPECT_TRUE(disk.writes.empty());
  report(agents[0], 1);
  ASSERT_EQ(disk.writes.size(), 4U);
  const auto keys = keys_of(1, 4);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(disk.writes[i].key, keys[i]);
    EXPECT_EQ(disk.writes[i].parent, i == 0 ? key::BlockKey{} : keys[i - 1]);
    EXPECT_EQ(disk.writes[i].slot % 2, i % 2);
  }
  end_all(disk.writes);
  keep(e, 2, 2, keys_of(1, 4));
  EXPECT_TRUE(disk.writes.empty());  // kept already
  EXPECT_EQ(node->spaces()[0].disk_used, 4U);
}

TEST_F(NodeDiskTest, WaitsWithWritesUntilTheDrivesAreOpen) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 2));
  EXPECT_TRUE(disk.writes.empty());
  EXPECT_EQ(lookup(e, 2, keys_of(2, 1)).reason, Reason::kRecovering);
  opened(4);
  EXPECT_EQ(disk.writes.size(), 2U);
  EXPECT_EQ(lookup(e, 3, keys_of(2, 1)).reason, Reason::kNeverSeen);
}

TEST_F(NodeDiskTest, BlocksThatAreWrittenStayInHostMemoryUntilTheyAre) {
  const auto e = start_with_engine(4, 8);
  keep(e, 1, 1, keys_of(1, 2));
  node->close_sequence(e, 1);
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 4)), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 2)[0].blocks().size(), 2U);
}

TEST_F(NodeDiskTest, ALoadGetsAtOnceWhatHostMemoryHasAndTheRestAsItComes) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 4);
  keep_on_drives(e, keys);
  keep(e, 3, 1, Keys(keys.begin(), keys.begin() + 1));  // known: nothing to save, but
  const auto found = lookup(e, 4, keys);
  EXPECT_EQ(found.matched_blocks, 4U);
  EXPECT_EQ(found.disk_blocks, 4U);
  EXPECT_EQ(found.host_blocks, 0U);
  // Brings two of them to host memory.
  ASSERT_EQ(load(e, 4, 10, Keys(keys.begin(), keys.begin() + 2)), Reason::kNone);
  end_all(disk.reads);
  report(agents[0], 10);
  ASSERT_TRUE(done(10));
  EXPECT_EQ(lookup(e, 5, keys).disk_blocks, 2U);
  EXPECT_EQ(lookup(e, 5, keys).host_blocks, 2U);

  ASSERT_EQ(load(e, 5, 11, keys), Reason::kNone);
  auto pieces = sent<proto::CopyCommand>(agents[0], 11);
  ASSERT_EQ(pieces.size(), 1U);
  EXPECT_EQ(pieces[0].blocks().size(), 2U);
  EXPECT_FALSE(pieces[0].last);
  ASSERT_EQ(disk.reads.size(), 2U);
  end(disk.reads[1]);
  end(disk.reads[0]);
  pieces = sent<proto::CopyCommand>(agents[0], 11);
  ASSERT_EQ(pieces.size(), 3U);
  EXPECT_EQ(pieces[1].piece, 1U);
  EXPECT_EQ(pieces[1].blocks()[0].host_offset, disk.reads[1].host_offset);
  EXPECT_FALSE(pieces[1].last);
  EXPECT_TRUE(pieces[2].last);
  EXPECT_FALSE(result(11));
  report(agents[0], 11);
  EXPECT_TRUE(done(11));
  EXPECT_EQ(lookup(e, 6, keys).disk_blocks, 0U);
  EXPECT_EQ(lookup(e, 6, keys).host_blocks, 4U);
}

TEST_F(NodeDiskTest, RequestsForOneColdBlockShareOneRead) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 2);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  ASSERT_EQ(load(e, 4, 11, keys), Reason::kNone);
  ASSERT_EQ(disk.reads.size(), 2U);
  end_all(disk.reads);
  for (const JobId job : {JobId{10}, JobId{11}}) {
    EXPECT_EQ(sent<proto::CopyCommand>(agents[0], job).back().last, true);
    report(agents[0], job);
    EXPECT_TRUE(done(job));
  }
}

TEST_F(NodeDiskTest, ALoadEndsBeforeABadBlockAndTheBlockIsForgotten) {
  const auto e = start_with_engine(16, 8);
  const auto keys = keys_of(1, 5);
  keep_on_drives(e, keys);
  EXPECT_EQ(lookup(e, 3, keys).matched_blocks, 5U);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  const auto reads = disk.reads;
  ASSERT_EQ(reads.size(), 5U);
  end(reads[0]);
  end(reads[3]);
  end(reads[2], DiskOutcome::kChecksum);
  EXPECT_TRUE(sent<proto::CancelCommand>(agents[0], 10).empty());
  EXPECT_FALSE(sent<proto::CopyCommand>(agents[0], 10).back().last);
  end(reads[4]);  // of no use to the load, but in host memory now
  end(reads[1]);
  const auto pieces = sent<proto::CopyCommand>(agents[0], 10);
  ASSERT_EQ(pieces.size(), 4U);
  EXPECT_TRUE(pieces[0].runs.empty());
  EXPECT_EQ(pieces[1].spans[0].first, 0U);
  EXPECT_EQ(pieces[2].spans[0].first, 3U);
  EXPECT_EQ(pieces[3].spans[0].first, 1U);
  for (const auto& piece : pieces) {
    EXPECT_EQ(piece.job_blocks, 5U);
    EXPECT_EQ(piece.last, &piece == &pieces.back());
  }
  EXPECT_FALSE(result(10));
  report(agents[0], 10);
  EXPECT_EQ(failure(10), Reason::kChecksum);
  EXPECT_EQ(result(10)->good_blocks, 2U);
  EXPECT_EQ(unfetched(Reason::kChecksum), 1U);

  const auto found = lookup(e, 3, keys);  // also by the sequence that had found it
  EXPECT_EQ(found.matched_blocks, 2U);
  EXPECT_EQ(found.disk_blocks, 0U);
  EXPECT_EQ(found.reason, Reason::kChecksum);
  ASSERT_EQ(load(e, 3, 11, Keys(keys.begin(), keys.begin() + 2)), Reason::kNone);
  report(agents[0], 11);
  EXPECT_TRUE(done(11));
  keep(e, 3, 12, keys);
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 5U);
}

TEST_F(NodeDiskTest, AllThatWaitForABadBlockEndBeforeIt) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  proto::TransferRequest behind{false, false, 4, 11, 0, keys, 2, {7}};  // that block only
  ASSERT_EQ(node->load(e, behind, now), Reason::kNone);
  const auto reads = disk.reads;
  ASSERT_EQ(reads.size(), 3U);
  end(reads[0]);
  end(reads[1]);
  EXPECT_FALSE(sent<proto::CopyCommand>(agents[0], 10).back().last);
  end(reads[2], DiskOutcome::kFailed);
  const auto last = sent<proto::CopyCommand>(agents[0], 10).back();
  EXPECT_TRUE(last.last);  // says only that nothing more comes
  EXPECT_TRUE(last.runs.empty());
  report(agents[0], 10);
  EXPECT_EQ(result(10)->good_blocks, 2U);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 11).size(), 1U);  // nothing of it comes
  report(agents[0], 11, JobStatus::kCanceled);
  EXPECT_EQ(failure(11), Reason::kDiskFailed);
  EXPECT_EQ(lookup(e, 5, keys).reason, Reason::kDiskFailed);
}

TEST_F(NodeDiskTest, TheEarliestOfSeveralBadBlocksCounts) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 4);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  const auto reads = disk.reads;
  end(reads[3], DiskOutcome::kDeadline);
  end(reads[1], DiskOutcome::kChecksum);
  end(reads[2], DiskOutcome::kFailed);
  end(reads[0]);
  report(agents[0], 10);
  EXPECT_EQ(failure(10), Reason::kChecksum);
  EXPECT_EQ(result(10)->good_blocks, 1U);
}

TEST_F(NodeDiskTest, ADriveThatIsOffEndsWhatLookupsPromise) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  disk.off = 1;
  const auto found = lookup(e, 3, keys);
  EXPECT_EQ(found.matched_blocks, 1U);
  EXPECT_EQ(found.reason, Reason::kDiskOff);
  disk.admission = DiskAdmission::kUnavailable;
  ASSERT_EQ(load(e, 3, 10, Keys(keys.begin(), keys.begin() + 1)), Reason::kNone);
  report(agents[0], 10, JobStatus::kCanceled);
  EXPECT_EQ(failure(10), Reason::kDiskOff);
  disk.admission = DiskAdmission::kQueued;
  disk.off = 99;
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 3U);  // nothing was lost
}

TEST_F(NodeDiskTest, WhoWaitsForADriveThatGoesOffGivesUpAndItsReadKeepsItsSlot) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  const auto reads = disk.reads;
  ASSERT_EQ(reads.size(), 3U);
  node->on_disk_overdue(reads[1].op, now);
  EXPECT_TRUE(sent<proto::CopyCommand>(agents[0], 10).size() == 1) << "it is late, and may still come";
  disk.off = 1;
  node->on_disk_overdue(reads[1].op, now);
  node->check_invariants();
  end(reads[0]);
  report(agents[0], 10);
  EXPECT_EQ(failure(10), Reason::kDiskOff);
  EXPECT_EQ(result(10)->good_blocks, 1U) << "what came before it";
  EXPECT_EQ(node->disk_queues().fetches, 2U) << "the drives have their buffers";
  node->on_disk_overdue(reads[1].op, now);
  disk.off = 99;
  end(reads[1]);
  end(reads[2], DiskOutcome::kCanceled);
  EXPECT_EQ(node->disk_queues().fetches, 0U);
  EXPECT_EQ(lookup(e, 4, keys).disk_blocks, 1U) << "what was read all the same is there";
}

TEST_F(NodeDiskTest, ALoadThatIsGivenUpLetsItsReadsEndAndKeepsWhatTheyBrought) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 2);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  const auto reads = disk.reads;
  now += 10 * kSecond;
  node->on_time(now);
  report(agents[0], 10, JobStatus::kCanceled);
  EXPECT_EQ(failure(10), Reason::kDeadline);
  EXPECT_EQ(node->disk_queues().fetches, 2U);
  for (const auto& read : reads) end(read);
  EXPECT_EQ(node->disk_queues().fetches, 0U);
  EXPECT_EQ(lookup(e, 4, keys).disk_blocks, 0U);
}

TEST_F(NodeDiskTest, ReadsOfAnAbortedLoadAreCanceledUnlessOthersWaitForThem) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  ASSERT_EQ(load(e, 4, 11, Keys(keys.begin(), keys.begin() + 1)), Reason::kNone);
  const auto reads = disk.reads;
  ASSERT_EQ(reads.size(), 3U);
  node->cancel(e, 10);
  EXPECT_EQ(disk.canceled, (std::vector{reads[1].op, reads[2].op}));
  end(reads[1], DiskOutcome::kCanceled);
  end(reads[2]);  // had begun
  end(reads[0]);
  report(agents[0], 11);
  report(agents[0], 10, JobStatus::kCanceled);
  EXPECT_TRUE(done(11));
  EXPECT_EQ(failure(10), Reason::kCanceled);
  EXPECT_EQ(unfetched(Reason::kCanceled), 1U);
  EXPECT_EQ(node->disk_queues().fetches, 0U);
  const auto found = lookup(e, 5, keys);
  EXPECT_EQ(found.matched_blocks, 3U) << "nothing was lost";
  EXPECT_EQ(found.disk_blocks, 1U);
}

TEST_F(NodeDiskTest, WhoWaitsForABlockWhoseReadWasJustCanceledGetsAnotherRead) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 1);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  node->cancel(e, 10);
  ASSERT_EQ(load(e, 4, 11, keys), Reason::kNone);
  const auto canceled = std::exchange(disk.reads, {});
  ASSERT_EQ(canceled.size(), 1U);
  end(canceled[0], DiskOutcome::kCanceled);
  ASSERT_EQ(disk.reads.size(), 1U);
  EXPECT_EQ(disk.reads[0].key, keys[0]);
  end_all(disk.reads);
  report(agents[0], 11);
  EXPECT_TRUE(done(11));
}

TEST_F(NodeDiskTest, APromptIsServedAsFarAsHostMemoryCanHoldIt) {
  const auto e = start_with_engine(8, 16);
  const auto keys = keys_of(1, 8);
  const auto half = Keys(keys.begin(), keys.begin() + 4);
  keep(e, 1, 1, half);  // in two halves: blocks that wait to be written take half of host memory at most
  end_all(disk.writes);
  keep(e, 1, 2, keys);
  end_all(disk.writes);
  node->close_sequence(e, 1);
  push_out(e);
  const auto found = lookup(e, 3, keys);
  EXPECT_EQ(found.matched_blocks, 6U);
  EXPECT_EQ(found.reason, Reason::kNoRoomToLoad);
}

TEST_F(NodeDiskTest, LoadsThatBlockEachOtherDoNotWaitForTheirDeadline) {
  const auto e = start_with_engine(8, 32);
  const auto a = keys_of(1, 4);
  const auto b = keys_of(2, 6);
  keep_on_drives(e, a);
  keep_on_drives(e, Keys(b.begin(), b.begin() + 4));
  ASSERT_EQ(load(e, 3, 10, a), Reason::kNone);
  keep(e, 4, 11, b);  // its end is new
  end_all(disk.writes);
  end_all(disk.reads);
  ASSERT_EQ(load(e, 4, 12, b), Reason::kNone);
  EXPECT_FALSE(result(12));
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
  end_all(disk.reads);
  report(agents[0], 12);
  EXPECT_TRUE(done(12));
}

// Two engines of different models, with so many slots of host memory each and a prompt of theirs on the drives only.
class NodeDiskModelsTest : public NodeDiskTest {
 protected:
  void start_two(std::uint32_t slots_each) {
    start(2 * slots_each);
    for (const std::uint8_t model : {std::uint8_t{1}, std::uint8_t{2}}) {
      engines.push_back(engine(std::to_string(model), 1, model));
      opened(32);
    }
    // Each takes its half at first; what comes later pushes out what was there.
    for (const std::uint64_t first : {0U, 10U, 20U}) {
      for (std::size_t of = 0; of < 2; ++of) write(of, keys_of(first + of, slots_each));
    }
  }
  void write(std::size_t of, const Keys& keys) {
    const Keys half(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(keys.size() / 2));
    for (const Keys& part : {half, keys}) {
      ASSERT_EQ(save(engines[of], 1, next_job, part), Reason::kNone);
      report(agents[of], next_job++);
      end_all(disk.writes);
    }
    node->close_sequence(engines[of], 1);
  }

  std::vector<EngineHandle> engines;
};

TEST_F(NodeDiskModelsTest, AModelThatWaitsForRoomHoldsUpNoOther) {
  start_two(4);
  ASSERT_EQ(load(engines[1], 3, 10, keys_of(1, 4)), Reason::kNone);
  end_all(disk.reads);
  ASSERT_EQ(load(engines[1], 4, 11, keys_of(11, 4)), Reason::kNone);
  EXPECT_TRUE(disk.reads.empty()) << "all its room is in use";
  ASSERT_EQ(load(engines[0], 3, 12, keys_of(0, 4)), Reason::kNone);
  EXPECT_EQ(disk.reads.size(), 4U);
  end_all(disk.reads);
  report(agents[0], 12);
  EXPECT_TRUE(done(12));
  EXPECT_FALSE(result(11));
  report(agents[1], 10);
  node->close_sequence(engines[1], 3);
  end_all(disk.reads);
  report(agents[1], 11);
  EXPECT_TRUE(done(11));
}

TEST_F(NodeDiskModelsTest, ALoadThatNoRoomIsComingForDoesNotWaitForWhatOtherModelsDo) {
  start_two(4);
  ASSERT_EQ(load(engines[0], 3, 20, keys_of(0, 4)), Reason::kNone);  // of the other model; runs all the time
  EXPECT_EQ(disk.reads.size(), 4U);
  const auto found = lookup(engines[1], 4, keys_of(21, 4));  // protects for a while
  EXPECT_EQ(found.matched_blocks - found.disk_blocks, 4U);
  ASSERT_EQ(load(engines[1], 5, 21, keys_of(1, 4)), Reason::kNone);
  EXPECT_EQ(disk.reads.size(), 4U);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[1], 21).size(), 1U);
  report(agents[1], 21, JobStatus::kCanceled);
  EXPECT_EQ(failure(21), Reason::kNoRoomToLoad);
  end_all(disk.reads);
  report(agents[0], 20);
  EXPECT_TRUE(done(20));
}

TEST_F(NodeDiskModelsTest, AModelWithoutHostMemoryIsPromisedNothingFromDrives) {
  start_two(4);
  EXPECT_EQ(lookup(engines[1], 3, keys_of(1, 4)).matched_blocks, 3U);
  node->close_sequence(engines[1], 3);
  node->detach_client(engines[1]);
  node->detach_agent(agents[1], now);
  ASSERT_EQ(save(engines[0], 5, 50, keys_of(5, 8)), Reason::kNone);  // all host memory
  engines[1] = engine("2", 1, 2);
  const auto keys = keys_of(1, 4);
  const index::Slot slots[] = {0, 1, 2, 3};
  const RecoveredChain chain{{}, keys, slots};
  node->on_disk_recovered(disk.spaces.rbegin()->first, {&chain, 1}, now);
  opened(32);
  const auto found = lookup(engines[1], 3, keys);
  EXPECT_EQ(node->spaces()[1].slots, 0U);
  EXPECT_EQ(found.matched_blocks, 0U);
  EXPECT_EQ(found.reason, Reason::kNoRoomToLoad);
  report(agents[0], 50, JobStatus::kFailed);
}

TEST_F(NodeDiskTest, LeavesToTheEngineWhatItComputesFasterThanTheDriveReads) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  read_one_slowly(e, keys);
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 3U);  // how fast the engine is was not told yet
  node->set_prefill(e, {0, 1e6, 0, 0});              // 16 ms for a block
  const auto found = lookup(e, 5, keys);
  EXPECT_EQ(found.matched_blocks, 1U);  // what host memory has
  EXPECT_EQ(found.disk_blocks, 0U);
  EXPECT_EQ(found.host_blocks, 1U);
  EXPECT_EQ(found.reason, Reason::kNotWorthLoading);
  node->set_prefill(e, {0, 1e7, 0, 0});
  EXPECT_EQ(lookup(e, 6, keys).matched_blocks, 3U);
}

TEST_F(NodeDiskTest, WhatTheEngineHasItselfIsNeitherReadNorComputed) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  read_one_slowly(e, keys);
  node->set_prefill(e, {0, 1e6, 0, 0});  // 16 ms for a block, 100 ms to read it
  const auto slow = node->lookup(e, 4, 0, keys, now, 2);
  EXPECT_EQ(slow.matched_blocks, 2U);
  EXPECT_EQ(slow.disk_blocks, 0U) << "the second block is on a drive, and the engine's";
  EXPECT_EQ(slow.reason, Reason::kNotWorthLoading);
  const Choice choice = node->choices().at(0);
  EXPECT_EQ(choice.engine_blocks, 2U);
  EXPECT_EQ(choice.host_blocks, 0U) << "of those that the engine does not have";
  EXPECT_EQ(choice.drive_blocks, 1U);
  EXPECT_NEAR(choice.expected_if_none, 16 * kMillisecond, 1);
  EXPECT_EQ(node->stats().choices_none, 1U);
  EXPECT_EQ(node->stats().recomputed_blocks, 1U);

  const auto whole = node->lookup(e, 5, 0, keys, now, 3);
  EXPECT_EQ(whole.matched_blocks, 3U);
  EXPECT_EQ(whole.disk_blocks, 0U);
  EXPECT_EQ(whole.host_blocks, 3U) << "no drive is needed";
  EXPECT_EQ(node->choices().size(), 1U) << "nothing to choose";

  node->set_prefill(e, {0, 1e7, 0, 0});  // 160 ms for a block
  const auto fast = node->lookup(e, 6, 0, keys, now, 2);
  EXPECT_EQ(fast.matched_blocks, 3U);
  EXPECT_EQ(fast.disk_blocks, 1U);
  EXPECT_EQ(fast.host_blocks, 2U);
}

// Three blocks of 100 ms each: their reads are paid for once, whoever began them.
TEST_F(NodeDiskTest, WhatIsOnItsWayFromADriveCostsOnlyTheRestOfTheWay) {
  const auto e = start_with_engine(16, 16);
  const auto keys = keys_of(1, 4);
  keep_on_drives(e, keys);
  read_one_slowly(e, keys);
  node->set_prefill(e, {0, 1e7, 0, 0});  // 160 ms for a block: twice the reads of all would be more
  EXPECT_EQ(node->prefetch(e, {4, 0, keys}, now), Reason::kNone);
  ASSERT_EQ(disk.reads.size(), 3U);
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 4U);
  ASSERT_EQ(load(e, 4, 11, keys), Reason::kNone);
  EXPECT_EQ(lookup(e, 5, keys).matched_blocks, 4U);  // another request for the same
  end_all(disk.reads);
  report(agents[0], 11);
}

// Nobody waits for what tells whether a slow drive is still slow.
TEST_F(NodeDiskTest, TriesADriveAgainThatWasTooSlowAWhileAgo) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  const auto others = keys_of(2, 3);
  keep_on_drives(e, others);
  keep_on_drives(e, keys);
  read_one_slowly(e, keys);
  node->set_prefill(e, {0, 1e6, 0, 0});  // 16 ms for a block
  EXPECT_EQ(lookup(e, 4, keys).matched_blocks, 1U);
  EXPECT_TRUE(disk.reads.empty());
  now += 10 * kSecond;
  EXPECT_EQ(lookup(e, 5, keys).matched_blocks, 1U);
  ASSERT_EQ(disk.reads.size(), 2U);
  now += kMillisecond;
  end_all(disk.reads);
  now += kSecond;
  EXPECT_EQ(lookup(e, 6, others).matched_blocks, 3U);
}

TEST_F(NodeDiskTest, TellsWhatItChoseAndFromWhat) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  read_one_slowly(e, keys);
  EXPECT_EQ(node->choices().size(), 0U) << "nothing was looked up";
  lookup(e, 4, keys);
  node->set_prefill(e, {0, 1e6, 0, 0});  // 16 ms for a block
  lookup(e, 5, keys);
  lookup(e, 5, keys);
  const auto choices = node->choices();
  ASSERT_EQ(choices.size(), 2U) << "asked again, it replaces its choice";
  EXPECT_EQ(choices[0].basis, Choice::Basis::kPrefillUnknown);
  EXPECT_EQ(choices[0].chosen_blocks, 3U);
  const Choice& choice = choices[1];
  EXPECT_EQ(choice.basis, Choice::Basis::kCost);
  EXPECT_EQ(choice.engine, e);
  EXPECT_EQ(choice.sequence, 5U);
  EXPECT_EQ(choice.prompt_blocks, 3U);
  EXPECT_EQ(choice.host_blocks, 1U);
  EXPECT_EQ(choice.drive_blocks, 2U);
  EXPECT_EQ(choice.chosen_blocks, 1U);
  EXPECT_NEAR(choice.read_bytes_per_second, 2 * 10 * 4096, 1) << "ten blocks a second from each of two drives";
  EXPECT_NEAR(choice.expected_if_none, 48 * kMillisecond, 1);
  EXPECT_NEAR(choice.expected, 32 * kMillisecond, 1);
  EXPECT_NEAR(choice.expected_if_all, 101 * kMillisecond, 1) << "and one token";
  EXPECT_EQ(node->stats().choices_all, 1U);
  EXPECT_EQ(node->stats().choices_part, 1U);
  EXPECT_EQ(node->stats().recomputed_blocks, 2U);
}

TEST_F(NodeDiskTest, SingleBlocksGoToOneDriveAfterTheOther) {
  const auto e = start_with_engine(8, 8);
  std::set<unsigned> used;
  for (std::uint64_t i = 0; i < 2; ++i) {
    keep(e, i + 1, next_job++, keys_of(i + 1, 1));
    ASSERT_EQ(disk.writes.size(), 1U);
    used.insert(disk.writes[0].slot % 2);
    end_all(disk.writes);
  }
  EXPECT_EQ(used.size(), 2U);
}

TEST_F(NodeDiskTest, PrefetchFetchesWithoutALoad) {
  const auto e = start_with_engine(16, 16);
  const auto keys = keys_of(1, 3);
  keep_on_drives(e, keys);
  EXPECT_EQ(node->prefetch(e, {3, 0, keys}, now), Reason::kNone);
  ASSERT_EQ(disk.reads.size(), 3U);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);  // joins it
  EXPECT_EQ(disk.reads.size(), 3U);
  end_all(disk.reads);
  report(agents[0], 10);
  EXPECT_TRUE(done(10));
  EXPECT_EQ(node->stats().blocks_prefetched, 3U);
}

TEST_F(NodeDiskTest, EvictsFromDrivesWhenTheyAreFull) {
  const auto e = start_with_engine(8, 2);
  keep_on_drives(e, keys_of(1, 4));
  keep_on_drives(e, keys_of(2, 3));
  EXPECT_EQ(node->stats().disk_blocks_evicted, 4U);
  EXPECT_EQ(lookup(e, 3, keys_of(2, 3)).matched_blocks, 3U);
  EXPECT_EQ(lookup(e, 4, keys_of(1, 4)).matched_blocks, 0U);
}

TEST_F(NodeDiskTest, WithoutBudgetNothingIsWrittenNorEvictedForIt) {
  const auto e = start_with_engine(8, 8);
  keep_on_drives(e, keys_of(1, 4));
  disk.admission = DiskAdmission::kBudget;
  for (std::uint32_t i = 2; i < 12; ++i) {
    keep(e, 10 + i, 10 + i, keys_of(i, 3));
    node->close_sequence(e, 10 + i);
  }
  EXPECT_EQ(unwritten(Reason::kBudget), 30U);  // also those behind the first that was refused
  EXPECT_EQ(node->disk_queues().writes, 0U);
  EXPECT_EQ(node->stats().disk_blocks_evicted, 0U);
  EXPECT_EQ(lookup(e, 3, keys_of(1, 4)).matched_blocks, 4U);
}

TEST_F(NodeDiskTest, ADriveThatIsOffCostsNoBlocks) {
  const auto e = start_with_engine(8, 8);
  keep_on_drives(e, keys_of(1, 4));
  disk.admission = DiskAdmission::kUnavailable;
  keep(e, 10, 10, keys_of(2, 3));
  EXPECT_EQ(unwritten(Reason::kDiskOff), 3U);
  EXPECT_EQ(node->stats().disk_blocks_evicted, 0U);
}

TEST_F(NodeDiskTest, ADriveFullOfLoadsIsBusyAndNotOff) {
  const auto e = start_with_engine(8, 8);
  keep_on_drives(e, keys_of(1, 4));
  disk.admission = DiskAdmission::kBusy;
  keep(e, 10, 10, keys_of(2, 3));
  EXPECT_EQ(unwritten(Reason::kDiskBusy), 3U);
  EXPECT_EQ(unwritten(Reason::kDiskOff), 0U);
  EXPECT_EQ(node->stats().disk_blocks_evicted, 0U);
}

TEST_F(NodeDiskTest, AWriteThatMustWaitForTheBudgetIsTriedAgainWhenItIsThere) {
  const auto e = start_with_engine(8, 8);
  disk.admission = DiskAdmission::kLater;
  keep(e, 1, 1, keys_of(1, 3));
  EXPECT_TRUE(disk.writes.empty());
  EXPECT_EQ(node->disk_queues().writes, 3U);
  disk.admission = DiskAdmission::kQueued;
  node->on_disk_ready(now);
  EXPECT_EQ(disk.writes.size(), 3U);
  end_all(disk.writes);
  EXPECT_EQ(node->disk_queues().writes, 0U);
  EXPECT_EQ(node->spaces()[0].disk_used, 3U);
}

TEST_F(NodeDiskTest, AdmissionTightensWithThePressureOfTheBudget) {
  const auto e = start_with_engine(16, 16);
  disk.pressure = 0.6;  // blocks must have been used twice
  const auto keys = keys_of(1, 2);
  keep(e, 1, 1, keys);
  EXPECT_TRUE(disk.writes.empty());
  EXPECT_EQ(unwritten(Reason::kBudgetLow), 2U);
  EXPECT_EQ(unwritten(Reason::kUnlikely), 0U);
  ASSERT_EQ(lookup(e, 2, keys).matched_blocks, 2U);
  node->close_sequence(e, 2);
  EXPECT_EQ(disk.writes.size(), 2U);
  disk.pressure = 1;
  keep(e, 3, 3, keys_of(2, 2));
  ASSERT_EQ(lookup(e, 4, keys_of(2, 2)).matched_blocks, 2U);
  node->close_sequence(e, 4);
  EXPECT_EQ(disk.writes.size(), 2U);
  disk.pressure = 0;
  keep(e, 5, 5, keys_of(3, 2));
  EXPECT_EQ(disk.writes.size(), 4U);
}

TEST_F(NodeDiskTest, ADriveWithoutRoomGetsNoMoreSlots) {
  const auto e = start_with_engine(8, 8);
  keep(e, 1, 1, keys_of(1, 4));
  const auto writes = std::exchange(disk.writes, {});
  end(writes[0]);
  end(writes[1]);
  end(writes[2], DiskOutcome::kNoRoom);
  end(writes[3], DiskOutcome::kNoRoom);
  EXPECT_EQ(unwritten(Reason::kDiskFull), 2U);
  EXPECT_EQ(node->spaces()[0].disk_slots, 2U);
  keep(e, 2, 2, keys_of(2, 1));
  ASSERT_EQ(disk.writes.size(), 1U);  // where another block has made room
  EXPECT_LT(disk.writes[0].slot, 2U);
}

TEST_F(NodeDiskTest, TakesInWhatTheDrivesHeldAndServesIt) {
  start(8);
  const auto e = engine("e");
  const auto keys = keys_of(1, 5, 2);
  const auto branch = keys_of(2, 4, 2);
  const index::Slot slots[] = {7, 2, 5, 0, 9};
  const index::Slot branch_slots[] = {1, 3};
  const index::Slot lost_slot = 4;
  const key::BlockKey lost{9, 9};
  const std::vector<RecoveredChain> chains{
      {{}, {keys.data(), 2}, {slots, 2}},
      {keys[1], {keys.data() + 2, 3}, {slots + 2, 3}},
      {keys[1], {branch.data() + 2, 2}, {branch_slots, 2}},
      {{8, 8}, {&lost, 1}, {&lost_slot, 1}},
  };
  const SpaceNumber space = disk.spaces.begin()->first;
  node->on_disk_recovered(space, chains, now);
  node->check_invariants();
  opened(6);
  EXPECT_EQ(node->stats().disk_blocks_recovered, 7U);
  EXPECT_EQ(lookup(e, 1, keys).disk_blocks, 5U);
  EXPECT_EQ(lookup(e, 2, branch).disk_blocks, 4U);
  ASSERT_EQ(load(e, 1, 1, keys), Reason::kNone);
  EXPECT_EQ(disk.reads[3].slot, 0U);
  end_all(disk.reads);
  report(agents[0], 1);
  EXPECT_TRUE(done(1));
  // New blocks do not go where recovered ones lie.
  node->close_sequence(e, 1);
  keep(e, 3, 2, keys_of(3, 3));
  const std::set<index::Slot> free{4, 6, 8, 10, 11};
  EXPECT_EQ(disk.writes.size(), 3U);
  for (const auto& write : disk.writes) EXPECT_TRUE(free.contains(write.slot)) << write.slot;
}

TEST_F(NodeDiskTest, ResetReachesSpacesThatAreNotOpenAndWhatIsStillRead) {
  start(8);
  const auto e = engine("e");
  const auto keys = keys_of(1, 2);
  const index::Slot slots[] = {0, 1};
  const RecoveredChain chain{{}, keys, slots};
  node->reset(e, now);
  EXPECT_EQ(disk.resets.size(), 1U);
  ASSERT_EQ(disk.closed_resets.size(), 1U);
  ASSERT_TRUE(disk.closed_resets[0]);
  EXPECT_TRUE(
      std::equal(disk.closed_resets[0]->begin(), disk.closed_resets[0]->end(), disk.spaces.begin()->second.begin()));
  node->on_disk_recovered(disk.spaces.begin()->first, {&chain, 1}, now);
  opened(4);
  EXPECT_EQ(lookup(e, 1, keys).matched_blocks, 0U);
}

TEST_F(NodeDiskTest, WhatWaitsToBeWrittenAndIsReset) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 3));
  keep(e, 2, 2, keys_of(2, 1));
  EXPECT_EQ(node->disk_queues().writes, 4U);
  node->reset(e, now);
  opened(4);
  EXPECT_TRUE(disk.writes.empty());
  EXPECT_EQ(node->disk_queues().writes, 0U);
  EXPECT_EQ(unwritten(Reason::kReset), 4U);
}

TEST_F(NodeDiskTest, ResetDuringReadsAndWritesServesAndKeepsNothing) {
  const auto e = start_with_engine(8, 8);
  const auto keys = keys_of(1, 2);
  keep_on_drives(e, keys);
  ASSERT_EQ(load(e, 3, 10, keys), Reason::kNone);
  keep(e, 4, 11, keys_of(2, 2));
  node->reset(e, now);
  node->check_invariants();
  end_all(disk.reads);
  end_all(disk.writes);
  report(agents[0], 10, JobStatus::kCanceled);
  EXPECT_EQ(failure(10), Reason::kReset);
  for (const SequenceId sequence : {3U, 4U}) node->close_sequence(e, sequence);
  EXPECT_EQ(node->spaces()[0].disk_used, 0U);
  EXPECT_EQ(lookup(e, 5, keys).matched_blocks, 0U);
}

TEST(DiskSlots, DealsOutWhatIsFreeBelowTheLimits) {
  DiskSlots slots(2);
  slots.claim(3);  // drive 1, index 1
  slots.claim(4);  // drive 0, index 2
  slots.give_back(4);
  const std::uint32_t limits[] = {3, 3};
  slots.open(limits);
  EXPECT_EQ(slots.capacity(), 6U);
  EXPECT_EQ(slots.take(1), 1U);
  EXPECT_EQ(slots.take(1), 5U);
  EXPECT_FALSE(slots.has_free(1));
  EXPECT_EQ(slots.take(0), 0U);
  EXPECT_EQ(slots.take(0), 2U);
  slots.end_before(2);
  EXPECT_FALSE(slots.has_free(0));
  slots.give_back(2);
  EXPECT_FALSE(slots.has_free(0));
  slots.give_back(0);
  EXPECT_EQ(slots.take(0), 0U);
  slots.abandon(5);
  EXPECT_EQ(slots.used(), 3U);
  EXPECT_EQ(slots.capacity(), 3U);
}

}  // namespace
}  // namespace flexkv::node
