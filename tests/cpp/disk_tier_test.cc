// The SSD tier over a simulated drive: what was written is found after a kill, and not after a reset.
#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <deque>

#include "flexkv/disk/tier.h"
#include "flexkv/testing/sim_drive.h"

namespace flexkv::testing {
namespace {

using disk::SpaceHandle;
using Jobs = std::deque<disk::Job>;

struct HandWorkers final : disk::Workers {
  explicit HandWorkers(Jobs& where) : jobs(where) {}
  bool stop(Nanos, disk::Job last) override {
    stop();
    if (last) last();
    return true;
  }
  void post(disk::Job job) override { jobs.push_back(std::move(job)); }
  void stop() override { jobs.clear(); }
  Jobs& jobs;
};

struct alignas(4096) Page {
  std::byte bytes[4096];
};

struct Meter final : disk::WriteMeter {
  Answer take(std::uint64_t bytes) override {
    asked.push_back(bytes);
    return answer;
  }
  void charge(std::uint64_t bytes) override { charged += bytes; }
  Answer answer = Answer::kGranted;
  std::vector<std::uint64_t> asked;
  std::uint64_t charged = 0;
};

struct World final : disk::TierSink {
  explicit World(std::shared_ptr<SimMedium> medium, std::shared_ptr<disk::WriteMeter> meter = nullptr,
                 std::function<void(SimDrive&)> before = {}, std::function<void(SimDrive&)> after_header = {}) {
    disk::VolumeSpec spec;
    spec.meter = std::move(meter);
    spec.directory = "sim";
    spec.open_drive = [this, medium](file::DriveSink& sink) -> Result<std::unique_ptr<file::Drive>> {
      auto made = std::make_unique<SimDrive>(SimDriveOptions{}, medium, sink);
      drive = made.get();
      return std::unique_ptr<file::Drive>(std::move(made));
    };
    disk::TierOptions options;
    options.bytes_max = 1 << 20;
    options.now = [this] { return drive == nullptr ? Nanos{1} : drive->now(); };
    tier = std::make_unique<disk::DiskTier>(options, std::span(&spec, 1), *this,
                                            [this](auto&&...) { return std::make_unique<HandWorkers>(jobs); });
    if (before) before(*drive);
    tier->open_space(SpaceHandle{1}, {7}, sizeof(Page));
    run_jobs();
    (void)drive->run_until_idle();
    if (after_header) after_header(*drive);
    settle();
  }
  void run_jobs() {
    while (!jobs.empty()) {
      auto job = std::move(jobs.front());
      jobs.pop_front();
      job();
    }
  }
  void settle() {
    do {
      run_jobs();
      (void)drive->run_until_idle();
    } while (!jobs.empty());
  }
  void on_completions(std::span<const disk::Completion> all) override {
    for (const auto& each : all) done[each.id] = each.outcome;
  }
  void on_overdue(disk::OpId) override {}
  void on_recovered(SpaceHandle, std::span<const disk::Chain> chains) override {
    for (const auto& chain : chains) {
      recovered += chain.keys.size();
      slots.insert(slots.end(), chain.slots.begin(), chain.slots.end());
      for (std::size_t i = 0; i < chain.slots.size(); ++i) {
        const std::uint32_t slot = chain.slots[i];
        EXPECT_EQ(tier->read({kAtOnce + slot, SpaceHandle{1}, slot, chain.keys[i], at_once[slot].bytes}),
                  disk::Admission::kQueued);
      }
    }
  }
  void on_opened(SpaceHandle, const disk::Opened& what) override { opened = what; }
  void on_health(unsigned, const disk::Health& now) override { health = now; }
  void write(disk::OpId id, std::uint32_t slot, key::BlockKey key, Page& page) {
    EXPECT_EQ(tier->write({id, SpaceHandle{1}, slot, key, disk::kNoParent, page.bytes}), disk::Admission::kQueued);
    settle();
    EXPECT_EQ(done.at(id), disk::Outcome::kDone);
  }
  disk::Outcome read(disk::OpId id, std::uint32_t slot, key::BlockKey key, Page& page) {
    EXPECT_EQ(tier->read({id, SpaceHandle{1}, slot, key, page.bytes}), disk::Admission::kQueued);
    settle();
    return done.at(id);
  }

  static constexpr disk::OpId kAtOnce = 1000;

  Jobs jobs;
  SimDrive* drive = nullptr;
  std::map<disk::OpId, disk::Outcome> done;
  std::size_t recovered = 0;
  std::map<std::uint32_t, Page> at_once;  // found blocks as read before the space was open, by slot
  std::vector<std::uint32_t> slots;       // of those
  disk::Opened opened;
  disk::Health health;
  std::unique_ptr<disk::DiskTier> tier;
};

TEST(DiskTier, WritesNothingThatIsNotWhatItsSumsSay) {
  const auto medium = std::make_shared<SimMedium>();
  World world(medium);
  Page out, in;
  std::memset(out.bytes, 5, sizeof out.bytes);
  const std::span<const std::byte> bytes(out.bytes);
  disk::WriteOp op{1, SpaceHandle{1}, 0, {1, 1}, disk::kNoParent, bytes};
  op.sums = {{0, 100, block_sum(bytes.first(100))}, {2048, 1000, block_sum(bytes.subspan(2048, 1000))}};
  ASSERT_EQ(world.tier->write(op), disk::Admission::kQueued);
  world.settle();
  EXPECT_EQ(world.done.at(1), disk::Outcome::kDone);
  op.id = 2;
  op.slot = 1;
  op.key = {1, 2};
  out.bytes[2048 + 999] ^= std::byte{1};
  ASSERT_EQ(world.tier->write(op), disk::Admission::kQueued);
  world.settle();
  EXPECT_EQ(world.done.at(2), disk::Outcome::kDamaged);
  EXPECT_EQ(world.tier->queue_depth(0), 0U);
  EXPECT_EQ(world.read(3, 1, {1, 2}, in), disk::Outcome::kChecksum);
  EXPECT_EQ(world.tier->stats()[0].blocks_written, 1U);
}

TEST(DiskTier, AReadThatTheKernelHadNoMemoryForSaysNothingOfItsBlock) {
  World world(std::make_shared<SimMedium>());
  Page page{};
  world.write(1, 0, {1, 1}, page);
  world.drive->fail_next(file::Op::kRead, ENOMEM);
  EXPECT_EQ(world.read(2, 0, {1, 1}, page), disk::Outcome::kUnavailable);
  EXPECT_EQ(world.tier->stats().front().failed_reads, 0U);
  EXPECT_EQ(world.read(3, 0, {1, 1}, page), disk::Outcome::kDone);
  world.drive->fail_next(file::Op::kRead, EIO);
  EXPECT_EQ(world.read(4, 0, {1, 1}, page), disk::Outcome::kFailed);
}

TEST(DiskTier, FindsBlocksAfterAKillAndNoneAfterAReset) {
  const auto medium = std::make_shared<SimMedium>();
  Page out[3], in;
  {
    World world(medium);
    ASSERT_GT(world.opened.slots.at(0), 3U);
    for (std::uint32_t i = 0; i < 3; ++i) {
      std::memset(out[i].bytes, static_cast<int>(i + 1), sizeof out[i].bytes);
      ASSERT_EQ(world.tier->write(
                    {i, SpaceHandle{1}, i, {1, i + 1}, i == 0 ? disk::kNoParent : key::BlockKey{1, i}, out[i].bytes}),
                disk::Admission::kQueued);
    }
    world.settle();
    for (std::uint32_t i = 0; i < 3; ++i) EXPECT_EQ(world.done.at(i), disk::Outcome::kDone);
    world.drive->kill();
  }
  {
    World world(medium);
    EXPECT_EQ(world.recovered, 3U);
    for (std::uint32_t i = 0; i < 3; ++i) {
      ASSERT_EQ(world.done.at(World::kAtOnce + i), disk::Outcome::kDone);
      EXPECT_EQ(std::memcmp(world.at_once[i].bytes, out[i].bytes, sizeof out[i].bytes), 0);
    }
    ASSERT_EQ(world.read(10, 2, {1, 3}, in), disk::Outcome::kDone);
    EXPECT_EQ(std::memcmp(in.bytes, out[2].bytes, sizeof in.bytes), 0);
    EXPECT_EQ(world.read(11, 1, {1, 3}, in), disk::Outcome::kChecksum);
    bool durable = false;
    world.tier->reset_space(SpaceHandle{1}, [&](bool ok) { durable = ok; });
    world.settle();
    EXPECT_TRUE(durable);
    EXPECT_EQ(world.read(12, 2, {1, 3}, in), disk::Outcome::kChecksum);
    world.drive->power_cut();
  }
  World world(medium);
  EXPECT_EQ(world.recovered, 0U);
}

TEST(DiskTier, AHeaderThatCannotBeWrittenCostsNoBlocks) {
  const auto medium = std::make_shared<SimMedium>();
  Page page{};
  {
    World world(medium);
    world.write(1, 0, {1, 1}, page);
    world.drive->kill();
  }
  const auto fails = [](std::uint32_t count) {
    return [count](SimDrive& drive) { drive.fail_next(file::Op::kWrite, EIO, count); };
  };
  {
    World world(medium, nullptr, fails(1));  // is tried again
    EXPECT_EQ(world.recovered, 1U);
    EXPECT_GT(world.opened.slots.at(0), 0U);
  }
  {
    World world(medium, nullptr, fails(100));
    EXPECT_EQ(world.opened.slots.at(0), 0U);  // off for the space
    world.settle();
  }
  World world(medium);
  EXPECT_EQ(world.recovered, 1U);
}

TEST(DiskTier, ADriveThatAllowsNoWritesIsAskedForNoneForAWhileAndServesWhatItHas) {
  for (const int error_number : {ENOSPC, EDQUOT, EROFS, EPERM, EACCES}) {
    SCOPED_TRACE(error_number);
    World world(std::make_shared<SimMedium>());
    Page page{}, in;
    world.write(1, 0, {1, 1}, page);
    world.drive->fail_next(file::Op::kWrite, error_number);
    ASSERT_EQ(world.tier->write({2, SpaceHandle{1}, 1, {1, 2}, disk::kNoParent, page.bytes}), disk::Admission::kQueued);
    world.settle();
    EXPECT_NE(world.done.at(2), disk::Outcome::kDone);
    EXPECT_FALSE(world.health.writes);
    EXPECT_TRUE(world.health.reads);
    EXPECT_NE(world.tier->write({3, SpaceHandle{1}, 1, {1, 2}, disk::kNoParent, page.bytes}), disk::Admission::kQueued);
    EXPECT_EQ(world.read(4, 0, {1, 1}, in), disk::Outcome::kDone);
  }
}

TEST(DiskTier, ABlockIsYoungerThanCopiesWhoseRecordsCouldNotBeRead) {
  const auto medium = std::make_shared<SimMedium>();
  Page page{};
  {
    World world(medium);
    for (std::uint32_t slot = 0; slot < 3; ++slot) world.write(slot, slot, {1, 1}, page);
    world.drive->kill();
  }
  {
    World world(medium, nullptr, {}, [](SimDrive& drive) { drive.fail_next(file::Op::kRead, EIO); });
    ASSERT_EQ(world.recovered, 0U);
    ASSERT_GT(world.opened.discarded.damaged, 0U);
    world.write(9, 5, {1, 1}, page);
    world.drive->kill();
  }
  World world(medium);
  EXPECT_EQ(world.slots, std::vector<std::uint32_t>{5});
}

TEST(DiskTier, AsksTheMeterForAllThatIsWritten) {
  const auto medium = std::make_shared<SimMedium>();
  const auto meter = std::make_shared<Meter>();
  World world(medium, meter);
  EXPECT_EQ(meter->charged, 4096U);  // the header
  Page page{};
  const auto write = [&](disk::OpId id) {
    const auto admission = world.tier->write({id, SpaceHandle{1}, 0, {1, 1}, disk::kNoParent, page.bytes});
    world.settle();
    return admission;
  };
  EXPECT_EQ(write(1), disk::Admission::kQueued);
  EXPECT_EQ(meter->asked, std::vector<std::uint64_t>{sizeof(Page) + 4096});  // and the page of its record
  meter->answer = Meter::Answer::kLater;
  EXPECT_EQ(write(2), disk::Admission::kLater);
  meter->answer = Meter::Answer::kRefused;
  EXPECT_EQ(write(3), disk::Admission::kBudget);
  EXPECT_EQ(world.drive->stats().write.bytes, sizeof(Page) + 64 + 4096);  // no more than that has been written
  // A record of a block that is damaged is erased only as far as the budget goes.
  meter->asked.clear();
  EXPECT_EQ(world.read(4, 0, {1, 2}, page), disk::Outcome::kChecksum);
  EXPECT_EQ(meter->asked, std::vector<std::uint64_t>{4096});
  EXPECT_EQ(world.read(5, 0, {1, 1}, page), disk::Outcome::kDone);
  meter->answer = Meter::Answer::kGranted;
  EXPECT_EQ(world.read(6, 0, {1, 2}, page), disk::Outcome::kChecksum);
  EXPECT_EQ(world.read(7, 0, {1, 1}, page), disk::Outcome::kChecksum);
  world.tier->reset_space(SpaceHandle{1});
  world.settle();
  EXPECT_EQ(meter->charged, 2 * 4096U);
}

}  // namespace
}  // namespace flexkv::testing
