// Both sides of a connection in one thread, in random steps and with faults.
#include "flexkv/peer/test_connection.h"

namespace flexkv::peer {
namespace {

using testing::Exchange;
using testing::kPlenty;

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
    serving->fill(now);
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

TEST_F(Exchange, AReadIsGivenUpOnlyIfNoBytesCome) {
  constexpr std::size_t kBlockBytes = 4U << 20;
  run();
  const auto id = read({1}, kBlockBytes, 60 * kSecond);
  reading->fill(now);
  reader_stream->flush();
  owner_stream->pump(*serving, kPlenty);
  for (auto& command : std::exchange(posted, {})) command();
  serving->fill(now);
  now += 2 * kMoving;
  const auto doubt = [&] {
    reading->give_up(id);
    reading->on_time(now);
    while (reader_stream->pump(*reading, kPlenty), reader_stream->more()) {
    }
    reading->fill(now);
  };
  doubt();
  EXPECT_FALSE(outcome(id)) << "some were there all the time";
  now += kMoving;
  doubt();
  EXPECT_EQ(outcome(id), Outcome::kDeadline);
  run();  // the rest comes all the same
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

}  // namespace
}  // namespace flexkv::peer
