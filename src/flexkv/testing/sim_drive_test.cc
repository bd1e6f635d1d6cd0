// The simulated drive's own promises: what a power cut leaves, which faults come, and that seeds replay.
#include "flexkv/testing/sim_drive.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <set>

namespace flexkv::testing {
namespace {

using file::Completion;
using file::FileId;
using file::Op;
using file::Outcome;
using file::Urgency;

class Sink final : public file::DriveSink {
 public:
  void on_completions(std::span<const Completion> completions) override {
    for (const Completion& completion : completions) done[completion.tag] = completion;
  }
  void on_overdue(std::uint64_t tag) override { overdue.insert(tag); }
  void on_availability(bool available, const std::string&) override { changes.push_back(available); }

  std::map<std::uint64_t, Completion> done;
  std::set<std::uint64_t> overdue;
  std::vector<bool> changes;
};

struct alignas(file::kDirectAlignment) Page {
  std::array<std::byte, file::kDirectAlignment> bytes{};
  explicit Page(int value = 0) { bytes.fill(static_cast<std::byte>(value)); }
};

struct World {
  explicit World(std::uint64_t seed = 1, std::shared_ptr<SimMedium> on = std::make_shared<SimMedium>())
      : medium(std::move(on)), drive({.seed = seed, .limits = {.depth = 8}}, medium, sink) {
    file = drive.open("f", true).value();
  }
  void transfer(Op op, std::uint64_t offset, Page* page) {
    const file::Request request{.tag = ++tag,
                                .op = op,
                                .urgency = Urgency::kLoad,
                                .file = file,
                                .offset = offset,
                                .data = page == nullptr ? nullptr : page->bytes.data(),
                                .bytes = page == nullptr ? 0 : page->bytes.size()};
    ASSERT_TRUE(drive.submit(std::span(&request, 1)));
  }
  Completion last() {
    EXPECT_TRUE(drive.run_until_idle());
    return sink.done.at(tag);
  }

  Sink sink;
  std::shared_ptr<SimMedium> medium;
  SimDrive drive;
  FileId file;
  std::uint64_t tag = 0;
};

TEST(SimDrive, ReadsWhatWasWritten) {
  World world;
  Page out(7), in;
  world.transfer(Op::kWrite, 4096, &out);
  EXPECT_EQ(world.last().outcome, Outcome::kDone);
  world.transfer(Op::kRead, 4096, &in);
  EXPECT_EQ(world.last().outcome, Outcome::kDone);
  EXPECT_EQ(in.bytes, out.bytes);
  world.transfer(Op::kRead, 8192, &in);
  EXPECT_EQ(world.last().error_number, ENODATA);
}

TEST(SimDrive, PowerCutLeavesAnyOfTheUnsyncedSectorsAndAllOfTheSynced) {
  std::set<std::size_t> survivors;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    World world(seed);
    Page synced(1), unsynced(2), in;
    world.transfer(Op::kWrite, 0, &synced);
    world.transfer(Op::kWrite, 4096, &synced);
    world.transfer(Op::kSync, 0, nullptr);
    world.last();
    world.transfer(Op::kWrite, 4096, &unsynced);
    world.last();
    world.drive.power_cut();

    World after(seed, world.medium);
    after.transfer(Op::kRead, 0, &in);
    ASSERT_EQ(after.last().outcome, Outcome::kDone);
    EXPECT_EQ(in.bytes, synced.bytes);
    after.transfer(Op::kRead, 4096, &in);
    ASSERT_EQ(after.last().outcome, Outcome::kDone);
    std::size_t kept = 0;
    for (std::size_t sector = 0; sector < 8; ++sector) {
      const std::byte first = in.bytes[sector * 512];
      for (std::size_t i = 0; i < 512; ++i) ASSERT_EQ(in.bytes[sector * 512 + i], first);
      kept += first == std::byte{2} ? 1 : 0;
    }
    survivors.insert(kept);
  }
  EXPECT_TRUE(survivors.contains(0));
  EXPECT_TRUE(survivors.contains(8));
  EXPECT_GT(survivors.size(), 3u);
}

TEST(SimDrive, KillKeepsWhatWasCompletedAndMayTearWhatWasNot) {
  std::set<bool> torn;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    World world(seed);
    Page out(1), later(2), in;
    world.transfer(Op::kWrite, 0, &out);
    world.transfer(Op::kWrite, 4096, &out);
    world.last();
    world.transfer(Op::kWrite, 4096, &later);
    world.drive.run_until(world.drive.now());
    world.drive.kill();
    EXPECT_FALSE(world.drive.run_until_idle());
    EXPECT_FALSE(world.sink.done.contains(3));

    World after(seed, world.medium);
    after.transfer(Op::kRead, 0, &in);
    after.last();
    EXPECT_EQ(in.bytes, out.bytes);
    after.transfer(Op::kRead, 4096, &in);
    after.last();
    torn.insert(in.bytes != out.bytes && in.bytes != later.bytes);
  }
  EXPECT_EQ(torn.size(), 2u);
}

TEST(SimDrive, FailsByScriptAndRunsOutOfSpace) {
  World world;
  Page page(1);
  world.drive.fail_next(Op::kWrite, EIO);
  world.transfer(Op::kWrite, 0, &page);
  EXPECT_EQ(world.last().error_number, EIO);
  world.medium->capacity_bytes = 4096;
  world.transfer(Op::kWrite, 0, &page);
  EXPECT_EQ(world.last().outcome, Outcome::kDone);
  world.transfer(Op::kWrite, 4096, &page);
  EXPECT_EQ(world.last().error_number, ENOSPC);
  EXPECT_EQ(world.drive.allocate(world.file, 0, 8192).error().code, ErrorCode::kNoSpace);
  EXPECT_TRUE(world.sink.changes.empty());
}

TEST(SimDrive, BitFlipsShowInReads) {
  World world;
  Page out(1), in;
  world.transfer(Op::kWrite, 0, &out);
  world.last();
  world.drive.flip_bit("f", 100);
  world.transfer(Op::kRead, 0, &in);
  world.last();
  EXPECT_NE(in.bytes[100], out.bytes[100]);
  in.bytes[100] = out.bytes[100];
  EXPECT_EQ(in.bytes, out.bytes);
}

TEST(SimDrive, AHungDriveIsGivenUpAndComesBack) {
  World world;
  Page page(1);
  world.drive.hang(true);
  world.transfer(Op::kWrite, 0, &page);
  world.drive.run_until(world.drive.now() + 10 * kSecond);
  EXPECT_EQ(world.sink.changes, std::vector<bool>{false});
  EXPECT_TRUE(world.sink.done.empty());
  world.drive.hang(false);
  world.drive.run_until(world.drive.now() + 10 * kSecond);
  EXPECT_EQ(world.sink.changes, (std::vector<bool>{false, true}));
  EXPECT_EQ(world.sink.done.at(1).outcome, Outcome::kDone);
}

TEST(SimDrive, TheSameSeedGivesTheSameRun) {
  const auto run = [](std::uint64_t seed) {
    World world(seed);
    world.drive.set_faults({.fail = 10, .partial = 20, .retry = 10, .slow = 5});
    std::vector<Page> pages(64, Page(3));
    std::vector<std::pair<std::uint64_t, Nanos>> history;
    for (std::uint64_t i = 0; i < pages.size(); ++i) {
      const file::Request request{.tag = i,
                                  .op = Op::kWrite,
                                  .urgency = Urgency::kSave,
                                  .file = world.file,
                                  .offset = i * 8192,
                                  .data = pages[i].bytes.data(),
                                  .bytes = 4096};
      (void)world.drive.submit(std::span(&request, 1));
      world.drive.step();
    }
    EXPECT_TRUE(world.drive.run_until_idle());
    for (const auto& [tag, completion] : world.sink.done) history.emplace_back(tag, completion.latency);
    return history;
  };
  EXPECT_EQ(run(5), run(5));
  EXPECT_NE(run(5), run(6));
}

}  // namespace
}  // namespace flexkv::testing
