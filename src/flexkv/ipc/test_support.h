// Helpers of this module's tests.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc::testing {

inline std::span<const std::byte> as_bytes(std::string_view text) { return std::as_bytes(std::span(text)); }

inline std::string as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A private directory that goes away with the test.
class TempDir {
 public:
  TempDir() {
    char pattern[] = "/tmp/flexkv-ipc-XXXXXX";
    path_ = ::mkdtemp(pattern);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline std::size_t open_fds() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

inline bool readable(int fd, int timeout_ms = 10'000) {
  pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&entry, 1, timeout_ms) == 1;
}

inline std::pair<Fd, Fd> raw_pair() {
  int fds[2];
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, fds), 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

inline std::pair<Socket, Socket> socket_pair() {
  auto [a, b] = raw_pair();
  return {Socket::adopt(std::move(a)).value(), Socket::adopt(std::move(b)).value()};
}

// Pops until there is a record, sleeping as a lane does. False: the channel ended.
inline bool next_record(Channel& channel, std::vector<std::byte>& out) {
  while (true) {
    const PopResult result = channel.pop(out);
    if (result == PopResult::kRecord) return true;
    if (result == PopResult::kCorrupt) return false;
    if (!channel.arm_sleep()) continue;
    pollfd fds[2] = {{.fd = channel.wake_fd(), .events = POLLIN, .revents = 0},
                     {.fd = channel.socket_fd(), .events = POLLIN, .revents = 0}};
    ::poll(fds, 2, -1);
    channel.disarm();
    if (fds[0].revents == 0 && fds[1].revents != 0 && channel.peer_gone())
      return channel.pop(out) == PopResult::kRecord;
  }
}

// A child process that runs `body` and exits; killed at the latest by the destructor.
class Child {
 public:
  template <typename Body>
  explicit Child(Body body) : pid_(::fork()) {
    if (pid_ == 0) {
      body();
      ::_exit(0);
    }
  }
  ~Child() { kill(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  void kill() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      wait();
    }
  }
  int wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  pid_t pid_;
};

}  // namespace flexkv::ipc::testing
