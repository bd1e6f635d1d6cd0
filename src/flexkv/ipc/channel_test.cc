#include "flexkv/ipc/channel.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <future>
#include <thread>

#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/pending.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/ipc/test_support.h"
#include "flexkv/ipc/wire.h"

namespace flexkv::ipc {
namespace {

using testing::as_bytes;
using testing::as_text;
using testing::next_record;
using testing::open_fds;
using testing::readable;
using testing::socket_pair;
using testing::TempDir;

constexpr std::size_t kCapacity = 1 << 16;
constexpr Nanos kPatience = 10 * kSecond;

Hello hello_of(std::string_view payload) {
  const auto bytes = as_bytes(payload);
  return {.role = 3, .payload = {bytes.begin(), bytes.end()}};
}

PendingChannel pending_hello(Socket socket) {
  PendingChannel pending(std::move(socket), kPatience);
  EXPECT_TRUE(readable(pending.fd()));
  EXPECT_EQ(pending.advance().value(), PendingChannel::Step::kHello);
  return pending;
}

// Runs the client's blocking handshake against what `server` does with the other end.
template <typename Server>
Result<Connection> handshake(Server server) {
  auto pair = socket_pair();
  auto client = std::async(std::launch::async,
                           [&pair] { return Channel::connect(std::move(pair.first), hello_of("hello"), kPatience); });
  server(std::move(pair.second));
  return client.get();
}

TEST(Channel, ConnectsAndTalksBothWays) {
  const TempDir temp;
  const std::size_t before = open_fds();
  {
    auto listener = Listener::listen(temp.path(), "node").value();
    auto client = std::async(std::launch::async, [&temp] {
      return Channel::connect(socket_path(temp.path(), "node"), hello_of("who I am"), kPatience);
    });
    ASSERT_TRUE(readable(listener.fd()));
    PendingChannels set(4, kPatience);
    const auto fd = set.add(std::move(*listener.accept()), 0);
    ASSERT_TRUE(fd.has_value());
    ASSERT_TRUE(readable(*fd));
    ASSERT_EQ(set.find(*fd)->advance().value(), PendingChannel::Step::kHello);
    auto pending = set.take(*fd);
    EXPECT_EQ(set.size(), 0U);
    EXPECT_EQ(pending.hello().role, 3U);
    EXPECT_EQ(pending.hello().pid, ::getpid());
    EXPECT_EQ(as_text(pending.hello().payload), "who I am");
    const Fd pool(::memfd_create("pool", MFD_CLOEXEC));
    ASSERT_EQ(::ftruncate(pool.get(), 4711), 0);
    const int user_fd = pool.get();
    auto server = pending.accept(as_bytes("welcome"), {&user_fd, 1}, kCapacity).value();

    auto connection = client.get().value();
    EXPECT_EQ(as_text(connection.payload), "welcome");
    ASSERT_EQ(connection.fds.size(), 1U);
    EXPECT_EQ(::lseek(connection.fds[0].get(), 0, SEEK_END), 4711);

    std::vector<std::byte> out;
    std::thread echo([&server] {
      std::vector<std::byte> record;
      while (next_record(server, record)) ASSERT_TRUE(server.send(as_bytes("echo "), record));
    });
    for (int i = 0; i < 1000; ++i) {
      const std::string text = std::to_string(i);
      ASSERT_TRUE(connection.channel.send(as_bytes(text)));
      ASSERT_TRUE(next_record(connection.channel, out));
      ASSERT_EQ(as_text(out), "echo " + text);
    }
    EXPECT_FALSE(connection.channel.peer_gone());
    { const Channel ended = std::move(connection.channel); }
    echo.join();
    EXPECT_TRUE(server.peer_gone());
  }
  EXPECT_EQ(open_fds(), before);
}

TEST(Channel, LargestPayloads) {
  const std::string large(kMaxPayload, 'p');
  auto pair = socket_pair();
  auto client = std::async(std::launch::async,
                           [&] { return Channel::connect(std::move(pair.first), hello_of(large), kPatience); });
  auto pending = pending_hello(std::move(pair.second));
  EXPECT_EQ(as_text(pending.hello().payload), large);
  auto server = pending.accept(as_bytes(large), {}, kCapacity);
  ASSERT_TRUE(server.ok());
  EXPECT_EQ(as_text(client.get().value().payload), large);
}

TEST(Channel, RecordsOutliveTheirSender) {
  std::optional<Channel> server;
  auto client = handshake([&](Socket socket) {
    server.emplace(pending_hello(std::move(socket)).accept({}, {}, kCapacity).value());
    ASSERT_TRUE(server->send(as_bytes("last words")));
    server.reset();
  });
  auto& channel = client.value().channel;
  EXPECT_TRUE(channel.peer_gone());
  std::vector<std::byte> out;
  EXPECT_EQ(channel.pop(out), PopResult::kRecord);
  EXPECT_EQ(as_text(out), "last words");
  EXPECT_EQ(channel.pop(out), PopResult::kEmpty);
}

TEST(Channel, ARefusalSaysWhy) {
  const auto refused_with = [](ErrorCode code) {
    return handshake([code](Socket socket) {
             auto pending = pending_hello(std::move(socket));
             pending.refuse({code, "the layout\n differs"});
           })
        .error();
  };
  EXPECT_EQ(refused_with(ErrorCode::kInvalidArgument).code, ErrorCode::kUnsupported);
  EXPECT_EQ(refused_with(ErrorCode::kNoSpace).code, ErrorCode::kNoSpace);
  const auto message = refused_with(ErrorCode::kNoSpace).message;
  EXPECT_NE(message.find("the layout? differs"), std::string::npos) << message;
}

TEST(Channel, AnotherVersionIsToldBoth) {
  auto [client, server] = socket_pair();
  auto frame = encode_hello(hello_of(""));
  const std::uint32_t version = 77;
  std::memcpy(frame.data() + sizeof(std::uint32_t), &version, sizeof(version));
  frame.resize(20);  // another version may look different after the prefix
  ASSERT_TRUE(client.send(frame).ok());
  PendingChannel pending(std::move(server), kPatience);
  EXPECT_EQ(pending.advance().error().code, ErrorCode::kUnsupported);
  Frame answer;
  ASSERT_EQ(client.recv(answer).value(), RecvOutcome::kFrame);
  const auto refusal = decode_answer(answer.bytes).error();
  EXPECT_EQ(refusal.code, ErrorCode::kUnsupported);
  EXPECT_NE(refusal.message.find("version 77"), std::string::npos) << refusal.message;
  EXPECT_NE(refusal.message.find("version " + std::to_string(kProtocolVersion)), std::string::npos);
}

TEST(Channel, BadHellosCostOneConnection) {
  const auto good = encode_hello(hello_of("payload"));
  const auto offer = [](std::span<const std::byte> frame, std::span<const int> fds = {}) {
    auto [client, server] = socket_pair();
    EXPECT_TRUE(client.send(frame, fds).ok());
    return PendingChannel(std::move(server), kPatience).advance().ok();
  };
  EXPECT_TRUE(offer(good));
  for (std::size_t size = 1; size < good.size(); ++size) EXPECT_FALSE(offer(std::span(good).first(size)));
  auto longer = good;
  longer.push_back({});
  EXPECT_FALSE(offer(longer));
  const int fd = 0;
  EXPECT_FALSE(offer(good, {&fd, 1}));
  EXPECT_FALSE(offer(as_bytes("GET / HTTP/1.1")));
}

TEST(Channel, BadWelcomesFailTheClient) {
  const auto ring = RingMemory::create(kCapacity).value();
  const Fd wake = make_eventfd().value();
  const Fd blocking(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const auto answer = [](const std::vector<int>& fds) {
    return handshake([&fds](Socket socket) {
             ASSERT_TRUE(readable(socket.fd()));
             ASSERT_TRUE(socket.send(encode_welcome({}), fds).ok());
             Frame frame;
             ASSERT_TRUE(socket.recv(frame).ok());
           })
        .ok();
  };
  const std::size_t before = open_fds();
  EXPECT_TRUE(answer({ring.fd(), ring.fd(), wake.get(), wake.get()}));
  EXPECT_FALSE(answer({}));
  EXPECT_FALSE(answer({ring.fd(), ring.fd(), wake.get()}));
  EXPECT_FALSE(answer({ring.fd(), ring.fd(), wake.get(), blocking.get()}));
  EXPECT_FALSE(answer({wake.get(), ring.fd(), wake.get(), wake.get()}));
  EXPECT_FALSE(answer({ring.fd(), blocking.get(), wake.get(), wake.get()}));
  EXPECT_EQ(open_fds(), before);
  EXPECT_FALSE(handshake([](Socket socket) {
                 ASSERT_TRUE(readable(socket.fd()));
                 ASSERT_TRUE(socket.send(as_bytes("nonsense")).ok());
               }).ok());
  EXPECT_EQ(handshake([](Socket) {}).error().code, ErrorCode::kPeer);
}

TEST(Channel, AMuteServerTimesOut) {
  auto [client, server] = socket_pair();
  EXPECT_EQ(Channel::connect(std::move(client), {}, 30 * kMillisecond).error().code, ErrorCode::kTimeout);
}

TEST(Channel, TrafficOnTheSocketEndsTheChannel) {
  auto pair = socket_pair();
  const Fd intruder(::dup(pair.first.fd()));
  auto client =
      std::async(std::launch::async, [&pair] { return Channel::connect(std::move(pair.first), {}, kPatience); });
  auto server = pending_hello(std::move(pair.second)).accept({}, {}, kCapacity).value();
  const auto connection = client.get();
  EXPECT_FALSE(server.peer_gone());
  ASSERT_EQ(::send(intruder.get(), "x", 1, 0), 1);
  EXPECT_TRUE(server.peer_gone());
}

TEST(PendingChannels, MuteClientsAreBoundedAndExpire) {
  const std::size_t before = open_fds();
  PendingChannels set(2, 100);
  EXPECT_FALSE(set.next_deadline().has_value());
  std::vector<Socket> clients;
  std::vector<int> fds;
  const auto add = [&](Nanos now) {
    auto [client, server] = socket_pair();
    const auto fd = set.add(std::move(server), now);
    clients.push_back(std::move(client));
    if (fd) fds.push_back(*fd);
    return fd.has_value();
  };
  EXPECT_TRUE(add(0));
  EXPECT_TRUE(add(50));
  EXPECT_FALSE(add(60));
  Frame frame;
  ASSERT_EQ(clients[2].recv(frame).value(), RecvOutcome::kFrame);
  EXPECT_EQ(decode_answer(frame.bytes).error().code, ErrorCode::kNoSpace);
  EXPECT_EQ(clients[2].recv(frame).value(), RecvOutcome::kClosed);

  EXPECT_EQ(set.find(fds[0])->advance().value(), PendingChannel::Step::kWaiting);
  EXPECT_EQ(set.next_deadline(), 100);
  EXPECT_EQ(set.expire(99), 0U);
  EXPECT_EQ(set.expire(100), 1U);
  EXPECT_EQ(set.find(fds[0]), nullptr);
  EXPECT_EQ(clients[0].recv(frame).value(), RecvOutcome::kClosed);
  EXPECT_EQ(clients[1].recv(frame).value(), RecvOutcome::kWouldBlock);
  EXPECT_EQ(set.next_deadline(), 150);
  EXPECT_TRUE(add(120));
  EXPECT_EQ(set.expire(1000), 2U);
  clients.clear();
  EXPECT_EQ(open_fds(), before);
}

}  // namespace
}  // namespace flexkv::ipc
