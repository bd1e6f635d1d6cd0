#include "flexkv/ipc/helper_process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <thread>

#include "flexkv/ipc/poll.h"

namespace flexkv::ipc {
namespace {

Result<HelperProcess> shell(const std::string& script, std::span<const int> fds = {}) {
  const std::vector<std::string> argv{"sh", "-c", script};
  return HelperProcess::start(argv, fds);
}

// What it says, or "" at its end.
std::string heard(HelperProcess& helper) {
  Frame frame;
  while (true) {
    const auto outcome = helper.socket().recv(frame);
    if (!outcome.ok() || outcome.value() == RecvOutcome::kClosed) return "";
    if (outcome.value() == RecvOutcome::kFrame) {
      return {reinterpret_cast<const char*>(frame.bytes.data()), frame.bytes.size()};
    }
    pollfd readable{.fd = helper.socket().fd(), .events = POLLIN, .revents = 0};
    EXPECT_TRUE(poll_until({&readable, 1}, deadline_after(60 * kSecond)).value());
  }
}

TEST(HelperProcess, HasItsSocketAndWhatItWasGivenAndNothingElse) {
  const Fd given(::memfd_create("given", MFD_CLOEXEC));
  ASSERT_EQ(::write(given.get(), "text", 4), 4);
  ASSERT_EQ(::lseek(given.get(), 0, SEEK_SET), 0);
  const Fd inherited(::memfd_create("not for it", 0));
  const int fds[] = {given.get()};
  auto helper = shell("cat <&4 >&3; exec ls /proc/self/fd >&3", fds);
  ASSERT_TRUE(helper.ok()) << helper.error().message;
  EXPECT_EQ(heard(helper.value()), "text");
  EXPECT_EQ(heard(helper.value()), "0\n1\n2\n3\n4\n5\n");  // the last one is what it is looking at
}

TEST(HelperProcess, IsGoneWithItsOwner) {
  pid_t pid = 0;
  {
    auto helper = shell("trap '' TERM; echo on >&3; read line <&3; read line <&3");
    ASSERT_TRUE(helper.ok()) << helper.error().message;
    EXPECT_EQ(heard(helper.value()), "on\n");
    pid = helper.value().pid();
    ASSERT_EQ(::kill(pid, SIGSTOP), 0);
  }
  EXPECT_NE(::kill(pid, 0), 0);
  EXPECT_EQ(errno, ESRCH);
}

// As long as another process traces it, a process that was killed stays in the table, whoever its parent is.
TEST(HelperProcess, ThatIsNotGoneInTimeIsTakenOutLater) {
  ASSERT_EQ(HelperProcess::reap(), 0U);
  int ready[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  pid_t pid = 0;
  pid_t tracer = 0;
  {
    auto helper = shell("echo on >&3; read line <&3");
    ASSERT_TRUE(helper.ok()) << helper.error().message;
    EXPECT_EQ(heard(helper.value()), "on\n");
    pid = helper.value().pid();
    tracer = ::fork();
    if (tracer == 0) {
      const char seized = ::ptrace(PTRACE_SEIZE, pid, 0, 0) == 0 ? 'y' : 'n';
      if (::write(ready[1], &seized, 1) == 1) ::pause();
      ::_exit(0);
    }
    char seized = 0;
    ASSERT_EQ(::read(ready[0], &seized, 1), 1);
    if (seized != 'y') {
      ::kill(tracer, SIGKILL);
      ::waitpid(tracer, nullptr, 0);
      GTEST_SKIP() << "nothing may be traced here";
    }
  }
  EXPECT_EQ(HelperProcess::reap(), 1U);
  EXPECT_EQ(::kill(pid, 0), 0) << "it is still in the table";
  ASSERT_EQ(::kill(tracer, SIGKILL), 0);
  ASSERT_EQ(::waitpid(tracer, nullptr, 0), tracer);
  const Nanos end = monotonic_now() + 60 * kSecond;
  while (HelperProcess::reap() > 0 && monotonic_now() < end) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(HelperProcess::reap(), 0U);
  EXPECT_NE(::kill(pid, 0), 0);
}

TEST(HelperProcess, EndsItsConnectionWhenItDies) {
  auto helper = shell("exit 3");
  ASSERT_TRUE(helper.ok());
  EXPECT_EQ(heard(helper.value()), "");
}

TEST(HelperProcess, ThatDoesNotExistIsNamed) {
  const std::vector<std::string> argv{"/nowhere/python"};
  const auto helper = HelperProcess::start(argv, {});
  ASSERT_FALSE(helper.ok());
  EXPECT_NE(helper.error().message.find("/nowhere/python"), std::string::npos);
}

}  // namespace
}  // namespace flexkv::ipc
