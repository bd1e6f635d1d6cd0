// Both sides of a connection in one thread, in random steps and with faults.
#include <gtest/gtest.h>

#include <csignal>
#include <map>
#include <optional>

#include "flexkv/peer/reading.h"
#include "flexkv/peer/serving.h"
#include "flexkv/peer/test_exchange.h"
#include "flexkv/peer/test_source.h"

namespace flexkv::peer {
namespace {

using testing::bytes_of;
using testing::context;
using testing::Sink;
using testing::sockets;
using testing::TestSource;

constexpr std::size_t kPlenty = 64U << 20;

class Exchange : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kHas = 50;  // blocks that the owner has

  void SetUp() override {
    ::signal(SIGPIPE, SIG_IGN);
    auto [a, b] = sockets();
    using Role = net::TlsStream::Role;
    reader_stream.emplace(net::TlsStream::create(context(), std::move(a), Role::kClient, "owner").value());
    owner_stream.emplace(net::TlsStream::create(context(), std::move(b), Role::kServer, "reader").value());
    reading.emplace(*reader_stream, sink, "r", "o");
    serving.emplace(*owner_stream, source, "o", pinned_bytes_max, [this](auto command) { posted.push_back(command); });
  }
  void step(std::size_t budget = kPlenty) {
    for (auto& command : std::exchange(posted, {})) command();
    reading->on_time(now);
    reader_stream->pump(*reading, budget);
    reading->fill(now);
    if (!serving) return;
    serving->on_time(now);
    owner_stream->pump(*serving, budget);
    serving->fill(now);
  }
  void run() {
    for (int i = 0; i < 50; ++i) step();
  }
  RequestId read(std::vector<std::uint64_t> blocks, std::uint64_t slot_bytes, Nanos timeout = 10 * kSecond,
                 std::uint32_t first = 0) {
    ReadRequest request;
    request.id = ++last;
    request.slot_bytes = slot_bytes;
    Sink::Read& read = sink.reads[request.id];
    for (const std::uint64_t block : blocks) request.keys.push_back({9, block});
    request.first = first;
    read.keys.assign(request.keys.begin() + first, request.keys.end());
    read.slot_bytes = slot_bytes;
    read.buffers.assign(blocks.size() - first, std::vector<std::byte>(slot_bytes));
    for (auto& buffer : read.buffers) request.buffers.emplace_back(buffer);
    request.deadline = now + timeout;
    reading->start(std::move(request));
    return last;
  }
  std::optional<Outcome> outcome(RequestId id) const { return sink.reads.at(id).outcome; }
  std::uint32_t got(RequestId id) const { return sink.reads.at(id).blocks; }

  std::uint64_t pinned_bytes_max = 8U << 20;
  Nanos now = 1000 * kSecond;
  TestSource source{kHas};
  Sink sink;
  std::vector<std::function<void()>> posted;
  std::optional<net::FrameStream> reader_stream;
  std::optional<net::FrameStream> owner_stream;
  std::optional<Reading> reading;
  std::optional<Serving> serving;
  RequestId last = 0;
};

TEST_F(Exchange, BringsBlocksAndSaysWhereTheyEnd) {
  const auto all = read({1, 2, 3}, 1'000'003);
  const auto some = read({4, kHas, 5}, 100);
  const auto none = read({kHas}, 100);
  run();
  EXPECT_EQ(outcome(all), Outcome::kDone);
  EXPECT_EQ(outcome(some), Outcome::kMissing);
  EXPECT_EQ(got(some), 1U);
  EXPECT_EQ(outcome(none), Outcome::kMissing);
  EXPECT_EQ(source.pins(), 0U);
}

TEST_F(Exchange, LongChainsTakeSoMuchMemoryAndNoMore) {
  constexpr std::size_t kAtOnce = kKeyBytesMax / sizeof(key::BlockKey) / kKeysMax;
  const auto ask = [&] { return read(std::vector<std::uint64_t>(kKeysMax, 1), 100, 10 * kSecond, kKeysMax - 1); };
  source.set_late(true);
  std::vector<RequestId> asked;
  for (std::size_t i = 0; i <= kAtOnce; ++i) asked.push_back(ask());
  run();
  EXPECT_EQ(source.waiting(), kAtOnce);
  EXPECT_EQ(outcome(asked.back()), Outcome::kBusy);
  source.answer_all();
  run();
  EXPECT_EQ(outcome(asked.front()), Outcome::kDone);
  source.set_late(false);
  const auto later = ask();
  run();
  EXPECT_EQ(outcome(later), Outcome::kDone);
}

TEST_F(Exchange, BringsWhatComesBeforeADamagedBlockAndSaysWhichThatIs) {
  source.damage(3);
  const auto all = read({1, 2, 3, 4}, 100'000);
  run();
  EXPECT_EQ(outcome(all), Outcome::kChecksum);
  EXPECT_EQ(got(all), 2U);
  EXPECT_EQ(source.found_damaged(), std::vector<std::uint32_t>{2});
  EXPECT_EQ(source.pins(), 0U);
}

// Of what was sent before, nothing is wrong.
TEST_F(Exchange, BringsNoBlockThatChangesWhileItIsSent) {
  constexpr std::size_t kBlockBytes = 4U << 20;
  for (const std::size_t at : {std::size_t{1000}, kBlockBytes - 2}) {
    Exchange::SetUp();
    run();
    const auto id = read({1}, kBlockBytes);
    reading->fill(now);
    reader_stream->flush();
    owner_stream->pump(*serving, kPlenty);
    for (auto& command : std::exchange(posted, {})) command();
    serving->fill(now);
    ASSERT_GT(serving->stats().bytes, 1000U);
    ASSERT_LT(serving->stats().bytes, kBlockBytes);  // what the socket takes
    source.overwrite_pinned(at);
    run();
    EXPECT_EQ(outcome(id), at == 1000 ? Outcome::kDone : Outcome::kChecksum);
    EXPECT_EQ(source.pins(), 0U);
  }
}

TEST_F(Exchange, LendsABlockUntilTheReaderHasIt) {
  const auto id = read({1}, 100);
  run();
  ASSERT_EQ(outcome(id), Outcome::kDone);
  const auto next = read({2}, 100);
  reading->fill(now);
  reader_stream->flush();
  for (int i = 0; i < 5; ++i) {
    owner_stream->pump(*serving, kPlenty);
    for (auto& command : std::exchange(posted, {})) command();
    serving->fill(now);
    owner_stream->flush();
  }
  EXPECT_EQ(serving->stats().blocks, 2U);
  EXPECT_EQ(source.pins(), 1U) << "the reader may find it to be damaged";
  run();
  EXPECT_EQ(outcome(next), Outcome::kDone);
  EXPECT_EQ(source.pins(), 0U);
}

TEST_F(Exchange, AnOwnerLooksForItselfWhetherABlockIsDamaged) {
  run();
  const auto doubt = [&](RequestId id, std::uint32_t block) {
    Read message;
    message.slot_bytes = 100;
    message.milliseconds = 1000;
    message.keys = {{9, 1}, {9, 2}};
    ASSERT_TRUE(reader_stream->send(static_cast<std::uint32_t>(Kind::kRead), id, {encode(message)}));
    reader_stream->flush();
    owner_stream->pump(*serving, kPlenty);
    for (auto& command : std::exchange(posted, {})) command();
    ASSERT_EQ(source.pins(), 1U);
    ASSERT_TRUE(reader_stream->send(static_cast<std::uint32_t>(Kind::kDamaged), id, {encode(Damaged{block})}));
    reader_stream->flush();
    owner_stream->pump(*serving, kPlenty);
  };
  doubt(1, 1);
  EXPECT_EQ(source.pins(), 0U);
  EXPECT_TRUE(source.found_damaged().empty());
  source.damage(2);
  doubt(2, 1);
  EXPECT_EQ(source.pins(), 0U);
  EXPECT_EQ(source.found_damaged(), std::vector<std::uint32_t>{1});
  doubt(3, 2);
  EXPECT_EQ(owner_stream->state(), net::FrameStream::State::kFailed);
}

TEST_F(Exchange, BringsTheEndOfAChain) {
  const auto end = read({1, 2, 3, 4, 5}, 1000, 10 * kSecond, 3);
  const auto some = read({1, 2, 3, kHas}, 1000, 10 * kSecond, 2);
  const auto lost = read({1, kHas, 3, 4}, 1000, 10 * kSecond, 2);  // what they follow is not there
  run();
  const auto large = read({1, 2, 3, 4, 5}, pinned_bytes_max / 2, 10 * kSecond, 2);
  run();
  EXPECT_EQ(outcome(end), Outcome::kDone);
  EXPECT_EQ(got(end), 2U);
  EXPECT_EQ(outcome(some), Outcome::kMissing);
  EXPECT_EQ(got(some), 1U);
  EXPECT_EQ(outcome(lost), Outcome::kMissing);
  EXPECT_EQ(got(lost), 0U);
  EXPECT_EQ(outcome(large), Outcome::kBusy);
  EXPECT_EQ(got(large), 2U);
  EXPECT_EQ(source.pins(), 0U);
}

TEST_F(Exchange, LendsNoMoreThanItMay) {
  source.set_late(true);
  const auto large = read({1, 2, 3}, pinned_bytes_max / 2);  // two fit
  const auto refused = read({1}, 100);
  run();
  EXPECT_EQ(outcome(refused), Outcome::kBusy);
  source.answer_all();
  run();
  EXPECT_EQ(outcome(large), Outcome::kBusy);
  EXPECT_EQ(got(large), 2U);
  source.set_late(false);
  const auto again = read({1}, 100);
  run();
  EXPECT_EQ(outcome(again), Outcome::kDone);
}

TEST_F(Exchange, EndsLeasesWithoutTheReader) {
  read({1, 2}, 1U << 20, 5 * kSecond);
  run();
  // The reader asks and is then never heard of again.
  read({3, 4, 5, 6}, 2U << 20, 5 * kSecond);
  step();
  step();
  for (auto& command : std::exchange(posted, {})) command();
  ASSERT_EQ(source.pins(), 1U);
  ASSERT_EQ(serving->next_deadline(), now + 5 * kSecond);
  serving->on_time(now + 5 * kSecond);
  EXPECT_EQ(source.pins(), 0U);
  EXPECT_FALSE(serving->next_deadline());
}

TEST_F(Exchange, EndsReadsWithoutTheOwner) {
  source.set_late(true);
  const auto late = read({1}, 100, kSecond);
  run();
  EXPECT_FALSE(outcome(late));
  EXPECT_EQ(reading->next_deadline(), now + kSecond);
  now += kSecond;
  run();
  EXPECT_EQ(outcome(late), Outcome::kDeadline);
  source.answer_all();
  run();
  EXPECT_EQ(source.pins(), 0U);
  sink.check_untouched();
}

TEST_F(Exchange, GivesPinsBackWhenTheConnectionEnds) {
  source.set_late(true);
  read({1}, 100);
  run();
  source.set_late(false);
  read({1, 2, 3, 4, 5, 6, 7}, 1U << 20);
  step(100'000);
  step(100'000);
  EXPECT_GT(source.pins() + source.waiting(), 0U);
  serving.reset();
  source.answer_all();
  for (auto& command : std::exchange(posted, {})) command();
  EXPECT_EQ(source.pins(), 0U);
  reading->end_all(Outcome::kUnreachable);
  EXPECT_EQ(outcome(1), Outcome::kUnreachable);
  EXPECT_EQ(outcome(2), Outcome::kUnreachable);
}

TEST_F(Exchange, EndsTheConnectionOfWhoProbesAndTakesNoAnswers) {
  run();
  const auto body = encode(Probe{kDataBytesMax});
  for (std::size_t i = 0; i < 2 * net::kQueuedBytesMax / kDataBytesMax; ++i) {
    ASSERT_TRUE(reader_stream->send(static_cast<std::uint32_t>(Kind::kProbe), i, {body}));
  }
  reader_stream->flush();
  owner_stream->pump(*serving, kPlenty);
  ASSERT_EQ(owner_stream->state(), net::FrameStream::State::kFailed);
  EXPECT_NE(owner_stream->why().find("does not take the answers"), std::string::npos) << owner_stream->why();
}

TEST_F(Exchange, SurvivesRandomCancelsAndExpiries) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    Prng random(seed);
    for (int i = 0; i < 60; ++i) {
      std::vector<std::uint64_t> blocks(1 + random.below(6));
      for (auto& block : blocks) block = random.below(kHas + 5);
      const std::uint64_t slot_bytes = random.chance(30) ? 1 + random.below(1'000'000) : 1 + random.below(3000);
      const auto first = static_cast<std::uint32_t>(random.below(blocks.size()));
      const RequestId id = read(blocks, slot_bytes, Nanos(random.below(40)) * kMillisecond, first);
      source.set_late(random.chance(20));
      const auto steps = random.below(5);
      for (std::uint64_t j = 0; j < steps; ++j) step(1 + random.below(300'000));
      if (random.chance(30)) reading->end(1 + random.below(id), Outcome::kCanceled);
      if (random.chance(30)) source.answer_all();
      now += Nanos(random.below(10)) * kMillisecond;
      sink.check_untouched();
      if (HasFatalFailure()) FAIL() << "seed " << seed;
      std::erase_if(sink.reads, [](const auto& one) { return one.second.outcome.has_value(); });
    }
    source.set_late(false);
    source.answer_all();
    run();
    now += 60 * kMillisecond;
    run();
    ASSERT_EQ(reader_stream->state(), net::FrameStream::State::kOpen) << reader_stream->why() << " seed " << seed;
    ASSERT_EQ(owner_stream->state(), net::FrameStream::State::kOpen) << owner_stream->why() << " seed " << seed;
    ASSERT_EQ(source.pins(), 0U) << "seed " << seed;
    for (const auto& [id, one] : sink.reads) ASSERT_TRUE(one.outcome) << "seed " << seed;
    sink.reads.clear();
  }
}

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
      [&](RequestId id) { say(Kind::kSums, id, encode(Sums{{{50, 51, 1}}})); },
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
