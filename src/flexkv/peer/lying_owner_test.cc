// A reader whose owner sends what no owner should.
#include "flexkv/peer/test_connection.h"

namespace flexkv::peer {
namespace {

using testing::bytes_of;
using testing::Exchange;
using testing::kPlenty;

// An owner of a test's own: frames as it likes.
class LyingOwner : public Exchange {
 protected:
  struct Ignore : net::FrameSink {
    Result<std::span<std::byte>> on_head(const net::FrameHead& head) override {
      body.resize(head.bytes);
      return std::span(body);
    }
    Status on_frame(const net::FrameHead& head) override {
      kinds.push_back(static_cast<Kind>(head.kind));
      return {};
    }
    std::vector<std::byte> body;
    std::vector<Kind> kinds;
  };
  void SetUp() override {
    Exchange::SetUp();
    serving.reset();
    greet("o");
  }
  void greet(const std::string& name) {
    Hello hello;
    hello.node = name;
    say(Kind::kHello, 0, encode(hello));
    exchange();
  }
  void say(Kind kind, RequestId id, std::span<const std::byte> body) {
    ASSERT_TRUE(owner_stream->send(static_cast<std::uint32_t>(kind), id, {body}));
  }
  void exchange() {
    for (int i = 0; i < 20 && reader_stream->state() < net::FrameStream::State::kClosed; ++i) {
      reader_stream->pump(*reading, kPlenty);
      reading->fill(now);
      owner_stream->pump(ignore, kPlenty);
    }
  }
  bool broken() const { return reader_stream->state() == net::FrameStream::State::kFailed; }
  Ignore ignore;
};

TEST_F(LyingOwner, CannotPassOffAnotherBlock) {
  const auto id = read({1}, 100);
  exchange();
  const auto other = bytes_of({9, 2}, 100);
  BlockChecksum checksum(SpaceName{}, 100, {9, 2}, {}, BlockChecksum::Side::kOwner);
  checksum.add(other);
  say(Kind::kData, id, other);
  say(Kind::kBlock, id, encode(Block{checksum.value()}));
  say(Kind::kEnd, id, encode(End{Outcome::kDone}));
  exchange();
  EXPECT_EQ(outcome(id), Outcome::kChecksum);
  EXPECT_EQ(got(id), 0U);
  EXPECT_FALSE(broken());
}

// The owner's memory went wrong after the block was saved, or the way to the reader's did.
TEST_F(LyingOwner, CannotPassOffBytesThatAreNotWhatTheirSumSays) {
  const auto id = read({1}, 100);
  exchange();
  auto bytes = bytes_of({9, 1}, 100);
  const std::vector<SummedExtent> sums{{0, 100, block_sum(bytes)}};
  BlockChecksum checksum(SpaceName{}, 100, {9, 1}, sums, BlockChecksum::Side::kOwner);
  checksum.add(bytes);
  bytes[50] ^= std::byte{4};
  say(Kind::kSums, id, encode(Sums{sums}));
  say(Kind::kData, id, bytes);
  say(Kind::kBlock, id, encode(Block{checksum.value()}));
  exchange();
  EXPECT_EQ(outcome(id), Outcome::kChecksum);
  EXPECT_EQ(got(id), 0U);
  EXPECT_FALSE(broken());
  EXPECT_EQ(ignore.kinds.back(), Kind::kDamaged);
}

TEST_F(LyingOwner, IsNotBelievedToBeDone) {
  for (const Kind kind : {Kind::kEnd, Kind::kSent}) {
    const auto id = read({1}, 100);
    exchange();
    say(kind, id, encode(End{Outcome::kDone}));
    exchange();
    EXPECT_EQ(outcome(id), Outcome::kMissing);
  }
}

TEST_F(LyingOwner, IsLeftWhenItSendsWhatHasNoPlace) {
  const std::vector<std::byte> bytes(101);
  const std::vector<std::function<void(RequestId)>> lies{
      [&](RequestId id) { say(Kind::kData, id, bytes); },                           // too much
      [&](RequestId id) { say(Kind::kData, id + 1, std::span(bytes).first(10)); },  // for nobody
      [&](RequestId id) { say(Kind::kData, id, {}); },
      [&](RequestId id) { say(Kind::kBlock, id, encode(Block{})); },  // without bytes
      [&](RequestId id) { say(Kind::kBlock, id + 1, encode(Block{})); },
      [&](RequestId id) { say(Kind::kEnd, id + 1, encode(End{})); },
      [&](RequestId id) { say(Kind::kSent, id + 1, encode(Sent{})); },
      [&](RequestId id) {  // within a block
        say(Kind::kData, id, std::span(bytes).first(10));
        say(Kind::kSent, id, encode(Sent{}));
      },
      [&](RequestId id) { say(Kind::kSums, id + 1, encode(Sums{})); },
      [&](RequestId id) {
        say(Kind::kSums, id, encode(Sums{{{50, 51, 1}}}));
      },
      [&](RequestId id) {  // twice
        say(Kind::kSums, id, encode(Sums{{{0, 100, 1}}}));
        say(Kind::kSums, id, encode(Sums{{{0, 100, 1}}}));
      },
      [&](RequestId id) {
        say(Kind::kData, id, std::span(bytes).first(10));
        say(Kind::kSums, id, encode(Sums{{{0, 100, 1}}}));
      },
      [&](RequestId id) { say(Kind::kEnd, id, bytes); },
      [&](RequestId id) { say(Kind::kRead, id, bytes); },
      [&](RequestId id) { say(static_cast<Kind>(99), id, bytes); },
      [&](RequestId) { greet("other"); },
  };
  for (std::size_t i = 0; i < lies.size(); ++i) {
    Exchange::SetUp();
    serving.reset();
    greet("o");
    const auto id = read({1}, 100);
    exchange();
    lies[i](id);
    exchange();
    EXPECT_TRUE(broken()) << "lie " << i;
  }
}

TEST_F(LyingOwner, IsLeftWhenItIsAnotherNode) {
  Exchange::SetUp();
  serving.reset();
  greet("other");
  EXPECT_TRUE(broken());
  EXPECT_NE(reader_stream->why().find("node other is there now, not o"), std::string::npos) << reader_stream->why();
}

}  // namespace
}  // namespace flexkv::peer
