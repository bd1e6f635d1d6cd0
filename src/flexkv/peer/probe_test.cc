// Probes of real lanes over loopback, and of what is no node.
#include "flexkv/peer/probe.h"

#include <gtest/gtest.h>

#include "flexkv/net/tcp.h"
#include "flexkv/peer/peer_lane.h"
#include "flexkv/peer/test_source.h"

namespace flexkv::peer {
namespace {

constexpr Nanos kPatience = 60 * kSecond;

net::TlsContext context(char letter, const std::string& cluster = "test") {
  return net::TlsContext::create(net::Secret::from_text(std::string(net::Secret::kMinBytes, letter)).value(), cluster)
      .value();
}

class NoReads final : public ReadSink {
 public:
  void on_block(RequestId, std::uint32_t) override { FAIL(); }
  void on_end(RequestId, Outcome) override { FAIL(); }
};

struct Node {
  Node() { lane = PeerLane::start({"owner", "127.0.0.1:0", 1U << 20, 16}, context('s'), source, sink).value(); }
  testing::TestSource source{0};
  NoReads sink;
  std::unique_ptr<PeerLane> lane;
};

ProbeOptions at(const std::string& address, Nanos within = kPatience, Nanos receive_for = 0) {
  return {"doctor", address, within, receive_for};
}

TEST(Probe, FindsANodeAndItsDistance) {
  const Node node;
  const auto near = probe(context('s'), at(node.lane->address()));
  ASSERT_TRUE(near.ok()) << near.error().message;
  EXPECT_EQ(near.value().node, "owner");
  EXPECT_GT(near.value().round_trip, 0);
  EXPECT_GE(near.value().greeting, near.value().round_trip);
  EXPECT_EQ(near.value().bytes_per_second, 0);
  EXPECT_EQ(node.source.pins(), 0U);
  EXPECT_EQ(node.lane->stats().served.requests, 0U);
}

TEST(Probe, ReceivesBytes) {
  const Node node;
  const auto probed = probe(context('s'), at(node.lane->address(), kPatience, 300 * kMillisecond));
  ASSERT_TRUE(probed.ok()) << probed.error().message;
  EXPECT_GT(probed.value().bytes_per_second, 0);
}

TEST(Probe, SaysWhatIsWrong) {
  const Node node;
  for (const auto& stranger : {context('x'), context('s', "other")}) {
    const auto refused = probe(stranger, at(node.lane->address()));
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.error().message.find("secret or cluster name"), std::string::npos) << refused.error().message;
    EXPECT_NE(refused.error().message.find(node.lane->address()), std::string::npos) << refused.error().message;
  }
  std::string nobody;
  {
    const auto listener = net::listen_tcp("127.0.0.1:0").value();
    nobody = net::local_address(listener).value();
    const auto silent = probe(context('s'), at(nobody, 50 * kMillisecond));  // nobody accepts
    ASSERT_FALSE(silent.ok());
    EXPECT_EQ(silent.error().code, ErrorCode::kTimeout);
  }
  const auto refused = probe(context('s'), at(nobody));
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.error().message.find("refused"), std::string::npos) << refused.error().message;
  EXPECT_FALSE(probe(context('s'), at("a name:1")).ok());
}

}  // namespace
}  // namespace flexkv::peer
