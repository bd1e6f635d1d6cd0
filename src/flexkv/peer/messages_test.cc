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
  Hello newer;
  newer.version = kVersion + 1;
  newer.node = "x";
  const auto refused = decode_hello(encode(newer));
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_FALSE(decode_end(encode(End{static_cast<Outcome>(kOutcomeCount)})).ok());
}

TEST(Messages, AreNotReadPastTheirEnd) {
  Hello hello;
  hello.node = "node";
  const std::vector<std::vector<std::byte>> whole{encode(hello), encode(read_of(3)), encode(Block{1}), encode(End{}),
                                                  encode(Probe{})};
  const auto decoded = [](std::size_t kind, std::span<const std::byte> body) {
    return kind == 0   ? decode_hello(body).ok()
           : kind == 1 ? decode_read(body).ok()
           : kind == 2 ? decode_block(body).ok()
           : kind == 3 ? decode_end(body).ok()
                       : decode_probe(body).ok();
  };
  for (std::size_t kind = 0; kind < whole.size(); ++kind) {
    for (std::size_t size = 0; size < whole[kind].size(); ++size) {
      const std::vector<std::byte> cut(whole[kind].begin(), whole[kind].begin() + static_cast<std::ptrdiff_t>(size));
      EXPECT_FALSE(decoded(kind, cut)) << kind << " " << size;
    }
    auto longer = whole[kind];
    longer.emplace_back();
    EXPECT_FALSE(decoded(kind, longer)) << kind;
    EXPECT_TRUE(decoded(kind, whole[kind]));
  }
  Prng random(3);
  for (int i = 0; i < 20'000; ++i) {
    auto bytes = whole[random.below(whole.size())];
    for (std::byte& byte : bytes) {
      if (random.chance(10)) byte = static_cast<std::byte>(random.next());
    }
    bytes.resize(random.below(bytes.size() + 8));
    for (std::size_t kind = 0; kind < whole.size(); ++kind) (void)decoded(kind, bytes);
  }
}

TEST(BlockChecksum, BindsWhatTheBlockIs) {
  const std::vector<std::byte> bytes(1000, std::byte{5});
  const auto of = [&](const SpaceName& name, std::uint64_t slot_bytes, const key::BlockKey& key, std::size_t cut) {
    BlockChecksum checksum(name, slot_bytes, key);
    checksum.add(std::span(bytes).first(cut));
    checksum.add(std::span(bytes).subspan(cut));
    return checksum.value();
  };
  const auto value = of(space(1), 1000, {1, 2}, 0);
  EXPECT_EQ(of(space(1), 1000, {1, 2}, 333), value);
  EXPECT_NE(of(space(2), 1000, {1, 2}, 0), value);
  EXPECT_NE(of(space(1), 1001, {1, 2}, 0), value);
  EXPECT_NE(of(space(1), 1000, {1, 3}, 0), value);
}

}  // namespace
}  // namespace flexkv::peer
