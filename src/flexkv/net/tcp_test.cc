#include "flexkv/net/tcp.h"

#include <gtest/gtest.h>
#include <poll.h>

#include "flexkv/base/time.h"

namespace flexkv::net {
namespace {

void wait_for(const Fd& socket, short events) {
  pollfd waiting{socket.get(), events, 0};
  ASSERT_EQ(::poll(&waiting, 1, 60'000), 1);
}

TEST(TcpTest, LooksUpNames) {
  const auto found = resolve_tcp("localhost:6380");
  ASSERT_TRUE(found.ok()) << found.error().message;
  EXPECT_TRUE(found.value() == "127.0.0.1:6380" || found.value() == "[::1]:6380") << found.value();
  EXPECT_EQ(resolve_tcp("[::1]:1").value(), "[::1]:1");
  EXPECT_FALSE(resolve_tcp("localhost").ok());
}

TEST(Tcp, ConnectsByNumber) {
  for (const std::string host : {"127.0.0.1", "[::1]"}) {
    auto listener = listen_tcp(host + ":0");
    if (!listener.ok() && host == "[::1]") GTEST_SKIP() << listener.error().message;
    ASSERT_TRUE(listener.ok()) << listener.error().message;
    EXPECT_FALSE(accept_tcp(listener.value()).value().valid());
    const std::string address = local_address(listener.value()).value();
    EXPECT_EQ(address.substr(0, host.size() + 1), host + ":");
    const Fd client = connect_tcp(address).value();
    wait_for(client, POLLOUT);
    wait_for(listener.value(), POLLIN);
    const Fd server = accept_tcp(listener.value()).value();
    ASSERT_TRUE(server.valid());
    EXPECT_EQ(peer_address(server), local_address(client).value());
  }
}

TEST(Tcp, RefusesWhatIsNoAddress) {
  for (const char* address : {"", ":", "host", ":80", "host:", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1",
                              "127.0.0.1:123456", "::1:80", "[::1]", "[]:80", "127.0.0.1:1 "}) {
    const auto refused = listen_tcp(address);
    ASSERT_FALSE(refused.ok()) << address;
    EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument) << address;
  }
  EXPECT_FALSE(connect_tcp("localhost:80").ok()) << "a name would be looked up";
}

TEST(Tcp, TellsOfAnAddressInUse) {
  const Fd first = listen_tcp("127.0.0.1:0").value();
  const auto second = listen_tcp(local_address(first).value());
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.error().message.find("in use"), std::string::npos);
}

}  // namespace
}  // namespace flexkv::net
