// Two processes: what happens when one of them is killed, and how long a round trip takes.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <optional>
#include <thread>

#include "flexkv/base/prng.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/pending.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/ipc/test_support.h"
#include "flexkv/ipc/wait.h"

namespace flexkv::ipc {
namespace {

using testing::as_bytes;
using testing::Child;
using testing::next_record;
using testing::open_fds;
using testing::readable;
using testing::TempDir;

constexpr Nanos kPatience = 10 * kSecond;
constexpr std::size_t kCapacity = 1 << 16;

Channel accept_one(Listener& listener) {
  readable(listener.fd());
  PendingChannel pending(std::move(*listener.accept()), kPatience);
  readable(pending.fd());
  if (!pending.advance()) ::_exit(10);
  return pending.accept({}, {}, kCapacity).value();
}

// Serves one client: each record comes back.
void serve_echo(const std::string& dir) {
  auto listener = Listener::listen(dir, "node").value();
  auto channel = accept_one(listener);
  std::vector<std::byte> record;
  while (next_record(channel, record)) {
    if (!channel.send(record)) ::_exit(11);
  }
}

Channel connect_to(const std::string& dir) {
  auto socket = wait_for_socket(dir, "node", -1, kPatience).value();
  return std::move(Channel::connect(std::move(socket), {}, kPatience).value().channel);
}

TEST(TwoProcesses, AKilledServerIsNoticedSweptAndReplaced) {
  const TempDir temp;
  const std::size_t before = open_fds();
  {
    Child server([&temp] { serve_echo(temp.path()); });
    auto channel = connect_to(temp.path());
    EXPECT_EQ(channel.peer_pid(), server.pid());
    std::vector<std::byte> record;
    ASSERT_TRUE(channel.send(as_bytes("ping")));
    ASSERT_TRUE(next_record(channel, record));
    const auto taken = Listener::listen(temp.path(), "node");
    ASSERT_FALSE(taken.ok());
    EXPECT_NE(taken.error().message.find(std::to_string(server.pid())), std::string::npos);
    EXPECT_EQ(sweep_stale(temp.path()).value(), 0U);

    server.kill();
    ASSERT_TRUE(readable(channel.socket_fd()));
    EXPECT_TRUE(channel.peer_gone());
    EXPECT_FALSE(next_record(channel, record));
  }
  EXPECT_TRUE(std::filesystem::exists(socket_path(temp.path(), "node")));
  EXPECT_EQ(Socket::connect(socket_path(temp.path(), "node"), kSecond).error().code, ErrorCode::kNotFound);
  {
    const auto successor = Listener::listen(temp.path(), "node");
    ASSERT_TRUE(successor.ok()) << successor.error().message;
    EXPECT_TRUE(Socket::connect(socket_path(temp.path(), "node"), kSecond).ok());
  }
  EXPECT_EQ(open_fds(), before);
}

TEST(TwoProcesses, SweepRemovesWhatAKilledOwnerLeft) {
  const TempDir temp;
  Child server([&temp] { serve_echo(temp.path()); });
  auto channel = connect_to(temp.path());
  server.kill();
  EXPECT_EQ(sweep_stale(temp.path()).value(), 1U);
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
}

TEST(TwoProcesses, SweepRemovesWhatAnOwnerLeftThatWasKilledAsItStarted) {
  const TempDir temp;
  Child starter([&temp] {
    const auto hidden = Listener::claim(temp.path(), "node").value();
    ::pause();
  });
  while (!std::filesystem::exists(temp.path() + "/node.tmp")) std::this_thread::yield();
  starter.kill();
  EXPECT_EQ(sweep_stale(temp.path()).value(), 1U);
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
}

TEST(TwoProcesses, AKilledClientIsNoticed) {
  const TempDir temp;
  auto listener = Listener::listen(temp.path(), "node").value();
  Child client([&temp] {
    auto channel = connect_to(temp.path());
    channel.send(as_bytes("here"));
    ::pause();
  });
  auto channel = accept_one(listener);
  std::vector<std::byte> record;
  ASSERT_TRUE(next_record(channel, record));
  EXPECT_FALSE(channel.peer_gone());
  client.kill();
  ASSERT_TRUE(readable(channel.socket_fd()));
  EXPECT_FALSE(next_record(channel, record));
}

TEST(TwoProcesses, ReconnectAfterARestart) {
  const TempDir temp;
  for (int i = 0; i < 5; ++i) {
    Child server([&temp] { serve_echo(temp.path()); });
    auto channel = connect_to(temp.path());
    std::vector<std::byte> record;
    ASSERT_TRUE(channel.send(as_bytes("ping")));
    ASSERT_TRUE(next_record(channel, record));
    server.kill();
  }
}

TEST(TwoProcesses, AForkedChildLeavesItsParentsSocket) {
  const TempDir temp;
  std::optional<Listener> listener(Listener::listen(temp.path(), "node").value());
  Child child([&listener] { listener.reset(); });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_TRUE(Socket::connect(socket_path(temp.path(), "node"), kSecond).ok());
  EXPECT_FALSE(Listener::listen(temp.path(), "node").ok());
}

// Owners start, sweep and stop, while others die by SIGKILL at any moment: at no time may two own the name, and what
// the dead leave never blocks the living.
TEST(TwoProcesses, StartersAndSweepersRace) {
  const TempDir temp;
  const std::string claim = temp.path() + "/claim";
  const auto contend = [&] {
    int owned = 0;
    for (int i = 0; i < 300 || owned == 0; ++i) {
      (void)sweep_stale(temp.path());
      const auto listener = Listener::listen(temp.path(), "node");
      if (!listener) continue;
      ++owned;
      const Fd exclusive(::open(claim.c_str(), O_CREAT | O_EXCL | O_CLOEXEC, 0600));
      if (!exclusive.valid()) ::_exit(20);
      ::unlink(claim.c_str());
      if (!Socket::connect(socket_path(temp.path(), "node"), kSecond)) ::_exit(21);
    }
  };
  Child a(contend);
  Child b(contend);
  Prng prng(5);
  for (int i = 0; i < 100; ++i) {
    Child victim([&temp] {
      while (true) {
        (void)sweep_stale(temp.path());
        (void)Listener::listen(temp.path(), "node");
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(prng.below(1500)));
  }
  EXPECT_EQ(a.wait(), 0);
  EXPECT_EQ(b.wait(), 0);
  EXPECT_TRUE(Listener::listen(temp.path(), "node").ok());
  (void)sweep_stale(temp.path());
  EXPECT_FALSE(std::filesystem::exists(socket_path(temp.path(), "node")));
}

// For information: nothing is asserted about time.
TEST(TwoProcesses, RoundTripTime) {
  const TempDir temp;
  Child server([&temp] { serve_echo(temp.path()); });
  auto channel = connect_to(temp.path());
  std::vector<std::byte> record;
  std::vector<Nanos> times;
  for (int i = 0; i < 20'000; ++i) {
    const Nanos start = monotonic_now();
    ASSERT_TRUE(channel.send(as_bytes("sixty-four bytes, or nearly so, as a small request would have.")));
    ASSERT_TRUE(next_record(channel, record));
    times.push_back(monotonic_now() - start);
  }
  std::ranges::sort(times);
  const auto micros = [&times](std::size_t percent) {
    return static_cast<double>(times[times.size() * percent / 100]) / kMicrosecond;
  };
  std::printf("[ info     ] round trip through rings and eventfds: p50 %.1f us, p99 %.1f us\n", micros(50), micros(99));
}

}  // namespace
}  // namespace flexkv::ipc
