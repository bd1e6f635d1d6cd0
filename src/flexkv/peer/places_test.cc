// Blocks that the reader fetches by itself, over a simulated transport, whose every step the tests choose.
#include <gtest/gtest.h>

#include <csignal>

#include "flexkv/peer/reading.h"
#include "flexkv/peer/serving.h"
#include "flexkv/peer/test_exchange.h"
#include "flexkv/peer/test_sim_reads.h"

namespace flexkv::peer {
namespace {

using testing::bytes_of;
using testing::SimReads;
using testing::Sink;

constexpr std::uint64_t kSlotBytes = 3 * kPieceBytesMax / 2;  // two pieces
constexpr std::uint64_t kSlots = 6;

// Slots of a pool, each with a block until it is recycled, which happens at the worst moment: as soon as it is
// unpinned.
class PoolSource final : public BlockSource {
 public:
  PoolSource() : pool(kSlots * kSlotBytes) { use(kSlotBytes); }
  void use(std::uint64_t bytes) {
    slot_bytes = bytes;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) fill(slot, slot);
  }
  void pin(const SpaceName&, std::uint64_t, std::span<const key::BlockKey> keys, std::uint32_t first, Nanos,
           std::function<void(Pinned)> done) override {
    Pinned pinned;
    std::vector<std::uint64_t> slots;
    for (const auto& key : keys.subspan(first)) {
      const auto slot = std::ranges::find(holds, key.low);
      if (slot == holds.end()) break;
      slots.push_back(static_cast<std::uint64_t>(slot - holds.begin()));
      pinned.blocks.emplace_back(bytes_at(slots.back()));
      if (summed) pinned.sums.push_back({{0, slot_bytes, sums_.at(slots.back())}});
    }
    if (slots.size() < keys.size() - first) pinned.outcome = Outcome::kMissing;
    if (!slots.empty()) pins[pinned.pin = ++last_] = slots;
    done(std::move(pinned));
  }
  void unpin(std::uint64_t pin) override {
    const auto node = pins.extract(pin);
    ASSERT_FALSE(node.empty());
    if (!recycles) return;
    for (const std::uint64_t slot : node.mapped()) {
      const bool shared = std::ranges::any_of(
          pins, [&](const auto& other) { return std::ranges::find(other.second, slot) != other.second.end(); });
      if (!shared) fill(slot, ++fresh_);
    }
    on_recycled();
  }
  void on_damaged(std::uint64_t pin, std::uint32_t block) override {
    ASSERT_TRUE(pins.contains(pin));
    found_damaged.push_back(block);
  }

  std::span<std::byte> bytes_at(std::uint64_t slot) { return std::span(pool).subspan(slot * slot_bytes, slot_bytes); }

  std::vector<std::byte> pool;
  std::uint64_t slot_bytes = 0;
  std::vector<std::uint64_t> holds = std::vector<std::uint64_t>(kSlots);
  std::map<std::uint64_t, std::vector<std::uint64_t>> pins;
  bool recycles = false;
  bool summed = true;  // the device has
  std::vector<std::uint32_t> found_damaged;
  std::function<void()> on_recycled = [] {};

 private:
  void fill(std::uint64_t slot, std::uint64_t block) {
    holds[slot] = block;
    std::ranges::copy(bytes_of({9, block}, slot_bytes), bytes_at(slot).begin());
    sums_[slot] = block_sum(bytes_at(slot));
  }
  std::array<std::uint64_t, kSlots> sums_{};
  std::uint64_t last_ = 0;
  std::uint64_t fresh_ = 1000;
};

class Places : public ::testing::Test {
 protected:
  void SetUp() override {
    ::signal(SIGPIPE, SIG_IGN);
    connect();
  }
  void connect() {
    serving.reset();
    reading.reset();
    reads.under_way.clear();
    posted.clear();
    sink.reads.clear();
    auto [a, b] = testing::sockets();
    using Role = net::TlsStream::Role;
    reader_stream.emplace(net::TlsStream::create(testing::context(), std::move(a), Role::kClient, "owner").value());
    owner_stream.emplace(net::TlsStream::create(testing::context(), std::move(b), Role::kServer, "reader").value());
    const auto post = [this](auto command) { posted.push_back(std::move(command)); };
    reading.emplace(*reader_stream, sink, "r", "o", &reads, post);
    serving.emplace(*owner_stream, source, "o", 1U << 30, post, &reads);
  }
  void step() {
    for (auto& command : std::exchange(posted, {})) command();
    reading->on_time(now);
    reader_stream->pump(*reading, 64U << 20);
    reading->fill(now);
    serving->on_time(now);
    owner_stream->pump(*serving, 64U << 20);
    serving->fill(now);
    ASSERT_NE(reader_stream->state(), net::FrameStream::State::kFailed) << reader_stream->why();
    ASSERT_NE(owner_stream->state(), net::FrameStream::State::kFailed) << owner_stream->why();
  }
  void run(bool carry_out = true) {
    for (int i = 0; i < 100; ++i) {
      step();
      if (carry_out) reads.carry_out_all();
    }
  }
  RequestId read(std::vector<std::uint64_t> blocks, Nanos timeout = 10 * kSecond) {
    ReadRequest request;
    request.id = ++last;
    request.slot_bytes = source.slot_bytes;
    Sink::Read& read = sink.reads[request.id];
    for (const std::uint64_t block : blocks) request.keys.push_back({9, block});
    read.keys = request.keys;
    read.slot_bytes = source.slot_bytes;
    read.buffers.assign(blocks.size(), std::vector<std::byte>(source.slot_bytes));
    for (auto& buffer : read.buffers) request.buffers.emplace_back(buffer);
    request.deadline = now + timeout;
    reading->start(std::move(request));
    return last;
  }
  std::optional<Outcome> outcome(RequestId id) const { return sink.reads.at(id).outcome; }
  std::uint32_t got(RequestId id) const { return sink.reads.at(id).blocks; }

  Nanos now = 1000 * kSecond;
  PoolSource source;
  SimReads reads{source.pool};
  Sink sink;
  std::vector<std::function<void()>> posted;
  std::optional<net::FrameStream> reader_stream;
  std::optional<net::FrameStream> owner_stream;
  std::optional<Reading> reading;
  std::optional<Serving> serving;
  RequestId last = 0;
};

TEST_F(Places, AreReadAndTheLeaseEnds) {
  const auto all = read({0, 1, 2, 3, 4});
  run();
  EXPECT_EQ(outcome(all), Outcome::kDone);
  const auto some = read({3, 77});
  const auto none = read({77});
  run();
  EXPECT_EQ(outcome(some), Outcome::kMissing);
  EXPECT_EQ(got(some), 1U);
  EXPECT_EQ(outcome(none), Outcome::kMissing);
  EXPECT_TRUE(source.pins.empty());
  EXPECT_EQ(reading->stats().one_sided_blocks, 6U);
  EXPECT_EQ(serving->stats().placed_blocks, 6U);
  EXPECT_EQ(serving->stats().bytes, 0U);
}

TEST_F(Places, OfABlockThatIsNotWhatItsDeviceSaidAreNotBelieved) {
  source.bytes_at(1)[kPieceBytesMax + 77] ^= std::byte{1};
  const auto id = read({0, 1, 2});
  run();
  EXPECT_EQ(outcome(id), Outcome::kChecksum);
  EXPECT_EQ(got(id), 1U);
  EXPECT_EQ(source.found_damaged, std::vector<std::uint32_t>{1});
  EXPECT_TRUE(source.pins.empty());
  sink.check_untouched();
}

TEST_F(Places, AreNotBelievedWhenTheTransportBringsSomethingElse) {
  for (const bool summed : {false, true}) {
    source.summed = summed;
    const auto id = read({0});
    run(false);
    reads.step(reads.under_way.begin());
    reads.under_way.front().bytes->at(5) ^= std::byte{1};
    run();
    EXPECT_EQ(outcome(id), Outcome::kChecksum);
  }
  EXPECT_TRUE(source.found_damaged.empty()) << "the owner's blocks are what they were";
  EXPECT_TRUE(source.pins.empty());
}

TEST_F(Places, OfALeaseThatEndedAreNotBelieved) {
  source.recycles = true;
  const auto late = read({0, 1});
  run(false);
  ASSERT_EQ(reads.under_way.size(), 4U);
  for (int i = 0; i < 3; ++i) reads.step(reads.under_way.begin());  // one piece and its word; of the next the bytes
  serving->on_time(now + kLeaseTimeMax);
  run();
  EXPECT_EQ(outcome(late), Outcome::kExpired);
  EXPECT_EQ(got(late), 0U);
  EXPECT_TRUE(source.pins.empty());
}

TEST_F(Places, AreDoneWithoutWhereAReadFails) {
  const auto first = read({0, 1, 2});
  const auto second = read({3, 4});
  run(false);
  reads.step(reads.under_way.begin());
  reads.step(reads.under_way.begin());
  reads.step(reads.under_way.begin());
  reads.step(reads.under_way.begin());  // a block is there
  reads.end(reads.under_way.begin(), false);
  run(false);  // what else is under way does not come
  EXPECT_EQ(outcome(first), Outcome::kDone);
  EXPECT_EQ(outcome(second), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 1U);
  EXPECT_EQ(reading->stats().one_sided_failures, 1U);
  EXPECT_EQ(serving->stats().blocks, 4U);
  reads.carry_out_all();
  run();
  const auto later = read({5});
  run(false);
  EXPECT_EQ(outcome(later), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 1U);
  now += kOneSidedRest;
  const auto again = read({5});
  run();
  EXPECT_EQ(outcome(again), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 2U);
  EXPECT_TRUE(source.pins.empty());
  sink.check_untouched();
}

TEST_F(Places, ThatCannotBeReadInTimeEndTheReadAndWriteNothingAfterwards) {
  const auto hangs = read({0, 1}, kSecond);
  const auto other = read({2}, 10 * kSecond);
  run(false);
  now += 2 * kSecond;
  run(false);
  EXPECT_EQ(outcome(hangs), Outcome::kDeadline);
  EXPECT_EQ(outcome(other), Outcome::kDone);
  EXPECT_TRUE(source.pins.empty());
  reads.carry_out_all();
  run();
  sink.check_untouched();
}

TEST_F(Places, GoOnAsBytesWhenTheReadIsGivenUpAndEndWhereItsOwnerIsSilent) {
  const auto hangs = read({0, 1});
  run(false);
  now += kMoving;
  reading->give_up(hangs);
  run(false);
  EXPECT_EQ(outcome(hangs), Outcome::kDone);
  const auto silent = read({0, 1});
  reading->fill(now);
  now += kMoving;
  reading->give_up(silent);
  reading->fill(now);
  EXPECT_EQ(outcome(silent), Outcome::kDeadline);
  run();  // both answer after all
  sink.check_untouched();
}

TEST_F(Places, AreReadAgainAlthoughOneNeverEnds) {
  const auto hangs = read({0}, kSecond);
  run(false);
  now += kSecond;
  run(false);
  EXPECT_EQ(outcome(hangs), Outcome::kDeadline);
  now += kOneSidedRest;
  const auto never = std::exchange(reads.under_way, {});
  const auto again = read({1, 2});
  run();
  EXPECT_EQ(outcome(again), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 2U);
}

TEST_F(Places, OfAnOwnerThatFailsAgainAreLeftAloneForLonger) {
  // Whether the next read is tried this way.
  const auto tried = [&](bool comes) {
    const auto before = reading->stats();
    const auto id = read({0}, kSecond);
    run(comes);
    if (!comes) {
      now += kSecond;
      run(false);
    }
    EXPECT_TRUE(outcome(id));
    const auto after = reading->stats();
    return after.one_sided_failures > before.one_sided_failures || after.one_sided_blocks > before.one_sided_blocks;
  };
  for (Nanos rest = kOneSidedRest; rest <= 2 * kOneSidedRestMax; rest *= 2) {
    EXPECT_TRUE(tried(false)) << "it hangs";
    now += std::min(rest, kOneSidedRestMax) - 2 * kSecond;
    EXPECT_FALSE(tried(true)) << rest / kSecond << " s are not over";
    now += 2 * kSecond;
  }
  EXPECT_TRUE(tried(true)) << "it is back";
  EXPECT_TRUE(tried(false));
  now += kOneSidedRest;
  EXPECT_TRUE(tried(true)) << "what was before counts no more";
}

TEST_F(Places, AreDoneWithoutWhereThereIsNoRoom) {
  reads.room = 0;
  const auto first = read({0, 1});
  run(false);
  EXPECT_EQ(outcome(first), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 0U);
  EXPECT_EQ(reading->stats().one_sided_failures, 0U);
  reads.room = 1;
  const auto second = read({0, 1});
  run();
  EXPECT_EQ(outcome(second), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 2U);
  EXPECT_TRUE(source.pins.empty());
}

TEST_F(Places, AreOfAsManyLeasesAsThereAreWords) {
  std::vector<RequestId> ids;
  for (std::uint64_t i = 0; i < 4; ++i) ids.push_back(read({i}));
  run();
  for (const RequestId id : ids) EXPECT_EQ(outcome(id), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_blocks, 2U);
  EXPECT_EQ(serving->stats().blocks, 2U);
}

TEST_F(Places, AreToldAsLongAsTheOwnerHasAWindow) {
  reads.hide();
  connect();
  EXPECT_EQ((read({0}), run(), serving->stats().placed_blocks), 0U);
  reads.show();
  EXPECT_EQ((read({1}), run(), serving->stats().placed_blocks), 0U) << "it was asked for bytes, and told of the window";
  EXPECT_EQ((read({2}), run(), serving->stats().placed_blocks), 1U);
  reads.show();  // another one
  EXPECT_EQ((read({3}), run(), serving->stats().placed_blocks), 2U);
  reads.hide();
  EXPECT_EQ((read({4}), run(), serving->stats().placed_blocks), 2U);
  for (RequestId id = 1; id <= last; ++id) EXPECT_EQ(outcome(id), Outcome::kDone);
  EXPECT_EQ(reading->stats().one_sided_failures, 0U);
}

// Slots are recycled as soon as they may be, leases end early, windows come and go, reads fail, hang and come in any
// order.
TEST_F(Places, NeverBringWhatASlotHeldLater) {
  source.recycles = true;
  source.use(4096);
  std::uint64_t brought = 0;
  std::uint64_t expired = 0;
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    Prng random(seed);
    source.on_recycled = [] {};
    reads.show();
    source.summed = seed % 2 == 0;
    connect();
    source.on_recycled = [&] {  // the moment at which a late change of the word would show
      while (!reads.under_way.empty() && random.next() % 2 == 0) reads.step(reads.under_way.begin());
    };
    for (int i = 0; i < 120; ++i) {
      if (random.next() % 6 == 0) {
        std::vector<std::uint64_t> blocks;
        for (std::uint64_t count = 1 + random.next() % 3; count > 0; --count) {
          blocks.push_back(source.holds[random.next() % kSlots]);
        }
        read(std::move(blocks), static_cast<Nanos>(1 + random.next() % 40) * kMillisecond);
      }
      step();
      for (std::uint64_t steps = random.next() % 5; steps > 0 && !reads.under_way.empty(); --steps) {
        reads.step(
            std::next(reads.under_way.begin(), static_cast<std::ptrdiff_t>(random.next() % reads.under_way.size())));
      }
      if (random.next() % 40 == 0) reads.hide();
      if (random.next() % 20 == 0) reads.show();
      if (random.next() % 8 == 0) serving->on_time(now + kLeaseTimeMax);
      if (random.next() % 60 == 0 && last > 0) reading->give_up(last - random.next() % std::min<RequestId>(last, 4));
      if (random.next() % 200 == 0 && !reads.under_way.empty()) reads.end(reads.under_way.begin(), false);
      now += static_cast<Nanos>(random.next() % 3) * kMillisecond;
    }
    run();
    now += kSecond;
    run();
    for (const auto& [id, one] : sink.reads) {
      ASSERT_TRUE(one.outcome) << "seed " << seed << ", request " << id;
      ASSERT_NE(*one.outcome, Outcome::kChecksum) << "seed " << seed << ": the word did not tell";
      expired += *one.outcome == Outcome::kExpired;
    }
    sink.check_untouched();
    EXPECT_TRUE(source.pins.empty()) << "seed " << seed;
    EXPECT_TRUE(source.found_damaged.empty()) << "seed " << seed;
    brought += reading->stats().one_sided_blocks;
  }
  EXPECT_GT(brought, 100U);
  EXPECT_GT(expired, 100U);
}

}  // namespace
}  // namespace flexkv::peer
