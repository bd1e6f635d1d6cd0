// What drive.h promises, of both engines on real files: past the page cache in the build folder, through it in
// /dev/shm.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mount.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "flexkv/base/prng.h"
#include "flexkv/file/lane_drive.h"
#include "flexkv/file/thread_engine.h"
#include "flexkv/file/uring_engine.h"
#include "flexkv/file/waiting_sink.h"

namespace flexkv::file {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kPage = kDirectAlignment;
constexpr Nanos kPatience = 60 * kSecond;

struct Kind {
  bool uring;
  bool in_memory;
};

// Page-aligned bytes that no one initialized.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() { return data_; }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> span() { return {data_, bytes_}; }
  void fill(std::uint64_t seed) {
    Prng prng(seed);
    for (std::size_t i = 0; i < bytes_; i += sizeof(std::uint64_t)) {
      const std::uint64_t word = prng.next();
      std::memcpy(data_ + i, &word, sizeof(word));
    }
  }

 private:
  const std::size_t bytes_;
  std::byte* const data_;
};

std::size_t open_descriptors() {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator{}));
}

class DriveTest : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    std::string name = (GetParam().in_memory ? fs::path("/dev/shm") : fs::current_path()) / "flexkv-drive-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override {
    drive_.reset();
    fs::remove_all(directory_);
  }

  void open(const DriveLimits& limits = {.depth = 8, .io_bytes_max = 64 << 10}) { open_in(directory_, limits, 0); }
  void open_in(const fs::path& directory, const DriveLimits& limits, std::uint64_t keep_free_bytes) {
    auto opened = LaneDrive::open({directory, limits, keep_free_bytes},
                                  GetParam().uring ? make_uring_engine() : make_thread_engine(), sink_);
    ASSERT_TRUE(opened.ok()) << opened.error().message;
    drive_ = std::move(opened).value();
  }

  Request request(Op op, FileId file, std::uint64_t offset, std::span<std::byte> data) {
    return {.tag = next_tag_++, .op = op, .file = file, .offset = offset, .data = data.data(), .bytes = data.size()};
  }
  Completion transfer(Op op, FileId file, std::uint64_t offset, std::span<std::byte> data) {
    const Request one = request(op, file, offset, data);
    EXPECT_TRUE(drive_->submit({&one, 1}));
    return sink_.completion(one.tag);
  }

  fs::path directory_;
  WaitingSink sink_;
  std::unique_ptr<Drive> drive_;
  std::atomic<std::uint64_t> next_tag_ = 1;
};

INSTANTIATE_TEST_SUITE_P(Real, DriveTest,
                         ::testing::Values(Kind{true, false}, Kind{true, true}, Kind{false, false}, Kind{false, true}),
                         [](const auto& kind) {
                           return std::string(kind.param.uring ? "Uring" : "Threads") +
                                  (kind.param.in_memory ? "Memory" : "Disk");
                         });

// Each of several threads has a part of a file of its own, and a copy of what must be there.
class Client {
 public:
  Client(Drive& drive, WaitingSink& sink, FileId file, std::uint64_t begin, std::size_t unit, std::uint64_t seed)
      : drive_(drive), sink_(sink), file_(file), begin_(begin), unit_(unit), prng_(seed), tag_(seed << 32) {
    model_.fill(seed);
  }

  void run(int rounds) {
    submit_all({make(Op::kWrite, 0, kBytes)});
    for (int round = 0; round < rounds; ++round) {
      std::vector<Request> batch;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const std::size_t first = prng_.below(kLaneBytes / unit_);
        const std::size_t count = 1 + prng_.below(kLaneBytes / unit_ - first);
        batch.push_back(
            make(prng_.chance(50) ? Op::kRead : Op::kWrite, lane * kLaneBytes + first * unit_, count * unit_));
      }
      if (prng_.chance(20)) batch.push_back({.tag = ++tag_, .op = Op::kSync, .file = file_});
      submit_all(batch);
    }
  }

 private:
  static constexpr std::size_t kLanes = 8;
  static constexpr std::size_t kLaneBytes = 160 << 10;
  static constexpr std::size_t kBytes = kLanes * kLaneBytes;

  Request make(Op op, std::size_t at, std::size_t bytes) {
    if (op == Op::kWrite) {
      for (std::size_t i = 0; i < bytes; i += unit_) model_.data()[at + i] = static_cast<std::byte>(prng_.next());
      std::memcpy(memory_.data() + at, model_.data() + at, bytes);
    } else {
      std::memset(memory_.data() + at, 0, bytes);
    }
    return {.tag = ++tag_,
            .op = op,
            .urgency = static_cast<Urgency>(prng_.below(kUrgencyCount)),
            .file = file_,
            .offset = begin_ + at,
            .data = memory_.data() + at,
            .bytes = bytes};
  }
  void submit_all(const std::vector<Request>& batch) {
    ASSERT_TRUE(drive_.submit(batch));
    for (const Request& request : batch) {
      const Completion completion = sink_.completion(request.tag);
      ASSERT_EQ(completion.outcome, Outcome::kDone) << std::strerror(completion.error_number);
      if (request.op == Op::kSync) continue;
      const std::size_t at = request.offset - begin_;
      ASSERT_EQ(std::memcmp(memory_.data() + at, model_.data() + at, request.bytes), 0);
    }
  }

  Drive& drive_;
  WaitingSink& sink_;
  const FileId file_;
  const std::uint64_t begin_;
  const std::size_t unit_;
  Prng prng_;
  std::uint64_t tag_;
  Buffer model_{kBytes};
  Buffer memory_{kBytes};

 public:
  static constexpr std::size_t kRegion = kBytes;
};

TEST_P(DriveTest, ConcurrentTransfersMatchAModel) {
  open();
  const FileId direct = drive_->open("direct", true).value();
  const FileId plain = drive_->open("plain", false).value();
  std::vector<std::thread> threads;
  for (std::uint64_t i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      const bool is_direct = i % 2 == 0;
      Client client(*drive_, sink_, is_direct ? direct : plain, i / 2 * Client::kRegion, is_direct ? kPage : 64, i + 1);
      client.run(60);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const DriveStats stats = drive_->stats();
  EXPECT_EQ(stats.queued, 0u);
  EXPECT_EQ(stats.read.failed + stats.write.failed, 0u);
  EXPECT_TRUE(drive_->close(kPatience));
}

TEST_P(DriveTest, NeighboursInScatteredMemoryLandInTheirPlaces) {
  open();
  const FileId file = drive_->open("f", true).value();
  constexpr std::size_t kCount = 200;
  Buffer all(kCount * kPage), scattered(2 * kCount * kPage);
  all.fill(1);
  ASSERT_EQ(transfer(Op::kWrite, file, 0, all.span()).outcome, Outcome::kDone);
  std::vector<Request> batch;
  for (std::size_t i = 0; i < kCount; ++i) {
    batch.push_back(request(Op::kRead, file, i * kPage, scattered.span().subspan(2 * (kCount - 1 - i) * kPage, kPage)));
  }
  ASSERT_TRUE(drive_->submit(batch));
  for (std::size_t i = 0; i < kCount; ++i) {
    ASSERT_EQ(sink_.completion(batch[i].tag).outcome, Outcome::kDone);
    ASSERT_EQ(std::memcmp(batch[i].data, all.data() + i * kPage, kPage), 0);
  }
}

TEST_P(DriveTest, RegisteredMemoryIsReadAndWritten) {
  open({.depth = 8, .io_bytes_max = 256 << 10});
  const FileId file = drive_->open("f", true).value();
  Buffer memory(4 << 20), other(4 << 20);
  memory.fill(1);
  EXPECT_EQ(drive_->describe().find("MiB registered"), std::string::npos) << drive_->describe();
  EXPECT_EQ(drive_->describe().find("registered files") != std::string::npos, GetParam().uring);
  drive_->register_memory(memory.span().first(1 << 20));
  drive_->register_memory(memory.span().subspan(1 << 20));
  // Before, during and after registration, and across both pieces.
  for (int i = 0; i < 20; ++i) {
    memory.fill(static_cast<std::uint64_t>(i));
    ASSERT_EQ(transfer(Op::kWrite, file, 0, memory.span()).outcome, Outcome::kDone);
    ASSERT_EQ(transfer(Op::kRead, file, 0, other.span()).outcome, Outcome::kDone);
    ASSERT_EQ(std::memcmp(memory.data(), other.data(), memory.size()), 0);
    std::memset(memory.data(), 0, memory.size());
    ASSERT_EQ(transfer(Op::kRead, file, 0, memory.span()).outcome, Outcome::kDone);
    ASSERT_EQ(std::memcmp(memory.data(), other.data(), memory.size()), 0);
  }
  EXPECT_EQ(drive_->describe().find("4 MiB registered") != std::string::npos, GetParam().uring) << drive_->describe();
}

TEST_P(DriveTest, ReadsPastTheEndSaySo) {
  open();
  const FileId direct = drive_->open("direct", true).value();
  const FileId plain = drive_->open("plain", false).value();
  Buffer memory(4 * kPage);
  memory.fill(1);
  for (const FileId file : {direct, plain}) {
    EXPECT_EQ(transfer(Op::kRead, file, 0, memory.span()).error_number, ENODATA);
    ASSERT_EQ(transfer(Op::kWrite, file, 0, memory.span().first(2 * kPage)).outcome, Outcome::kDone);
    EXPECT_EQ(transfer(Op::kRead, file, 0, memory.span().first(2 * kPage)).outcome, Outcome::kDone);
    EXPECT_EQ(transfer(Op::kRead, file, kPage, memory.span().first(2 * kPage)).error_number, ENODATA);
    EXPECT_EQ(transfer(Op::kRead, file, 8 * kPage, memory.span()).error_number, ENODATA);
  }
  // An end inside a page.
  fs::resize_file(directory_ / "direct", kPage + 100);
  EXPECT_EQ(transfer(Op::kRead, direct, 0, memory.span().first(2 * kPage)).error_number, ENODATA);
  EXPECT_EQ(transfer(Op::kRead, direct, 0, memory.span().first(kPage)).outcome, Outcome::kDone);
  EXPECT_TRUE(drive_->stats().available);
}

TEST_P(DriveTest, WhatIsLateFromTheStartIsNotBegun) {
  open();
  const FileId file = drive_->open("f", true).value();
  Buffer memory(kPage);
  Request late = request(Op::kWrite, file, 0, memory.span());
  late.deadline = 1;
  ASSERT_TRUE(drive_->submit({&late, 1}));
  EXPECT_EQ(sink_.completion(late.tag).outcome, Outcome::kDeadline);
  EXPECT_EQ(drive_->file_bytes(file).value(), 0u);
}

TEST_P(DriveTest, CanceledRequestsEndOnceAndTheOthersAreServed) {
  open({.depth = 2, .io_bytes_max = 64 << 10});
  const FileId file = drive_->open("f", true).value();
  constexpr std::size_t kBytes = 256 << 10;
  constexpr std::size_t kCount = 60;
  Buffer memory(kCount * kBytes);
  memory.fill(3);
  ASSERT_EQ(transfer(Op::kWrite, file, 0, memory.span()).outcome, Outcome::kDone);
  Buffer back(kCount * kBytes);
  std::vector<Request> batch;
  for (std::size_t i = 0; i < kCount; ++i) {
    batch.push_back(request(Op::kRead, file, i * kBytes, back.span().subspan(i * kBytes, kBytes)));
  }
  ASSERT_TRUE(drive_->submit(batch));
  for (std::size_t i = 0; i < kCount; i += 2) drive_->cancel(batch[i].tag);
  for (std::size_t i = 0; i < kCount; ++i) {
    const Completion completion = sink_.completion(batch[i].tag);
    if (completion.outcome == Outcome::kDone) {
      ASSERT_EQ(std::memcmp(batch[i].data, memory.data() + i * kBytes, kBytes), 0);
    } else {
      ASSERT_EQ(i % 2, 0u);
      ASSERT_TRUE(completion.outcome == Outcome::kCanceled || completion.error_number == ECANCELED);
    }
  }
  drive_->cancel(batch[0].tag);  // long over
}

TEST_P(DriveTest, CloseServesWhatItHasAndTakesNoMore) {
  open();
  const FileId file = drive_->open("f", true).value();
  constexpr std::size_t kCount = 200;
  Buffer memory(kCount * kPage);
  memory.fill(4);
  std::vector<Request> batch;
  for (std::size_t i = 0; i < kCount; ++i) {
    batch.push_back(request(Op::kWrite, file, i * kPage, memory.span().subspan(i * kPage, kPage)));
  }
  ASSERT_TRUE(drive_->submit(batch));
  EXPECT_TRUE(drive_->close(kPatience));
  EXPECT_FALSE(drive_->submit(batch));
  EXPECT_EQ(sink_.done_count(), kCount);
  std::vector<char> read(memory.size());
  std::ifstream(directory_ / "f", std::ios::binary).read(read.data(), static_cast<std::streamsize>(read.size()));
  EXPECT_EQ(std::memcmp(read.data(), memory.data(), read.size()), 0);
}

TEST_P(DriveTest, FilesCloseUnderTransfersAndNothingGoesToAnother) {
  const std::size_t descriptors = open_descriptors();
  open();
  Buffer memory(1 << 20);
  std::vector<Request> batch;
  std::vector<std::string> names;
  // More files than the ring has places for, their places used again while transfers to the last ones are in flight.
  for (std::uint64_t i = 0; i < 150; ++i) {
    names.push_back(std::to_string(i));
    const FileId file = drive_->open(names.back(), true).value();
    for (std::size_t piece = 0; piece < 2; ++piece) {
      // One byte value per file.
      const std::span<std::byte> page = memory.span().subspan(i * kPage, kPage);
      std::fill(page.begin(), page.end(), static_cast<std::byte>(i + 1));
      batch.push_back(request(Op::kWrite, file, piece * kPage, page));
      ASSERT_TRUE(drive_->submit({&batch.back(), 1}));
    }
    drive_->close_file(file);
    EXPECT_FALSE(drive_->file_bytes(file).ok());
  }
  for (const Request& each : batch) {
    const Completion completion = sink_.completion(each.tag);
    EXPECT_TRUE(completion.outcome == Outcome::kDone || completion.error_number == EBADF) << completion.error_number;
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    std::ifstream in(directory_ / names[i], std::ios::binary);
    for (char byte; in.get(byte);) ASSERT_TRUE(byte == static_cast<char>(i + 1) || byte == 0);
  }
  EXPECT_TRUE(drive_->stats().available);
  EXPECT_TRUE(drive_->close(kPatience));
  drive_.reset();
  EXPECT_EQ(open_descriptors(), descriptors);
}

TEST_P(DriveTest, RequestsToFilesThatAreNotOpenFail) {
  open();
  Buffer memory(kPage);
  EXPECT_EQ(transfer(Op::kRead, FileId{77}, 0, memory.span()).error_number, EBADF);
  EXPECT_FALSE(drive_->file_bytes(FileId{77}).ok());
  EXPECT_FALSE(drive_->allocate(FileId{77}, 0, 1).ok());
  drive_->close_file(FileId{77});
}

TEST_P(DriveTest, FullDrivesRefuseWritesAndStayAvailable) {
  const fs::path small = directory_ / "small";
  fs::create_directory(small);
  if (::mount("none", small.c_str(), "tmpfs", 0, "size=1m") != 0) GTEST_SKIP() << "cannot mount: " << strerror(errno);
  open_in(small, {.depth = 8, .io_bytes_max = 64 << 10}, 64 << 10);
  const FileId file = drive_->open("f", true).value();
  Buffer memory(2 << 20);
  memory.fill(1);
  // Within the room that is there, but not within what is to be left free.
  const Status refused = drive_->allocate(file, 0, 990 << 10);
  EXPECT_EQ(refused.error().code, ErrorCode::kNoSpace) << refused.error().message;
  EXPECT_EQ(drive_->file_bytes(file).value(), 0u);
  EXPECT_TRUE(drive_->allocate(file, 0, 512 << 10).ok());
  EXPECT_EQ(drive_->file_bytes(file).value(), 512u << 10);
  EXPECT_EQ(drive_->allocate(file, 0, 4 << 20).error().code, ErrorCode::kNoSpace);
  EXPECT_EQ(drive_->file_bytes(file).value(), 512u << 10);
  const Completion full = transfer(Op::kWrite, file, 0, memory.span());
  EXPECT_EQ(full.outcome, Outcome::kFailed);
  EXPECT_EQ(full.error_number, ENOSPC);
  EXPECT_TRUE(drive_->stats().available);
  EXPECT_EQ(transfer(Op::kWrite, file, 0, memory.span().first(512 << 10)).outcome, Outcome::kDone);
  EXPECT_TRUE(drive_->close(kPatience));
  drive_.reset();
  // The kernel lets go of a ring's files a moment after the ring is gone.
  int left = 1000;
  while (::umount(small.c_str()) != 0 && errno == EBUSY && --left > 0) ::poll(nullptr, 0, 10);
  EXPECT_GT(left, 0) << "still busy";
}

TEST_P(DriveTest, OnlyRegularFilesOfTheDirectoryAreOpened) {
  open();
  std::ofstream(directory_ / "target") << "x";
  fs::create_symlink(directory_ / "target", directory_ / "link");
  fs::create_symlink(directory_ / "nowhere", directory_ / "dangling");
  fs::create_directory(directory_ / "folder");
  ASSERT_EQ(::mkfifo((directory_ / "fifo").c_str(), 0600), 0);
  for (const char* name : {"", ".", "..", "a/b", "/etc/passwd", "../x", "link", "dangling", "folder", "fifo"}) {
    EXPECT_FALSE(drive_->open(name, true).ok()) << name;
    EXPECT_FALSE(drive_->open(name, false).ok()) << name;
  }
  EXPECT_FALSE(fs::exists(directory_ / "nowhere"));
  EXPECT_FALSE(drive_->remove("folder/x").ok());
  EXPECT_EQ(drive_->remove("missing").error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(drive_->open("mine", true).ok());
  EXPECT_EQ(fs::status(directory_ / "mine").permissions(), fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_TRUE(drive_->remove("mine").ok());
  EXPECT_FALSE(fs::exists(directory_ / "mine"));
}

}  // namespace
}  // namespace flexkv::file
