#include "flexkv/ipc/wait.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <optional>
#include <thread>

#include "flexkv/base/prng.h"
#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/ipc/test_support.h"

namespace flexkv::ipc {
namespace {

using testing::open_fds;
using testing::TempDir;

constexpr Nanos kLong = 20 * kSecond;

TEST(WaitForSocket, FindsWhoIsThere) {
  const TempDir temp;
  const auto listener = Listener::listen(temp.path(), "node").value();
  EXPECT_TRUE(wait_for_socket(temp.path(), "node", -1, 0).ok());
}

TEST(WaitForSocket, EndsByTimeoutAndByStop) {
  const TempDir temp;
  const std::size_t before = open_fds();
  EXPECT_EQ(wait_for_socket(temp.path(), "node", -1, 0).error().code, ErrorCode::kTimeout);
  EXPECT_EQ(wait_for_socket(temp.path(), "node", -1, 30 * kMillisecond).error().code, ErrorCode::kTimeout);
  {
    const Fd stop = make_eventfd().value();
    std::thread stopper([&stop] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      ring_eventfd(stop.get());
    });
    EXPECT_EQ(wait_for_socket(temp.path(), "node", stop.get(), kLong).error().code, ErrorCode::kCanceled);
    stopper.join();
    EXPECT_EQ(wait_for_socket(temp.path(), "node", stop.get(), kLong).error().code, ErrorCode::kCanceled);
  }
  EXPECT_EQ(open_fds(), before);
}

TEST(WaitForSocket, StopsWhileTheListenersQueueIsFull) {
  const TempDir temp;
  const auto listener = Listener::listen(temp.path(), "node").value();
  std::vector<Socket> clients;
  while (true) {
    auto client = Socket::connect(socket_path(temp.path(), "node"), kMillisecond);
    if (!client) break;
    clients.push_back(std::move(client).value());
  }
  const Fd stop = make_eventfd().value();
  ring_eventfd(stop.get());
  EXPECT_EQ(wait_for_socket(temp.path(), "node", stop.get(), kLong).error().code, ErrorCode::kCanceled);
  EXPECT_EQ(wait_for_socket(temp.path(), "node", -1, 300 * kMillisecond).error().code, ErrorCode::kTimeout);
}

// Started before the listener, whatever the interleaving: a lost event would last the whole timeout.
TEST(WaitForSocket, SeesTheListenerStart) {
  const TempDir temp;
  const std::string dir = temp.path() + "/later";
  Prng prng(3);
  for (int i = 0; i < 100; ++i) {
    std::optional<Listener> listener;
    const auto delay = std::chrono::microseconds(prng.below(400));
    std::thread starter([&] {
      std::this_thread::sleep_for(delay);
      ASSERT_TRUE(ensure_private_dir(dir).ok());
      listener.emplace(Listener::listen(dir, "node").value());
    });
    const Nanos start = monotonic_now();
    const auto socket = wait_for_socket(dir, "node", -1, kLong);
    starter.join();
    ASSERT_TRUE(socket.ok()) << socket.error().message;
    ASSERT_LT(monotonic_now() - start, kLong / 2);
  }
}

TEST(WaitForSocket, SurvivesTheRemovalOfTheDirectory) {
  const TempDir temp;
  const std::string dir = temp.path() + "/run";
  std::optional<Listener> listener;
  std::thread starter([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::filesystem::remove_all(dir);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    ASSERT_TRUE(ensure_private_dir(dir).ok());
    listener.emplace(Listener::listen(dir, "node").value());
  });
  const auto socket = wait_for_socket(dir, "node", -1, kLong);
  starter.join();
  EXPECT_TRUE(socket.ok()) << socket.error().message;
}

TEST(WaitForSocket, RefusesAnUnsafeDirectory) {
  const TempDir temp;
  std::filesystem::permissions(temp.path(), std::filesystem::perms::all);
  EXPECT_EQ(wait_for_socket(temp.path(), "node", -1, kLong).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace flexkv::ipc
