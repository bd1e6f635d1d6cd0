// Which engine a drive gets, and file systems that cannot reserve space.
#include "flexkv/file/open_drive.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
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

// For the calling thread and those that it starts, as the default profile of Docker does.
bool forbid_io_uring() {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program{std::size(code), code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

TEST_F(OpenDriveTest, ThreadsServeWhereIoUringIsForbidden) {
  bool forbidden = false;
  std::thread([&] {
    forbidden = forbid_io_uring();
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

TEST_F(OpenDriveTest, ADirectoryThatCannotBeMadeIsAnError) {
  EXPECT_FALSE(open_drive({.directory = "/proc/no/such"}, sink_).ok());
  EXPECT_FALSE(open_drive({.directory = "/etc/passwd"}, sink_).ok());
}

TEST_F(OpenDriveTest, ZerosAreWrittenWhereSpaceCannotBeReserved) {
  for (const int flags : {0, O_DIRECT}) {
    Fd fd(::open((directory_ + "/f").c_str(), O_CREAT | O_RDWR | O_TRUNC | flags, 0600));
    if (!fd.valid()) continue;  // no O_DIRECT here
    ASSERT_TRUE(grow_by_writing(fd.get(), (3 << 20) + 100).ok());
    EXPECT_EQ(std::filesystem::file_size(directory_ + "/f"), (3u << 20) + 100);
    ASSERT_TRUE(grow_by_writing(fd.get(), 1 << 20).ok());
    EXPECT_EQ(std::filesystem::file_size(directory_ + "/f"), (3u << 20) + 100);
  }
}

}  // namespace
}  // namespace flexkv::file
