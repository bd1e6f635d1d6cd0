// LaneDrive over an engine that ends I/Os when the test says so, or never.
#include "flexkv/file/lane_drive.h"

#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <thread>

#include "flexkv/base/prng.h"
#include "flexkv/file/waiting_sink.h"

namespace flexkv::file {
namespace {

constexpr std::size_t kPage = kDirectAlignment;
constexpr Nanos kForever = std::numeric_limits<Nanos>::max();

// What the test and the engine share: the engine may outlive the drive.
struct Held {
  struct Begun {
    Io io;
    const OpenFile* file;
  };

  // Blocks until `count` I/Os are held.
  std::vector<Begun> wait(std::size_t count) {
    std::unique_lock lock(mutex);
    FLEXKV_ASSERT(changed.wait_for(lock, std::chrono::minutes(1), [&] { return held.size() >= count; }));
    return held;
  }
  // Ends the oldest one; null: with all its bytes.
  void end(std::optional<std::int64_t> result = {}) {
    std::lock_guard lock(mutex);
    FLEXKV_ASSERT(!held.empty());
    ended.push_back({held.front().io.slot, result.value_or(static_cast<std::int64_t>(bytes(held.front().io)))});
    held.erase(held.begin());
    woken = true;
    changed.notify_all();
  }
  void hold(bool yes) {
    std::lock_guard lock(mutex);
    holding = yes;
  }
  static std::size_t bytes(const Io& io) {
    std::size_t sum = 0;
    for (const iovec& part : io.parts) sum += part.iov_len;
    return sum;
  }

  std::mutex mutex;
  std::condition_variable changed;
  bool holding = true;
  bool woken = false;
  std::vector<Begun> held;
  std::vector<EndedIo> ended;
  std::vector<const OpenFile*> forgotten;
  std::atomic<bool> stopped = false;
};

class HeldEngine final : public IoEngine {
 public:
  explicit HeldEngine(std::shared_ptr<Held> held) : held_(std::move(held)) {}
  Status start(std::uint32_t) override { return {}; }
  void begin(const Io& io, OpenFile& file) override {
    std::lock_guard lock(held_->mutex);
    if (held_->holding) {
      held_->held.push_back({io, &file});
    } else {
      held_->ended.push_back({io.slot, static_cast<std::int64_t>(Held::bytes(io))});
      held_->woken = true;
    }
    held_->changed.notify_all();
  }
  void flush() override {}
  void wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) override {
    std::unique_lock lock(held_->mutex);
    const auto woken = [&] { return std::exchange(held_->woken, false); };
    if (until) {
      held_->changed.wait_for(lock, std::chrono::nanoseconds(std::max<Nanos>(*until - monotonic_now(), 0)), woken);
    } else {
      held_->changed.wait(lock, woken);
    }
    ended.insert(ended.end(), held_->ended.begin(), held_->ended.end());
    held_->ended.clear();
  }
  void wake() override {
    std::lock_guard lock(held_->mutex);
    held_->woken = true;
    held_->changed.notify_all();
  }
  void forget(OpenFile& file) override {
    std::lock_guard lock(held_->mutex);
    held_->forgotten.push_back(&file);
    held_->changed.notify_all();
  }
  Status register_memory(std::span<std::byte>) override { return Error{ErrorCode::kUnsupported, "not here"}; }
  void stop() override { held_->stopped = true; }
  std::string describe() const override { return "held"; }

 private:
  const std::shared_ptr<Held> held_;
};

struct alignas(kPage) Pages {
  std::array<std::byte, 64 * kPage> bytes{};
};

class LaneDriveTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = std::filesystem::current_path() / "flexkv-lane-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override {
    drive_.reset();
    std::filesystem::remove_all(directory_);
  }

  void open(const DriveLimits& limits) {
    auto opened = LaneDrive::open({directory_, limits, 0}, std::make_unique<HeldEngine>(held_), *sink_);
    ASSERT_TRUE(opened.ok()) << opened.error().message;
    drive_ = std::move(opened).value();
    file_ = drive_->open("f", true).value();
  }
  Request page(std::uint64_t tag, std::size_t index, std::size_t memory_index, Op op = Op::kRead) {
    return {.tag = tag,
            .op = op,
            .file = file_,
            .offset = index * kPage,
            .data = pages_->bytes.data() + memory_index * kPage,
            .bytes = kPage};
  }
  void submit(const Request& request) { ASSERT_TRUE(drive_->submit({&request, 1})); }

  std::string directory_;
  std::unique_ptr<Pages> pages_ = std::make_unique<Pages>();
  std::shared_ptr<Held> held_ = std::make_shared<Held>();
  std::unique_ptr<WaitingSink> sink_ = std::make_unique<WaitingSink>();
  std::unique_ptr<Drive> drive_;
  FileId file_{};
};

TEST_F(LaneDriveTest, ADriveThatHangsIsFencedOffAndComesBackByProbing) {
  open({.depth = 1, .breaker = {.stall_after = 5 * kMillisecond, .probe_after = kMillisecond}});
  submit(page(1, 0, 0));
  held_->wait(1);
  submit(page(2, 8, 8));
  sink_->wait_available(false);
  EXPECT_EQ(sink_->completion(2).error_number, ETIMEDOUT);
  const Request refused = page(3, 0, 0);
  EXPECT_FALSE(drive_->submit({&refused, 1}));
  EXPECT_FALSE(drive_->stats().available);
  EXPECT_NE(drive_->stats().why, "");
  EXPECT_EQ(sink_->done_count(), 0u);  // the buffer of 1 is still the drive's
  held_->end();
  EXPECT_EQ(sink_->completion(1).outcome, Outcome::kDone);
  for (const Op op : {Op::kWrite, Op::kRead}) {
    EXPECT_EQ(held_->wait(1)[0].io.op, op);
    held_->end();
  }
  sink_->wait_available(true);
  submit(page(4, 0, 0));
  held_->wait(1);
  held_->end();
  EXPECT_EQ(sink_->completion(4).outcome, Outcome::kDone);
}

TEST_F(LaneDriveTest, AFailedProbeIsTriedAgain) {
  open({.depth = 2, .breaker = {.failures_in_row_max = 1, .probe_after = kMillisecond}});
  submit(page(1, 0, 0));
  held_->wait(1);
  held_->end(-EIO);
  sink_->wait_available(false);
  EXPECT_EQ(sink_->completion(1).error_number, EIO);
  held_->wait(1);
  held_->end(-EIO);
  held_->wait(1);
  held_->hold(false);
  held_->end();
  sink_->wait_available(true);
}

TEST_F(LaneDriveTest, AnOverdueRequestIsToldAndKeepsItsBufferUntilItEnds) {
  open({.depth = 1});
  Request begun = page(1, 0, 0);
  begun.deadline = monotonic_now() + kSecond / 5;
  submit(begun);
  held_->wait(1);
  Request waiting = page(2, 8, 8);
  waiting.deadline = begun.deadline;
  submit(waiting);
  sink_->wait_overdue(1);
  EXPECT_EQ(sink_->completion(2).outcome, Outcome::kDeadline);
  EXPECT_EQ(sink_->done_count(), 0u);
  held_->end();
  EXPECT_EQ(sink_->completion(1).outcome, Outcome::kDone);
}

TEST_F(LaneDriveTest, CancelReachesWhatWaitsAndNotWhatIsInFlight) {
  open({.depth = 1});
  submit(page(1, 0, 0));
  held_->wait(1);
  submit(page(2, 8, 8));
  drive_->cancel(1);
  drive_->cancel(2);
  EXPECT_EQ(sink_->completion(2).outcome, Outcome::kCanceled);
  held_->end();
  EXPECT_EQ(sink_->completion(1).outcome, Outcome::kDone);
}

TEST_F(LaneDriveTest, NeighboursShareAnIo) {
  open({.depth = 1, .io_bytes_max = 8 * kPage});
  submit(page(0, 40, 40));
  held_->wait(1);
  std::vector<Request> batch;
  for (std::size_t i = 0; i < 4; ++i) batch.push_back(page(1 + i, i, i));           // adjacent memory
  for (std::size_t i = 4; i < 8; ++i) batch.push_back(page(1 + i, i, 20 + 2 * i));  // scattered
  for (std::size_t i = 8; i < 12; ++i) batch.push_back(page(1 + i, i, i));          // beyond the bound
  ASSERT_TRUE(drive_->submit(batch));
  held_->end();
  const Io first = held_->wait(1)[0].io;
  EXPECT_EQ(first.offset, 0u);
  EXPECT_EQ(Held::bytes(first), 8 * kPage);
  EXPECT_EQ(first.parts.size(), 5u);
  // A short transfer is resumed where it ended.
  held_->end(static_cast<std::int64_t>(5 * kPage));
  const Io rest = held_->wait(1)[0].io;
  EXPECT_EQ(rest.offset, 5 * kPage);
  EXPECT_EQ(Held::bytes(rest), 3 * kPage);
  EXPECT_EQ(rest.parts[0].iov_base, batch[5].data);
  held_->end();
  const Io second = held_->wait(1)[0].io;
  EXPECT_EQ(second.offset, 8 * kPage);
  EXPECT_EQ(second.parts.size(), 1u);
  held_->end(-EINTR);
  EXPECT_EQ(held_->wait(1)[0].io.offset, 8 * kPage);
  held_->end();
  for (std::uint64_t tag = 0; tag <= 12; ++tag) EXPECT_EQ(sink_->completion(tag).outcome, Outcome::kDone);
}

TEST_F(LaneDriveTest, WhatFailsTogetherIsTriedApart) {
  open({.depth = 1, .io_bytes_max = 8 * kPage});
  submit(page(0, 40, 40));
  held_->wait(1);
  const Request batch[] = {page(1, 0, 0), page(2, 1, 1)};
  ASSERT_TRUE(drive_->submit(batch));
  held_->end();
  EXPECT_EQ(Held::bytes(held_->wait(1)[0].io), 2 * kPage);
  held_->end(-EIO);
  EXPECT_EQ(Held::bytes(held_->wait(1)[0].io), kPage);
  held_->end(-EIO);
  EXPECT_EQ(Held::bytes(held_->wait(1)[0].io), kPage);
  held_->end();
  EXPECT_EQ(sink_->completion(1).error_number, EIO);
  EXPECT_EQ(sink_->completion(2).outcome, Outcome::kDone);
}

TEST_F(LaneDriveTest, AFileIsForgottenWhenItsLastIoHasEnded) {
  open({.depth = 2});
  submit(page(1, 0, 0, Op::kWrite));
  const OpenFile* file = held_->wait(1)[0].file;
  drive_->close_file(file_);
  // Two turns of the lane, and what comes now finds no file.
  submit(page(2, 8, 8));
  EXPECT_EQ(sink_->completion(2).error_number, EBADF);
  {
    std::lock_guard lock(held_->mutex);
    EXPECT_TRUE(held_->forgotten.empty());
  }
  held_->end();
  EXPECT_EQ(sink_->completion(1).outcome, Outcome::kDone);
  std::unique_lock lock(held_->mutex);
  ASSERT_TRUE(held_->changed.wait_for(lock, std::chrono::minutes(1), [&] { return !held_->forgotten.empty(); }));
  EXPECT_EQ(held_->forgotten[0], file);
}

TEST_F(LaneDriveTest, CloseGivesUpOnWhatHangsAndLeavesTheSinkAlone) {
  open({.depth = 1});
  submit(page(1, 0, 0));
  held_->wait(1);
  submit(page(2, 8, 8));
  EXPECT_FALSE(drive_->close(5 * kMillisecond));
  drive_.reset();
  EXPECT_EQ(sink_->done_count(), 0u);
  sink_.reset();
  held_->end();  // much later; nobody is there any more
  while (!held_->stopped) std::this_thread::yield();
}

TEST_F(LaneDriveTest, CloseWaitsForWhatIsInFlight) {
  open({.depth = 1});
  submit(page(1, 0, 0));
  held_->wait(1);
  submit(page(2, 8, 8));
  std::thread closer([&] { EXPECT_TRUE(drive_->close(kForever)); });
  held_->end();
  held_->wait(1);
  held_->end();
  closer.join();
  EXPECT_EQ(sink_->completion(1).outcome, Outcome::kDone);
  EXPECT_EQ(sink_->completion(2).outcome, Outcome::kDone);
  const Request late = page(3, 0, 0);
  EXPECT_FALSE(drive_->submit({&late, 1}));
}

// A wake-up that is lost leaves a request behind for good.
TEST_F(LaneDriveTest, NoWakeUpIsLost) {
  open({.depth = 4, .io_bytes_max = 2 * kPage, .queue_requests_max = 64});
  held_->hold(false);
  std::vector<std::thread> threads;
  for (std::uint64_t thread = 1; thread <= 4; ++thread) {
    threads.emplace_back([&, thread] {
      Prng prng(thread);
      for (std::uint64_t i = 0; i < 2000; ++i) {
        const std::uint64_t tag = thread << 32 | i;
        const std::size_t at = prng.below(64);
        const Request request = page(tag, at, at);
        ASSERT_TRUE(drive_->submit({&request, 1}));
        if (prng.chance(20)) drive_->cancel(tag);
        if (prng.chance(5)) drive_->close_file(FileId{static_cast<std::uint32_t>(1000 + i)});
        (void)sink_->completion(tag);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(drive_->stats().queued, 0u);
}

// The time slice that a thread of ours has asked for, in nanoseconds; 0: no such thread.
std::uint64_t slice_of_thread(const std::string& name) {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string found;
    std::getline(std::ifstream(task.path() / "comm") >> std::ws, found);
    if (found != name) continue;
    struct {
      std::uint32_t size, policy;
      std::uint64_t flags;
      std::int32_t nice;
      std::uint32_t priority;
      std::uint64_t runtime, deadline, period;
    } attributes{};
    const int id = std::stoi(task.path().filename());
    if (::syscall(SYS_sched_getattr, id, &attributes, sizeof(attributes), 0U) == 0) return attributes.runtime;
  }
  return 0;
}

TEST_F(LaneDriveTest, TheLaneAsksForShortSlices) {
  open({});
  utsname kernel{};
  ASSERT_EQ(::uname(&kernel), 0);
  int major = 0, minor = 0;
  ASSERT_EQ(std::sscanf(kernel.release, "%d.%d", &major, &minor), 2);
  if (major < 6 || (major == 6 && minor < 12)) GTEST_SKIP() << "has one length of slice for all: " << kernel.release;
  EXPECT_EQ(slice_of_thread("flexkv-drive"), 100'000u);
}

}  // namespace
}  // namespace flexkv::file
