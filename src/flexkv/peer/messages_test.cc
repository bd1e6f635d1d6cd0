#include "flexkv/peer/messages.h"

#include <gtest/gtest.h>

#include "flexkv/base/prng.h"

namespace flexkv::peer {
namespace {

SpaceName space(std::uint8_t first) {
  SpaceName name{};
  name[0] = first;
  return name;
}

Read read_of(std::size_t keys) {
  Read message{space(7), 4096, 1234, 0, {}};
  for (std::size_t i = 0; i < keys; ++i) message.keys.push_back({i, ~i});
  return message;
}

TEST(Messages, ComeBackAsTheyWere) {
  Hello hello;
  hello.node = "node-1";
  EXPECT_EQ(decode_hello(encode(hello)).value().node, "node-1");
  for (const std::size_t keys : {std::size_t{1}, kKeysMax}) {
    Read message = read_of(keys);
    message.first = static_cast<std::uint32_t>(keys - 1);
    const auto bytes = encode(message);
    EXPECT_LE(bytes.size(), kMessageBytesMax);
    const Read back = decode_read(bytes).value();
    EXPECT_EQ(back.space, message.space);
    EXPECT_EQ(back.slot_bytes, message.slot_bytes);
    EXPECT_EQ(back.milliseconds, message.milliseconds);
    EXPECT_EQ(back.first, message.first);
    EXPECT_EQ(back.keys, message.keys);
  }
  EXPECT_EQ(decode_block(encode(Block{42})).value().checksum, 42U);
  hello.window = {Transport::kMooncake, {std::byte{5}, std::byte{6}}, 1000, 2000, 3000, 4};
  const Window window = decode_hello(encode(hello)).value().window;
  EXPECT_EQ(window.transport, Transport::kMooncake);
  EXPECT_EQ(window.metadata, hello.window.metadata);
  EXPECT_EQ(window.pool, 1000U);
  EXPECT_EQ(window.pool_bytes, 2000U);
  EXPECT_EQ(window.words, 3000U);
  EXPECT_EQ(window.word_count, 4U);
  Read by_itself = read_of(1);
  EXPECT_FALSE(decode_read(encode(by_itself)).value().by_itself);
  by_itself.by_itself = true;
  EXPECT_TRUE(decode_read(encode(by_itself)).value().by_itself);
  const Place place = decode_place(encode(Place{1, 2, 3, 4, {{5, 6, 7}}})).value();
  EXPECT_EQ(place.offset, 1U);
  EXPECT_EQ(place.checksum, 2U);
  EXPECT_EQ(place.generation, 3U);
  EXPECT_EQ(place.word, 4U);
  ASSERT_EQ(place.sums.size(), 1U);
  EXPECT_EQ(place.sums[0].offset, 5U);
  EXPECT_EQ(place.sums[0].bytes, 6U);
  EXPECT_EQ(place.sums[0].sum, 7U);
  EXPECT_EQ(decode_sums(encode(Sums{{{1, 2, 3}, {4, 5, 6}}})).value().extents[1].sum, 6U);
  EXPECT_EQ(decode_sent(encode(Sent{Outcome::kBusy})).value().outcome, Outcome::kBusy);
  EXPECT_EQ(decode_damaged(encode(Damaged{7})).value().block, 7U);
  EXPECT_EQ(decode_placed(encode(Placed{Outcome::kBusy})).value().outcome, Outcome::kBusy);
  EXPECT_EQ(decode_plain(encode(Plain{7})).value().block, 7U);
  EXPECT_EQ(decode_probe(encode(Probe{kDataBytesMax})).value().bytes, kDataBytesMax);
  for (std::uint8_t i = 0; i < kOutcomeCount; ++i) {
    EXPECT_EQ(decode_end(encode(End{static_cast<Outcome>(i)})).value().outcome, static_cast<Outcome>(i));
    EXPECT_STRNE(outcome_name(static_cast<Outcome>(i)), "?");
  }
}

TEST(Messages, AreRefusedWhenTheyCannotBe) {
  EXPECT_FALSE(decode_read(encode(read_of(0))).ok());
  EXPECT_FALSE(decode_read(encode(read_of(kKeysMax + 1))).ok());
  Read nothing = read_of(3);
  nothing.first = 3;
  EXPECT_FALSE(decode_read(encode(nothing)).ok());
  for (const std::uint64_t bytes : {std::uint64_t{0}, kSlotBytesMax + 1}) {
    Read message = read_of(1);
    message.slot_bytes = bytes;
    EXPECT_FALSE(decode_read(encode(message)).ok());
  }
  EXPECT_FALSE(decode_hello(encode(Hello{})).ok());
  EXPECT_FALSE(decode_probe(encode(Probe{kDataBytesMax + 1})).ok());
  Hello hello;
  hello.node = "x";
  hello.window.metadata.resize(kMetadataBytesMax + 1);
  EXPECT_FALSE(decode_hello(encode(hello)).ok());
  hello.window.metadata.clear();
  hello.window.pool = ~0ULL;
  hello.window.pool_bytes = 2;
  EXPECT_FALSE(decode_hello(encode(hello)).ok());
  hello.window = {Transport::kNixl, {}, 0, 0, ~0ULL - 100, 100};
  EXPECT_FALSE(decode_hello(encode(hello)).ok());
  hello.window = {static_cast<Transport>(kTransportCount)};
  EXPECT_FALSE(decode_hello(encode(hello)).ok());
  for (const std::uint32_t version : {kVersion - 1, kVersion + 1}) {
    Hello other;
    other.version = version;
    other.node = "x";
    const auto refused = decode_hello(encode(other));
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  }
  EXPECT_FALSE(decode_sums(encode(Sums{std::vector<SummedExtent>(kSumsMax + 1)})).ok());
  EXPECT_FALSE(decode_end(encode(End{static_cast<Outcome>(kOutcomeCount)})).ok());
}

TEST(Messages, AreNotReadPastTheirEnd) {
  Hello hello;
  hello.node = "node";
  hello.window.metadata.resize(100);
  struct Message {
    std::vector<std::byte> whole;
    bool (*decoded)(std::span<const std::byte> body);
  };
  using Body = std::span<const std::byte>;
  const std::vector<Message> messages{
      {encode(hello), [](Body body) { return decode_hello(body).ok(); }},
      {encode(read_of(3)), [](Body body) { return decode_read(body).ok(); }},
      {encode(Block{1}), [](Body body) { return decode_block(body).ok(); }},
      {encode(End{}), [](Body body) { return decode_end(body).ok(); }},
      {encode(Place{1, 2, 3, 4, {{5, 6, 7}}}), [](Body body) { return decode_place(body).ok(); }},
      {encode(Placed{}), [](Body body) { return decode_placed(body).ok(); }},
      {encode(Plain{1}), [](Body body) { return decode_plain(body).ok(); }},
      {encode(Probe{1}), [](Body body) { return decode_probe(body).ok(); }},
      {encode(Sums{{{1, 2, 3}}}), [](Body body) { return decode_sums(body).ok(); }},
      {encode(Sent{}), [](Body body) { return decode_sent(body).ok(); }},
      {encode(Damaged{1}), [](Body body) { return decode_damaged(body).ok(); }},
  };
  for (const auto& [whole, decoded] : messages) {
    for (std::size_t size = 0; size < whole.size(); ++size) {
      EXPECT_FALSE(decoded(std::span(whole).first(size))) << whole.size() << " " << size;
    }
    auto longer = whole;
    longer.emplace_back();
    EXPECT_FALSE(decoded(longer)) << whole.size();
    EXPECT_TRUE(decoded(whole));
  }
  Prng random(3);
  for (int i = 0; i < 20'000; ++i) {
    auto bytes = messages[random.below(messages.size())].whole;
    for (std::byte& byte : bytes) {
      if (random.chance(10)) byte = static_cast<std::byte>(random.next());
    }
    bytes.resize(random.below(bytes.size() + 8));
    for (const Message& message : messages) (void)message.decoded(bytes);
  }
}

TEST(Messages, SumsAreOfPartsOfTheSlotThatLieApart) {
  EXPECT_TRUE(can_be({}, 100));
  const auto fit = [](std::vector<SummedExtent> sums) { return can_be(sums, 100); };
  EXPECT_TRUE(fit({{0, 100, 1}}));
  EXPECT_TRUE(fit({{0, 10, 1}, {10, 20, 1}, {50, 50, 1}}));
  EXPECT_FALSE(fit({{0, 101, 1}}));
  EXPECT_FALSE(fit({{1, 100, 1}}));
  EXPECT_FALSE(fit({{101, 1, 1}}));
  EXPECT_FALSE(fit({{5, ~0ULL, 1}}));
  EXPECT_FALSE(fit({{5, 0, 1}}));
  EXPECT_FALSE(fit({{0, 10, 1}, {9, 20, 1}}));
  EXPECT_FALSE(fit({{50, 10, 1}, {0, 10, 1}}));
}

struct Checked {
  std::uint64_t value = 0;
  bool holds_sums = false;
  friend bool operator==(const Checked&, const Checked&) = default;
};

Checked check(std::span<const std::byte> bytes, std::span<const SummedExtent> sums, BlockChecksum::Side side,
              Prng& random, const SpaceName& name = space(1), std::uint64_t slot_bytes = 1000,
              const key::BlockKey& key = {1, 2}) {
  BlockChecksum checksum(name, slot_bytes, key, sums, side);
  while (!bytes.empty()) {
    const auto part = bytes.first(1 + random.below(bytes.size()));
    checksum.add(part);
    bytes = bytes.subspan(part.size());
  }
  return {checksum.value(), checksum.holds_sums()};
}

TEST(BlockChecksum, BindsWhatTheBlockIs) {
  const std::vector<std::byte> bytes(1000, std::byte{5});
  const std::vector<SummedExtent> all{{0, 1000, block_sum(bytes)}};
  Prng random(1);
  for (const auto& sums : {std::vector<SummedExtent>{}, all}) {
    const auto of = [&](const SpaceName& name, std::uint64_t slot_bytes, const key::BlockKey& key) {
      return check(bytes, sums, BlockChecksum::Side::kReader, random, name, slot_bytes, key).value;
    };
    const auto value = of(space(1), 1000, {1, 2});
    EXPECT_EQ(of(space(1), 1000, {1, 2}), value);
    EXPECT_NE(of(space(2), 1000, {1, 2}), value);
    EXPECT_NE(of(space(1), 1001, {1, 2}), value);
    EXPECT_NE(of(space(1), 1000, {1, 3}), value);
  }
}

// Whatever the sums speak of: both sides come to the same, the owner without what they speak of, and the reader misses
// no changed byte, nor a changed sum.
TEST(BlockChecksum, TellsEveryByte) {
  Prng random(2);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::byte> bytes(1000);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next());
    std::vector<SummedExtent> sums;
    std::uint64_t summed = 0;
    for (std::uint64_t at = random.below(2) * random.below(300); at < bytes.size() && random.chance(80);) {
      const std::uint64_t size = 1 + random.below(bytes.size() - at);
      sums.push_back({at, size, block_sum(std::span(bytes).subspan(at, size))});
      summed += size;
      at += size + random.below(2) * random.below(200);
    }
    ASSERT_TRUE(can_be(sums, bytes.size()));
    BlockChecksum owner(space(1), 1000, {1, 2}, sums, BlockChecksum::Side::kOwner);
    EXPECT_EQ(owner.add(bytes), bytes.size() - summed);
    const Checked right{owner.value(), true};
    EXPECT_EQ(check(bytes, sums, BlockChecksum::Side::kReader, random), right);
    auto changed = bytes;
    changed[random.below(changed.size())] ^= std::byte{0x10};
    EXPECT_NE(check(changed, sums, BlockChecksum::Side::kReader, random), right) << "round " << round;
    if (sums.empty()) continue;
    SummedExtent& other = sums[random.below(sums.size())];
    other.sum ^= 1;
    const Checked wrong = check(bytes, sums, BlockChecksum::Side::kReader, random);
    EXPECT_FALSE(wrong.holds_sums);
    EXPECT_NE(wrong.value, right.value);
  }
}

}  // namespace
}  // namespace flexkv::peer
