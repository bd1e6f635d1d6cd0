// The check of all blocks on drives, with drives that do what the test says. The simulated world has the rest.
#include <set>

#include "flexkv/node/fake_drives.h"
#include "flexkv/node/node_fixture.h"

namespace flexkv::node {
namespace {

constexpr std::uint64_t kFast = 1ULL << 50;
constexpr std::uint32_t kBlocks = 6;

class ScrubTest : public NodeTest {
 protected:
  ScrubTest() { drives = &disk; }

  // Blocks of one prompt that are on the drives, half of them on each, and not in host memory.
  void SetUp() override {
    start(16);
    handle = engine("e");
    const std::uint32_t slots[] = {kBlocks, kBlocks};
    node->on_disk_opened(disk.spaces.begin()->first, slots, now);
    keep(handle, 1, 100, keys);
    for (const DiskTransfer& transfer : std::exchange(disk.writes, {})) end(transfer);
    node->close_sequence(handle, 1);
    ASSERT_EQ(save(handle, 2, 101, keys_of(1000, 16)), Reason::kNone);
    report(agents[0], 101, JobStatus::kFailed);
    node->close_sequence(handle, 2);
    ASSERT_EQ(node->spaces()[0].disk_used, kBlocks);
  }
  void end(const DiskTransfer& transfer, DiskOutcome outcome = DiskOutcome::kDone) {
    const DiskResult result{transfer.op, outcome};
    node->on_disk_done({&result, 1}, now);
    node->check_invariants();
  }
  void begin(std::uint64_t bytes_per_second = kFast) {
    node->begin_scrub(bytes_per_second, now);
    node->check_invariants();
  }
  // All blocks that come to be checked, until the scrub is over or nothing more comes.
  std::vector<DiskTransfer> check_all(DiskOutcome outcome = DiskOutcome::kDone) {
    std::vector<DiskTransfer> checked;
    for (int turns = 0; turns < 100; ++turns) {
      for (const DiskTransfer& transfer : std::exchange(disk.checks, {})) {
        checked.push_back(transfer);
        end(transfer, outcome);
      }
      node->on_time(now);
    }
    return checked;
  }
  ScrubStatus::Drive sum() const {
    ScrubStatus::Drive sum;
    for (const auto& drive : node->scrub()->drives) {
      sum.checked_blocks += drive.checked_blocks;
      sum.damaged_blocks += drive.damaged_blocks;
      sum.unreadable_blocks += drive.unreadable_blocks;
      sum.unchecked_blocks += drive.unchecked_blocks;
    }
    return sum;
  }
  bool running() const { return node->scrub()->state == ScrubStatus::State::kRunning; }

  FakeDrives disk;
  EngineHandle handle = 0;
  const Keys keys = keys_of(1, kBlocks);
};

TEST_F(ScrubTest, ChecksEachBlockOnceAndNoMoreThanAFewAtATime) {
  EXPECT_EQ(node->scrub(), nullptr);
  begin();
  EXPECT_EQ(node->scrub()->blocks, kBlocks);
  EXPECT_EQ(disk.checks.size(), 4U) << "two for each drive";
  EXPECT_FALSE(node->next_deadline().has_value()) << "it waits for them";
  std::set<std::pair<std::uint64_t, std::uint64_t>> seen;
  for (const DiskTransfer& transfer : check_all())
    EXPECT_TRUE(seen.emplace(transfer.key.high, transfer.key.low).second);
  EXPECT_EQ(seen.size(), kBlocks);
  EXPECT_EQ(node->scrub()->state, ScrubStatus::State::kDone);
  EXPECT_EQ(sum().checked_blocks, kBlocks);
  EXPECT_EQ(sum().damaged_blocks, 0U);
  EXPECT_FALSE(node->next_deadline().has_value());
  EXPECT_EQ(lookup(handle, 3, keys).matched_blocks, kBlocks);
}

TEST_F(ScrubTest, ReadsNoFasterThanItMay) {
  const std::uint64_t slot_bytes = node->spaces()[0].slot_bytes;
  begin(slot_bytes);  // one block a second, but for what it may be ahead
  std::size_t checked = 0;
  for (int second = 0; second <= 3; ++second) {
    for (const DiskTransfer& transfer : std::exchange(disk.checks, {})) {
      ++checked;
      end(transfer);
    }
    EXPECT_LE(checked, static_cast<std::size_t>(second) + 2);
    EXPECT_GE(checked + 1, static_cast<std::size_t>(second));
    ASSERT_TRUE(node->next_deadline().has_value());
    EXPECT_GT(*node->next_deadline(), now);
    now += kSecond;
    node->on_time(now);
  }
  begin(kFast);  // it goes on, faster
  (void)check_all();
  EXPECT_EQ(sum().checked_blocks, kBlocks);
  EXPECT_EQ(node->scrub()->state, ScrubStatus::State::kDone);
}

TEST_F(ScrubTest, WhatIsBadIsForgottenAndToldApart) {
  begin();
  end(disk.checks.at(0), DiskOutcome::kChecksum);
  end(disk.checks.at(1), DiskOutcome::kFailed);
  disk.checks.erase(disk.checks.begin(), disk.checks.begin() + 2);
  (void)check_all();
  EXPECT_EQ(sum().checked_blocks, kBlocks);
  EXPECT_EQ(sum().damaged_blocks, 1U);
  EXPECT_EQ(sum().unreadable_blocks, 1U);
  EXPECT_EQ(node->spaces()[0].disk_used, kBlocks - 2);
  const auto found = lookup(handle, 3, keys);
  EXPECT_LT(found.matched_blocks, kBlocks);
  EXPECT_TRUE(found.reason == Reason::kChecksum || found.reason == Reason::kDiskFailed);
}

TEST_F(ScrubTest, ADriveThatIsOffIsPassedOverAndSaid) {
  disk.admission = DiskAdmission::kUnavailable;
  begin();
  node->on_time(now);
  EXPECT_FALSE(running());
  EXPECT_EQ(sum().unchecked_blocks, kBlocks);
  disk.admission = DiskAdmission::kBusy;
  begin();
  EXPECT_TRUE(running());
  EXPECT_TRUE(disk.checks.empty());
  disk.admission = DiskAdmission::kQueued;
  now += kSecond;
  node->on_time(now);
  EXPECT_EQ(check_all().size(), kBlocks) << "nothing was lost while the drives were busy";
  begin();
  end(disk.checks.at(0), DiskOutcome::kUnavailable);
  disk.checks.erase(disk.checks.begin());
  (void)check_all();
  EXPECT_EQ(sum().unchecked_blocks, 1U);
  EXPECT_EQ(node->spaces()[0].disk_used, kBlocks);
}

TEST_F(ScrubTest, IsStoppedAtOnce) {
  begin();
  const auto under_way = disk.checks;
  node->stop_scrub(now);
  EXPECT_EQ(node->scrub()->state, ScrubStatus::State::kStopped);
  EXPECT_EQ(disk.canceled.size(), under_way.size());
  EXPECT_FALSE(node->next_deadline().has_value());
  for (const DiskTransfer& transfer : under_way) end(transfer, DiskOutcome::kCanceled);
  EXPECT_EQ(disk.checks.size(), under_way.size()) << "no more came";
  EXPECT_EQ(sum().checked_blocks, 0U);
  disk.checks.clear();
  begin();
  EXPECT_EQ(check_all().size(), kBlocks);
}

class ScrubAndLoadTest : public ScrubTest, public ::testing::WithParamInterface<bool> {};

// Of two reads of one bad block the first drops it; its slot goes to nobody before the second has ended.
TEST_P(ScrubAndLoadTest, ABadBlockKeepsItsSlotUntilBothHaveEnded) {
  begin();
  const DiskTransfer check = disk.checks.at(0);
  const auto end_of_load = std::ranges::find(keys, check.key) + 1;
  ASSERT_EQ(load(handle, 3, 7, Keys(keys.begin(), end_of_load)), Reason::kNone);
  const auto read = std::ranges::find(disk.reads, check.key, &DiskTransfer::key);
  ASSERT_NE(read, disk.reads.end());
  EXPECT_EQ(read->slot, check.slot);
  const DiskTransfer loaded = *read;
  end(GetParam() ? loaded : check, DiskOutcome::kChecksum);
  EXPECT_EQ(node->spaces()[0].disk_used, kBlocks) << "taken still";
  end(GetParam() ? check : loaded, DiskOutcome::kChecksum);
  EXPECT_EQ(node->spaces()[0].disk_used, kBlocks - 1);
}

INSTANTIATE_TEST_SUITE_P(LoadEndsFirst, ScrubAndLoadTest, ::testing::Bool());

TEST_F(ScrubTest, AResetEndsWhatIsCheckedAndHidesNothing) {
  begin();
  const auto under_way = std::exchange(disk.checks, {});
  node->reset_all(1, now);
  for (const DiskTransfer& transfer : under_way) end(transfer, DiskOutcome::kChecksum);
  (void)check_all();
  EXPECT_EQ(node->scrub()->state, ScrubStatus::State::kDone);
  EXPECT_EQ(sum().damaged_blocks, 0U);
  EXPECT_EQ(node->spaces()[0].disk_used, 0U);
}

}  // namespace
}  // namespace flexkv::node
