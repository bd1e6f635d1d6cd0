#include "flexkv/ipc/socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>

#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/ipc/test_support.h"

namespace flexkv::ipc {
namespace {

using testing::as_bytes;
using testing::as_text;
using testing::Child;
using testing::open_fds;
using testing::readable;
using testing::socket_pair;
using testing::TempDir;

constexpr uid_t kNobody = 65534;

TEST(Socket, CarriesFramesAndDescriptors) {
  const std::size_t before = open_fds();
  {
    auto [a, b] = socket_pair();
    Frame frame;
    EXPECT_EQ(b.recv(frame).value(), RecvOutcome::kWouldBlock);
    const std::string large(kMaxFrameBytes, 'x');
    ASSERT_EQ(a.send(as_bytes(large)).value(), SendOutcome::kSent);
    ASSERT_EQ(b.recv(frame).value(), RecvOutcome::kFrame);
    EXPECT_EQ(as_text(frame.bytes), large);
    const std::vector<int> fds(kMaxFrameFds, 0);
    ASSERT_EQ(a.send(as_bytes("fds"), fds).value(), SendOutcome::kSent);
    ASSERT_EQ(b.recv(frame).value(), RecvOutcome::kFrame);
    EXPECT_EQ(as_text(frame.bytes), "fds");
    ASSERT_EQ(frame.fds.size(), kMaxFrameFds);
    for (const Fd& fd : frame.fds) EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
    { const Socket closed = std::move(a); }
    EXPECT_EQ(b.recv(frame).value(), RecvOutcome::kClosed);
    EXPECT_TRUE(frame.fds.empty());
    EXPECT_EQ(b.send(as_bytes("x")).error().code, ErrorCode::kPeer);
  }
  EXPECT_EQ(open_fds(), before);
}

TEST(Socket, ReportsAFullQueue) {
  auto [a, b] = socket_pair();
  int sent = 0;
  while (a.send(as_bytes("x")).value() == SendOutcome::kSent) ++sent;
  EXPECT_GT(sent, 0);
  Frame frame;
  for (int i = 0; i < sent; ++i) ASSERT_EQ(b.recv(frame).value(), RecvOutcome::kFrame);
  EXPECT_EQ(a.send(as_bytes("x")).value(), SendOutcome::kSent);
}

TEST(Socket, TooMuchIsAProtocolErrorAndLeaksNothing) {
  auto [raw, other] = testing::raw_pair();
  auto socket = Socket::adopt(std::move(other)).value();
  const std::size_t before = open_fds();
  Frame frame;
  const std::string large(kMaxFrameBytes + 1, 'x');
  ASSERT_EQ(::send(raw.get(), large.data(), large.size(), 0), std::ssize(large));
  EXPECT_EQ(socket.recv(frame).error().code, ErrorCode::kPeer);
  EXPECT_TRUE(frame.bytes.empty());

  for (const std::size_t size : {std::size_t{0}, std::size_t{1}}) {  // an empty frame looks like the end
    std::vector<int> fds(kMaxFrameFds + size, 0);
    std::vector<char> control(CMSG_SPACE(fds.size() * sizeof(int)));
    char byte = 0;
    iovec part{.iov_base = &byte, .iov_len = size};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size() * sizeof(int));
    ASSERT_EQ(::sendmsg(raw.get(), &message, 0), static_cast<ssize_t>(size));
    const auto outcome = socket.recv(frame);
    EXPECT_TRUE(!outcome.ok() || outcome.value() == RecvOutcome::kClosed);
    EXPECT_TRUE(frame.fds.empty());
  }
  EXPECT_EQ(open_fds(), before);
}

TEST(Listener, AcceptsAndUnlinks) {
  const TempDir temp;
  const std::size_t before = open_fds();
  {
    auto listener = Listener::listen(temp.path(), "node").value();
    struct stat info {};
    ASSERT_EQ(::stat(socket_path(temp.path(), "node").c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600U);
    EXPECT_FALSE(listener.accept().has_value());
    auto client = Socket::connect(socket_path(temp.path(), "node"), kSecond).value();
    ASSERT_TRUE(readable(listener.fd()));
    auto server = listener.accept();
    ASSERT_TRUE(server.has_value());
    EXPECT_EQ(server->peer_pid(), ::getpid());
    ASSERT_EQ(client.send(as_bytes("hi")).value(), SendOutcome::kSent);
    Frame frame;
    EXPECT_EQ(server->recv(frame).value(), RecvOutcome::kFrame);
  }
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
  EXPECT_EQ(open_fds(), before);
}

TEST(Listener, OneOwnerPerName) {
  const TempDir temp;
  auto first = Listener::listen(temp.path(), "node").value();
  const auto second = Listener::listen(temp.path(), "node");
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.error().message.find(std::to_string(::getpid())), std::string::npos) << second.error().message;
  EXPECT_TRUE(Socket::connect(socket_path(temp.path(), "node"), kSecond).ok());
  auto other = Listener::listen(temp.path(), "other").value();
  first = std::move(other);
  EXPECT_TRUE(Listener::listen(temp.path(), "node").ok());
  EXPECT_FALSE(Listener::listen(temp.path(), "other").ok());
}

TEST(Listener, IsSeenByNobodyUntilItIsShown) {
  const TempDir temp;
  auto hidden = Listener::claim(temp.path(), "node").value();
  EXPECT_FALSE(Socket::connect(socket_path(temp.path(), "node"), kSecond).ok());
  EXPECT_FALSE(Listener::claim(temp.path(), "node").ok());
  ASSERT_TRUE(hidden.show().ok());
  EXPECT_TRUE(Socket::connect(socket_path(temp.path(), "node"), kSecond).ok());
  EXPECT_TRUE(hidden.accept().has_value());
}

TEST(Listener, RefusesBadNames) {
  const TempDir temp;
  EXPECT_FALSE(Listener::listen(temp.path(), "../evil").ok());
  EXPECT_TRUE(std::filesystem::is_empty(temp.path()));
}

TEST(Listener, WorksInDirectoriesLongerThanAnAddress) {
  const TempDir temp;
  const std::string deep = temp.path() + "/" + std::string(200, 'd');
  const std::string name(64, 'n');
  const std::string path = socket_path(deep, name);
  EXPECT_EQ(Socket::connect(path, kSecond).error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(ensure_private_dir(deep).ok());
  EXPECT_EQ(Socket::connect(path, kSecond).error().code, ErrorCode::kNotFound);
  const std::size_t before = open_fds();
  {
    auto listener = Listener::listen(deep, name).value();
    EXPECT_TRUE(Socket::connect(path, kSecond).ok());
    EXPECT_TRUE(listener.accept().has_value());
  }
  EXPECT_EQ(open_fds(), before);
  EXPECT_TRUE(std::filesystem::is_empty(deep));
}

TEST(Socket, RefusesANameLongerThanAnAddress) {
  const TempDir temp;
  const auto socket = Socket::connect(temp.path() + "/" + std::string(120, 'n'), kSecond);
  EXPECT_EQ(socket.error().code, ErrorCode::kInvalidArgument);
}

TEST(Socket, ConnectSaysThatNobodyIsThere) {
  const TempDir temp;
  EXPECT_EQ(Socket::connect(temp.path() + "/x.sock", kSecond).error().code, ErrorCode::kNotFound);
}

TEST(Socket, ConnectToAFullListenerTimesOut) {
  const TempDir temp;
  const auto listener = Listener::listen(temp.path(), "node").value();
  std::vector<Socket> clients;
  while (true) {
    auto client = Socket::connect(socket_path(temp.path(), "node"), 50 * kMillisecond);
    if (!client) {
      EXPECT_EQ(client.error().code, ErrorCode::kTimeout);
      break;
    }
    clients.push_back(std::move(client).value());
    ASSERT_LT(clients.size(), 1000U);
  }
}

TEST(Listener, RunsOutOfDescriptorsWithoutSpinning) {
  const TempDir temp;
  auto listener = Listener::listen(temp.path(), "node").value();
  auto client = Socket::connect(socket_path(temp.path(), "node"), kSecond).value();
  ASSERT_TRUE(readable(listener.fd()));
  rlimit saved{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &saved), 0);
  const Fd highest(::dup(0));
  rlimit tight = saved;
  tight.rlim_cur = static_cast<rlim_t>(highest.get()) + 1;
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &tight), 0);
  EXPECT_FALSE(listener.accept().has_value());
  EXPECT_FALSE(readable(listener.fd(), 0));
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &saved), 0);
  EXPECT_EQ(listener.rejected(), 1U);
  Frame frame;
  EXPECT_EQ(client.recv(frame).value(), RecvOutcome::kClosed);
}

TEST(Listener, RejectsOtherUsers) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  const TempDir temp;
  auto listener = Listener::listen(temp.path(), "node").value();
  const std::string path = socket_path(temp.path(), "node");
  // As if the permissions had failed us.
  ASSERT_EQ(::chmod(temp.path().c_str(), 0711), 0);
  ASSERT_EQ(::chmod(path.c_str(), 0666), 0);
  Child stranger([&path] {
    if (::setuid(kNobody) != 0) ::_exit(1);
    auto socket = Socket::connect(path, kSecond);
    if (!socket) ::_exit(2);
    readable(socket.value().fd());
    Frame frame;
    ::_exit(socket.value().recv(frame).value() == RecvOutcome::kClosed ? 0 : 3);
  });
  ASSERT_TRUE(readable(listener.fd()));
  EXPECT_FALSE(listener.accept().has_value());
  EXPECT_EQ(listener.rejected(), 1U);
  EXPECT_EQ(stranger.wait(), 0);
}

TEST(Socket, RefusesAServerOfAnotherUser) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  const TempDir temp;
  ASSERT_EQ(::chown(temp.path().c_str(), kNobody, kNobody), 0);
  int ready[2];
  ASSERT_EQ(::pipe2(ready, O_CLOEXEC), 0);
  const Fd ready_read(ready[0]);
  Fd ready_write(ready[1]);
  Child stranger([&] {
    if (::setuid(kNobody) != 0) ::_exit(1);
    const auto listener = Listener::listen(temp.path(), "node");
    ready_write.reset();
    ::pause();
  });
  ready_write.reset();
  ASSERT_TRUE(readable(ready_read.get()));
  EXPECT_EQ(Socket::connect(socket_path(temp.path(), "node"), kSecond).error().code, ErrorCode::kPeer);
}

}  // namespace
}  // namespace flexkv::ipc
