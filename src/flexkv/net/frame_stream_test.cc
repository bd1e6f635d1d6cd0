#include "flexkv/net/frame_stream.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <csignal>
#include <map>
#include <utility>

#include "flexkv/base/prng.h"
#include "flexkv/net/tcp.h"

namespace flexkv::net {
namespace {

constexpr std::size_t kPlenty = 64U << 20;

Secret secret(char letter) { return Secret::from_text(std::string(Secret::kMinBytes, letter)).value(); }
TlsContext context(char letter, const char* cluster = "test") {
  return TlsContext::create(secret(letter), cluster).value();
}

std::pair<Fd, Fd> sockets() {
  int fds[2];
  FLEXKV_ASSERT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
  return {Fd(fds[0]), Fd(fds[1])};
}

// Keeps every frame, in one buffer after the other.
struct Keeper : FrameSink {
  Result<std::span<std::byte>> on_head(const FrameHead& head) override {
    if (refuse) return Error{ErrorCode::kPeer, "not wanted"};
    bodies.emplace_back(head.bytes);
    return std::span(bodies.back());
  }
  Status on_frame(const FrameHead& head) override {
    heads.push_back(head);
    return {};
  }
  std::vector<FrameHead> heads;
  std::vector<std::vector<std::byte>> bodies;
  bool refuse = false;
};

class FrameStreams : public testing::Test {
 protected:
  void SetUp() override { ::signal(SIGPIPE, SIG_IGN); }

  void connect() {
    connect(context('a'), context('a'));
    FLEXKV_ASSERT(client->state() == FrameStream::State::kOpen && server->state() == FrameStream::State::kOpen);
  }
  void connect(const TlsContext& client_context, const TlsContext& server_context) {
    auto [a, b] = sockets();
    client.emplace(TlsStream::create(client_context, std::move(a), TlsStream::Role::kClient, "peer").value());
    server.emplace(TlsStream::create(server_context, std::move(b), TlsStream::Role::kServer, "peer").value());
    for (int i = 0; i < 20; ++i) step();
  }
  void step(std::size_t budget = kPlenty) {
    if (client && client->state() < FrameStream::State::kClosed) client->pump(to_client, budget);
    if (server && server->state() < FrameStream::State::kClosed) server->pump(to_server, budget);
  }

  Keeper to_client;
  Keeper to_server;
  std::optional<FrameStream> client;
  std::optional<FrameStream> server;
};

TEST_F(FrameStreams, CarryFramesBothWays) {
  connect();
  Prng random(1);
  std::vector<FrameHead> heads[2];
  std::vector<std::vector<std::byte>> bodies[2];
  for (int i = 0; i < 400; ++i) {
    const auto side = static_cast<std::size_t>(random.next() % 2);
    std::vector<std::byte> body(random.next() % 4 == 0 ? random.next() % (kFrameBytesMax + 1) : random.next() % 100);
    for (std::byte& byte : body) byte = static_cast<std::byte>(random.next());
    FrameStream& sender = side == 0 ? *client : *server;
    const auto half = std::span<const std::byte>(body).first(body.size() / 2);
    const auto rest = std::span<const std::byte>(body).subspan(half.size());
    const auto kind = static_cast<std::uint32_t>(random.next());
    const auto id = random.next();
    while (!sender.send(kind, id, {half, rest})) step(1 + random.next() % 100'000);
    heads[side].push_back({static_cast<std::uint32_t>(body.size()), kind, id});
    bodies[side].push_back(std::move(body));
    if (random.next() % 3 == 0) step(1 + random.next() % 100'000);
  }
  while (!client->idle() || !server->idle() || client->more() || server->more()) step();
  step();
  EXPECT_EQ(to_server.heads, heads[0]);
  EXPECT_EQ(to_client.heads, heads[1]);
  EXPECT_TRUE(to_server.bodies == bodies[0]);
  EXPECT_TRUE(to_client.bodies == bodies[1]);
}

TEST_F(FrameStreams, AskForEventsUntilAllIsSent) {
  connect();
  EXPECT_EQ(client->events(), static_cast<std::uint32_t>(EPOLLIN));
  const std::vector<std::byte> body(kFrameBytesMax);
  while (client->send(1, 1, {body})) client->pump(to_client, kPlenty);
  EXPECT_EQ(client->events(), static_cast<std::uint32_t>(EPOLLIN | EPOLLOUT));
  while (!client->idle()) step();
  EXPECT_EQ(client->events(), static_cast<std::uint32_t>(EPOLLIN));
}

// It goes from where it lies as far as the socket takes it, and the rest is kept: the caller's bytes are its own again.
TEST_F(FrameStreams, TakeALongFrameWithOneCall) {
  connect();
  Prng random(2);
  std::vector<std::byte> body(kFrameBytesMax);
  for (std::byte& byte : body) byte = static_cast<std::byte>(random.next());
  const auto sent = body;
  const std::vector<std::byte> small(10, std::byte{7});
  ASSERT_TRUE(
      client->send(1, 1, {std::span<const std::byte>(body).first(5), std::span<const std::byte>(body).subspan(5)}));
  EXPECT_FALSE(client->idle()) << "the socket took all of it, so this shows nothing";
  ASSERT_TRUE(client->send(2, 2, {small}));
  std::ranges::fill(body, std::byte{0});
  server->pump(to_server, kPlenty);
  EXPECT_FALSE(to_server.bodies.empty()) << "nothing was sent at once";
  while (!client->idle() || server->more()) step();
  step();
  ASSERT_EQ(to_server.heads.size(), 2U);
  EXPECT_TRUE(to_server.bodies[0] == sent);
  EXPECT_EQ(to_server.bodies[1], small);
}

TEST_F(FrameStreams, EndWithAnotherSecretOrCluster) {
  for (const TlsContext& stranger : {context('b'), context('a', "other")}) {
    connect(context('a'), stranger);
    EXPECT_EQ(client->state(), FrameStream::State::kFailed);
    EXPECT_EQ(server->state(), FrameStream::State::kFailed);
    EXPECT_NE(client->why().find("another secret or cluster name"), std::string::npos) << client->why();
    EXPECT_NE(server->why().find("another secret or cluster name"), std::string::npos) << server->why();
  }
}

// A TLS client without any key: the server has no certificate to go on with.
TEST_F(FrameStreams, EndWithoutAKey) {
  for (const bool keyless_client : {true, false}) {
    auto [a, b] = sockets();
    const std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)> plain(SSL_CTX_new(TLS_method()), SSL_CTX_free);
    const std::unique_ptr<SSL, void (*)(SSL*)> ssl(SSL_new(plain.get()), SSL_free);
    SSL_set_fd(ssl.get(), b.get());
    const auto role = keyless_client ? TlsStream::Role::kServer : TlsStream::Role::kClient;
    FrameStream ours(TlsStream::create(context('a'), std::move(a), role, "peer").value());
    for (int i = 0; i < 20 && ours.state() == FrameStream::State::kConnecting; ++i) {
      ours.pump(to_server, kPlenty);
      keyless_client ? SSL_connect(ssl.get()) : SSL_accept(ssl.get());
    }
    EXPECT_EQ(ours.state(), FrameStream::State::kFailed);
  }
}

TEST_F(FrameStreams, EndOnRandomBytes) {
  Prng random(7);
  for (int i = 0; i < 200; ++i) {
    auto [a, b] = sockets();
    FrameStream ours(TlsStream::create(context('a'), std::move(a), TlsStream::Role::kServer, "peer").value());
    std::vector<unsigned char> noise(1 + random.next() % 2000);
    for (unsigned char& byte : noise) byte = static_cast<unsigned char>(random.next());
    ASSERT_GT(::send(b.get(), noise.data(), noise.size(), 0), 0);
    ::shutdown(b.get(), SHUT_WR);
    for (int j = 0; j < 20 && ours.state() == FrameStream::State::kConnecting; ++j) ours.pump(to_server, kPlenty);
    EXPECT_EQ(ours.state(), FrameStream::State::kFailed);
  }
}

TEST_F(FrameStreams, RefuseTooLargeAndUnwantedFrames) {
  connect();
  to_server.refuse = true;
  ASSERT_TRUE(client->send(1, 1, {}));
  step();
  step();
  EXPECT_EQ(server->state(), FrameStream::State::kFailed);
  EXPECT_NE(server->why().find("not wanted"), std::string::npos);

  connect();
  to_server.refuse = false;
  // A head is a body's bytes to the sender, so one that lies can be sent as two halves of a frame's.
  auto [a, b] = sockets();
  server.emplace(TlsStream::create(context('a'), std::move(a), TlsStream::Role::kServer, "peer").value());
  auto raw = TlsStream::create(context('a'), std::move(b), TlsStream::Role::kClient, "peer").value();
  while (server->state() == FrameStream::State::kConnecting) {
    (void)raw.handshake();
    server->pump(to_server, kPlenty);
  }
  (void)raw.handshake();
  const FrameHead lie{kFrameBytesMax + 1, 0, 0};
  ASSERT_EQ(raw.write(std::as_bytes(std::span(&lie, 1))).step, TlsStream::Step::kDone);
  server->pump(to_server, kPlenty);
  EXPECT_EQ(server->state(), FrameStream::State::kFailed);
  EXPECT_NE(server->why().find("more than the protocol has"), std::string::npos) << server->why();
}

TEST_F(FrameStreams, SayWhoCannotBeReached) {
  std::string address;
  {
    const Fd listener = listen_tcp("127.0.0.1:0").value();
    address = local_address(listener).value();
  }
  auto socket = connect_tcp(address);
  if (!socket.ok()) GTEST_SKIP() << "refused at once: " << socket.error().message;
  FrameStream ours(
      TlsStream::create(context('a'), std::move(socket.value()), TlsStream::Role::kClient, address).value());
  while (ours.pump(to_client, kPlenty) == FrameStream::State::kConnecting) {
    pollfd waiting{ours.fd(), POLLOUT, 0};
    ASSERT_EQ(::poll(&waiting, 1, 60'000), 1);
  }
  EXPECT_EQ(ours.state(), FrameStream::State::kFailed);
  EXPECT_NE(ours.why().find(address), std::string::npos) << ours.why();
  EXPECT_NE(ours.why().find("refused"), std::string::npos) << ours.why();
}

TEST_F(FrameStreams, TellAGoodEndFromABadOne) {
  connect();
  client->close();
  client.reset();
  step();
  EXPECT_EQ(server->state(), FrameStream::State::kClosed);

  connect();
  client.reset();
  step();
  EXPECT_EQ(server->state(), FrameStream::State::kFailed);
}

}  // namespace
}  // namespace flexkv::net
