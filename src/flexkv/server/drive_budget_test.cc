// Budgets with their records on a real file system, and the node's drives under them.
#include "flexkv/server/drive_budget.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "flexkv/server/disk_bridge.h"

namespace flexkv::server {
namespace {

namespace fs = std::filesystem;
using Answer = disk::WriteMeter::Answer;

constexpr std::uint64_t kDaily = 64 << 20;  // the bucket holds 7 MiB
constexpr std::uint64_t kFirst = kDaily / 64 * 56 / 24;  // and this much of it is there at the start
constexpr std::uint64_t kWrite = 64 << 10;
constexpr admission::Endurance kSmall{.dwpd = 1, .capacity_bytes = kDaily};

// In memory, where syncing costs nothing: a kill leaves there what a drive would have.
fs::path quick_place() { return fs::exists("/dev/shm") ? fs::path("/dev/shm") : fs::temp_directory_path(); }

struct TempDir {
  explicit TempDir(const fs::path& where = quick_place()) {
    std::string name = (where / "flexkv-budget-XXXXXX").string();
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path = name;
  }
  ~TempDir() { fs::remove_all(path); }
  fs::path path;
};

template <typename Condition>
bool wait_for(Condition condition) {
  for (int i = 0; i < 60'000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

std::shared_ptr<const disk::Directory> open_directory(const fs::path& path) {
  return std::make_shared<const disk::Directory>(disk::Directory::open(path).value());
}

// A budget as a node has it, and who waits for it.
struct Opened {
  Opened(const fs::path& path, bool fresh, std::function<Nanos()> now = monotonic_now)
      : budget(open_directory(path), {kSmall, fresh, std::move(now)}, [this] { ++ready; }) {}
  // Bytes granted until it refuses.
  std::uint64_t spend() {
    std::uint64_t granted = 0;
    while (true) {
      const unsigned before = ready;
      const Answer answer = budget.take(kWrite);
      if (answer == Answer::kRefused) return granted;
      if (answer == Answer::kGranted) {
        granted += kWrite;
      } else if (!wait_for([&] { return ready != before; })) {
        ADD_FAILURE() << "nobody says when";
        return granted;
      }
    }
  }
  std::atomic<unsigned> ready = 0;
  DriveBudget budget;
};

TEST(DriveBudget, IsNotCrossedByRestartsKillsAndAClockThatJumpsBack) {
  const TempDir dir;
  std::uint64_t granted = 0;
  Nanos now = 100 * admission::kDay;
  for (int run = 0; run < 20; ++run) {
    Opened opened(dir.path, run == 0, [&] { return now; });
    const std::uint64_t before = granted;
    for (int step = 0; step < 4; ++step) {
      granted += opened.spend();
      now -= 10 * admission::kDay;
      granted += opened.spend();
      now += 10 * admission::kDay + 600 * kSecond;
    }
    if (run == 0) {
      EXPECT_GT(granted, kFirst);
    } else {
      EXPECT_LE(granted - before, kDaily / 24);  // 4 times 10 minutes, and no bucket
    }
    EXPECT_GE(opened.budget.status().report.written_bytes, granted);
    EXPECT_GE(opened.budget.status().report.last_day_bytes, granted);
    if (run % 2 == 0) {
      opened.budget.close(60 * kSecond);
    } else {
      now += admission::kDay;  // what is not running gains nothing
    }
  }
  EXPECT_LE(granted, kDaily);  // 20 times 40 minutes of running are less than a day
}

TEST(DriveBudget, IsNotCrossedByProcessesThatAreKilled) {
  const TempDir dir;
  fs::create_directory(dir.path / "d");
  auto* const granted = static_cast<std::atomic<std::uint64_t>*>(
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(static_cast<void*>(granted), MAP_FAILED);
  fs::permissions(dir.path / "d", fs::perms::owner_all);
  int refused = 0;
  int killed = 0;
  for (unsigned run = 0; run < 200 && refused < 3; ++run) {
    const std::uint64_t until = *granted + (1 + run % 3) * kWrite;
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      Opened opened(dir.path / "d", run == 0);
      while (true) {
        const Answer answer = opened.budget.take(kWrite);
        if (answer == Answer::kRefused) ::_exit(3);
        if (answer != Answer::kGranted) continue;
        *granted += kWrite;
        // However long the parent takes to see it: or a few children would have it all.
        if (*granted >= until) ::pause();
      }
    }
    int status = 0;
    bool over = false;
    EXPECT_TRUE(wait_for([&] { return (over = ::waitpid(child, &status, WNOHANG) == child) || *granted >= until; }));
    if (!over) {
      ::kill(child, SIGKILL);
      ASSERT_EQ(::waitpid(child, &status, 0), child);
    }
    if (WIFEXITED(status)) {
      ASSERT_EQ(WEXITSTATUS(status), 3);
      ++refused;
    } else {
      ++killed;
    }
    ASSERT_LE(*granted, kFirst + (1 << 20));  // and what some seconds fill in
  }
  EXPECT_EQ(refused, 3);
  EXPECT_GT(killed, 5);
  EXPECT_GT(*granted, kDaily / 64);
  Opened opened(dir.path / "d", false);
  EXPECT_GE(opened.budget.status().report.written_bytes, *granted);
  ::munmap(granted, 4096);
}

TEST(DriveBudget, ADamagedOrMissingRecordGivesNothingAndSaysSo) {
  for (const bool missing : {false, true}) {
    const TempDir dir;
    {
      Opened opened(dir.path, true);
      EXPECT_GT(opened.spend(), 0U);
      opened.budget.close(60 * kSecond);
    }
    const fs::path record = dir.path / "node.writes";
    ASSERT_TRUE(fs::exists(record));
    if (missing) {
      fs::remove(record);
    } else {
      std::ofstream(record) << "not a record";
    }
    Nanos now = 0;
    Opened opened(dir.path, false, [&] { return now; });
    EXPECT_EQ(opened.budget.take(kWrite), Answer::kRefused);
    EXPECT_EQ(opened.budget.pressure(), 1);
    EXPECT_NE(opened.budget.status().why.find(missing ? "no record" : "record of the write budget"), std::string::npos)
        << opened.budget.status().why;
    now = admission::kDay / 4;
    EXPECT_GT(opened.spend(), 0U);  // as time passes
  }
}

TEST(DriveBudget, ARecordThatCannotBeWrittenEndsWritingUntilItCan) {
  const TempDir dir;
  Nanos now = 0;
  Opened opened(dir.path, true, [&] { return now; });
  ASSERT_EQ(opened.budget.take(kWrite), Answer::kGranted);
  fs::create_directory(dir.path / "node.writes.new");  // in its place
  EXPECT_LE(opened.spend(), kDaily / 64 * 7 / 64);
  EXPECT_TRUE(wait_for([&] { return !opened.budget.status().why.empty(); }));
  EXPECT_EQ(opened.budget.take(kWrite), Answer::kRefused);
  fs::remove(dir.path / "node.writes.new");
  EXPECT_EQ(opened.budget.take(kWrite), Answer::kRefused);
  now += 20 * kSecond;
  EXPECT_GT(opened.spend(), kDaily / 64);
  EXPECT_EQ(opened.budget.status().why, "");
}

TEST(DriveBudget, WithoutALimitWhatWasWrittenIsKeptAllTheSame) {
  const TempDir dir;
  {
    DriveBudget budget(open_directory(dir.path), {.endurance = {}, .fresh = true}, {});
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(budget.take(kWrite), Answer::kGranted);
    budget.close(60 * kSecond);
  }
  DriveBudget budget(open_directory(dir.path), {.endurance = {}, .fresh = false}, {});
  EXPECT_EQ(budget.status().report.written_bytes, 1000 * kWrite);
  EXPECT_EQ(budget.pressure(), 0);
}

// ---- the bridge ----------------------------------------------------------------------------------------------------

constexpr std::uint64_t kSlot = 64 << 10;

// The node's drives, and the test in the node's place.
struct Drives {
  explicit Drives(const DiskOptions& options) {
    bridge = DiskBridge::open(options, {pool, 2 * kSlot}, [](const auto&) {}).value();
    bridge->open_space(1, {7}, kSlot);
    EXPECT_TRUE(wait_for([&] { return !bridge->status().spaces.empty(); }));
  }
  ~Drives() {
    EXPECT_TRUE(bridge->close(60 * kSecond));
    bridge.reset();
    std::free(pool);
  }
  node::DiskTransfer transfer(std::uint32_t slot, std::uint64_t host_offset) {
    node::DiskTransfer one;
    one.op = ++op;
    one.space = 1;
    one.slot = slot;
    one.key = {1, slot + 1};
    one.host_offset = host_offset;
    return one;
  }
  // Writes block after block until the drives refuse; how many were taken.
  unsigned fill(std::uint32_t first, std::uint32_t end) {
    unsigned taken = 0;
    for (std::uint32_t slot = first; slot < end; ++slot) {
      auto admission = node::DiskAdmission::kLater;
      const bool told = wait_for([&] {
        admission = bridge->write(transfer(slot, 0));
        return admission != node::DiskAdmission::kLater && admission != node::DiskAdmission::kBusy;
      });
      EXPECT_TRUE(told);
      last = admission;
      if (admission != node::DiskAdmission::kQueued) break;
      ++taken;
    }
    EXPECT_TRUE(wait_for([&] { return written() == total + taken; }));
    total += taken;
    return taken;
  }
  std::uint64_t written() const {
    std::uint64_t sum = 0;
    for (const auto& drive : bridge->status().drives) sum += drive.volume.blocks_written;
    return sum;
  }

  std::byte* const pool = static_cast<std::byte*>(std::aligned_alloc(4096, 2 * kSlot));
  std::unique_ptr<DiskBridge> bridge;
  node::DiskOp op = 0;
  std::uint64_t total = 0;
  node::DiskAdmission last{};
};

DiskOptions options_for(const fs::path& path) {
  DiskOptions options;
  options.directories = {path};
  options.bytes = 256 << 20;
  return options;
}

TEST(DiskBridge, BlocksAreRefusedForTheBudgetAlsoAfterARestart) {
  const TempDir dir(fs::temp_directory_path());
  DiskOptions options = options_for(dir.path / "d");
  options.endurance = kSmall;
  unsigned taken = 0;
  {
    Drives drives(options);
    EXPECT_LT(drives.bridge->write_pressure(), 0.5);
    taken = drives.fill(0, 1000);
    EXPECT_EQ(drives.last, node::DiskAdmission::kBudget);
    EXPECT_GT(taken, kFirst / kSlot * 7 / 10);
    EXPECT_GT(drives.bridge->write_pressure(), 0.9);
    // All of it counts: blocks, the pages of their records, the header.
    const auto status = drives.bridge->status();
    EXPECT_GE(status.drives[0].budget->report.written_bytes, taken * (kSlot + 4096) + 4096);
    EXPECT_LE(taken * (kSlot + 4096), kFirst + (1 << 20));
  }
  Drives again(options);
  taken += again.fill(500, 1000);
  EXPECT_EQ(again.last, node::DiskAdmission::kBudget);
  EXPECT_LE(taken * (kSlot + 4096), kFirst + (1 << 20));
  EXPECT_EQ(again.bridge->status().drives[0].budget->why, "");
}

TEST(DiskBridge, MakesWhatIsMissingAboveADirectoryOnlyIfItMay) {
  const TempDir dir(fs::temp_directory_path());
  DiskOptions options = options_for(dir.path / "x" / "y" / "d");
  {
    auto bridge = DiskBridge::open(options, {}, [](const auto&) {}).value();
    EXPECT_FALSE(fs::exists(dir.path / "x"));
    EXPECT_NE(bridge->status().drives[0].volume.health.why.find("create "), std::string::npos);
  }
  options.make_parents = true;
  Drives drives(options);
  EXPECT_EQ(drives.fill(0, 1), 1U);
  for (const char* made : {"x", "x/y", "x/y/d"}) {
    EXPECT_EQ(fs::status(dir.path / made).permissions(), fs::perms::owner_all) << made;
  }
}

TEST(DiskBridge, DirectoriesOnOneDriveShareItsBudget) {
  const TempDir dir(fs::temp_directory_path());
  DiskOptions options = options_for(dir.path / "a");
  options.directories.push_back(dir.path / "b");
  options.endurance = kSmall;
  Drives drives(options);
  const auto status = drives.bridge->status();
  ASSERT_EQ(status.drives.size(), 2U);
  for (const auto& drive : status.drives) EXPECT_EQ(drive.budget->report.daily_bytes, kDaily / 2);
}

TEST(DiskBridge, WithoutACapacityItIsTheFileSystems) {
  const TempDir dir(fs::temp_directory_path());
  DiskOptions options = options_for(dir.path / "d");
  options.endurance.dwpd = 0.5;
  Drives drives(options);
  const auto capacity = static_cast<double>(fs::space(dir.path).capacity);
  EXPECT_NEAR(static_cast<double>(drives.bridge->status().drives[0].budget->report.daily_bytes), capacity / 2, 4096);
}

TEST(DiskBridge, ServesFromMemoryFileSystemsThroughThePageCache) {
  if (!fs::exists("/dev/shm")) GTEST_SKIP() << "no /dev/shm";
  const TempDir dir("/dev/shm");
  DiskOptions options = options_for(dir.path / "d");
  options.bytes = 16 << 20;
  options.direct = false;
  {
    Drives drives(options);
    std::memset(drives.pool, 42, kSlot);
    ASSERT_EQ(drives.fill(3, 4), 1U);
    std::memset(drives.pool, 0, 2 * kSlot);
    ASSERT_EQ(drives.bridge->read(drives.transfer(3, kSlot)), node::DiskAdmission::kQueued);
    EXPECT_TRUE(wait_for([&] { return drives.bridge->status().drives[0].volume.blocks_read == 1; }));
    EXPECT_EQ(std::count(drives.pool + kSlot, drives.pool + 2 * kSlot, std::byte{42}), std::ptrdiff_t{kSlot});
  }
  Drives again(options);
  EXPECT_EQ(again.bridge->status().spaces[0].recovered_blocks, 1U);
}

}  // namespace
}  // namespace flexkv::server
