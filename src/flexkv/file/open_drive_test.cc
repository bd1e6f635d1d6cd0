// Which engine a drive gets, and file systems that cannot reserve space.
#include "flexkv/file/open_drive.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <thread>

#include "flexkv/file/drive_files.h"
#include "flexkv/file/waiting_sink.h"

namespace flexkv::file {
namespace {

class OpenDriveTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = std::filesystem::current_path() / "flexkv-open-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    directory_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::string directory_;
  WaitingSink sink_;
};

// For the calling thread and those that it starts: the call fails with that error.
bool forbid(std::uint32_t call, std::uint32_t error_number) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error_number),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(code), code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST_F(OpenDriveTest, ThreadsServeWhereIoUringIsForbidden) {
  bool forbidden = false;
  std::thread([&] {
    forbidden = forbid(SYS_io_uring_setup, EPERM);  // as the default profile of Docker does
    if (!forbidden) return;
    auto drive = open_drive({.directory = directory_}, sink_);
    ASSERT_TRUE(drive.ok()) << drive.error().message;
    EXPECT_NE(drive.value()->describe().find("threads (no io_uring: "), std::string::npos) << drive.value()->describe();
    const FileId file = drive.value()->open("f", false).value();
    std::byte byte{7};
    const Request request{.tag = 1, .op = Op::kWrite, .file = file, .data = &byte, .bytes = 1};
    ASSERT_TRUE(drive.value()->submit({&request, 1}));
    EXPECT_EQ(sink_.completion(1).outcome, Outcome::kDone);
  }).join();
  if (!forbidden) GTEST_SKIP() << "no seccomp filters here";
}

TEST_F(OpenDriveTest, GoesThroughThePageCacheWhenItIsAskedTo) {
  auto drive = open_drive({.directory = directory_, .direct = false}, sink_).value();
  EXPECT_NE(drive->describe().find("through the page cache, as asked for"), std::string::npos) << drive->describe();
  const FileId file = drive->open("f", true).value();
  alignas(kDirectAlignment) std::byte page[kDirectAlignment] = {std::byte{7}};
  const Request write{.tag = 1, .op = Op::kWrite, .file = file, .data = page, .bytes = sizeof page};
  ASSERT_TRUE(drive->submit({&write, 1}));
  EXPECT_EQ(sink_.completion(1).outcome, Outcome::kDone);
  page[0] = std::byte{0};
  const Request read{.tag = 2, .op = Op::kRead, .file = file, .data = page, .bytes = sizeof page};
  ASSERT_TRUE(drive->submit({&read, 1}));
  EXPECT_EQ(sink_.completion(2).outcome, Outcome::kDone);
  EXPECT_EQ(page[0], std::byte{7});
}

TEST_F(OpenDriveTest, WritesZerosForWantOfReservingOnlyIfItMay) {
  bool forbidden = false;
  std::thread([&] {
    forbidden = forbid(SYS_fallocate, EOPNOTSUPP);
    if (!forbidden) return;
    for (const bool may : {false, true}) {
      const std::string name = may ? "may" : "may-not";
      auto files = DriveFiles::open(directory_, {.reserve_by_writing = may}).value();
      const FileId file = files->open_file(name, false).value();
      ASSERT_TRUE(files->allocate(file, 0, 1 << 20, [] {}).ok());
      struct stat info {};
      ASSERT_EQ(::stat((directory_ + "/" + name).c_str(), &info), 0);
      EXPECT_EQ(info.st_size, 1 << 20);
      EXPECT_EQ(info.st_blocks > 0, may);
    }
  }).join();
  if (!forbidden) GTEST_SKIP() << "no seccomp filters here";
}

TEST_F(OpenDriveTest, ADirectoryThatCannotBeMadeIsAnError) {
  EXPECT_FALSE(open_drive({.directory = "/proc/no/such"}, sink_).ok());
  EXPECT_FALSE(open_drive({.directory = "/etc/passwd"}, sink_).ok());
}

TEST_F(OpenDriveTest, ZerosAreWrittenWhereSpaceCannotBeReserved) {
  for (const int flags : {0, O_DIRECT}) {
    Fd fd(::open((directory_ + "/f").c_str(), O_CREAT | O_RDWR | O_TRUNC | flags, 0600));
    if (!fd.valid()) continue;  // no O_DIRECT here
    int steps = 0;
    ASSERT_TRUE(grow_by_writing(fd.get(), (3 << 20) + 100, [&] { ++steps; }).ok());
    EXPECT_EQ(steps, 3) << "each of them may take its time";
    EXPECT_EQ(std::filesystem::file_size(directory_ + "/f"), (3u << 20) + 100);
    ASSERT_TRUE(grow_by_writing(fd.get(), 1 << 20, [] {}).ok());
    EXPECT_EQ(std::filesystem::file_size(directory_ + "/f"), (3u << 20) + 100);
  }
}

}  // namespace
}  // namespace flexkv::file
