#include "flexkv/cluster/wire.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>

namespace flexkv::cluster {
namespace {

Batch arbitrary_batch() {
  Batch batch;
  batch.number = *rc::gen::arbitrary<std::uint64_t>();
  batch.cleared = *rc::gen::arbitrary<bool>();
  const auto count = *rc::gen::inRange(0, 300);
  for (int i = 0; i < count; ++i) {
    const auto tiers = static_cast<Tiers>(*rc::gen::inRange(0, 4));
    const auto kind = *rc::gen::inRange(0, 4);
    Before before = kUnsaid;
    if (kind == 0) before = kFirst;
    if (kind == 1) before = *rc::gen::arbitrary<Before>();
    if (kind == 2 && i > 0) before = half(batch.residencies.back().tag);
    batch.residencies.push_back({*rc::gen::arbitrary<Tag>(), tiers, before});
  }
  return batch;
}

Beat some_beat() {
  return {7, "node", "10.0.0.1:5000", {{SpaceId{1, 2, 3}, 9, 4, 8, 2}, {SpaceId{5}, 0, 0, 0, 0}}, 11};
}

RC_GTEST_PROP(Wire, ABatchComesBack, ()) {
  Batch batch = arbitrary_batch();
  const auto decoded = decode_batch(encode_batch(batch, "here"), "here");
  RC_ASSERT(decoded.ok());
  std::stable_sort(batch.residencies.begin(), batch.residencies.end(),
                   [](const Residency& a, const Residency& b) { return a.tiers < b.tiers; });
  for (std::size_t i = 0; i < batch.residencies.size(); ++i) {
    Residency& one = batch.residencies[i];
    const bool first = i == 0 || batch.residencies[i - 1].tiers != one.tiers;
    if (one.before == kUnsaid && !first) one.before = half(batch.residencies[i - 1].tag);
    if (one.tiers == 0) one.before = kUnsaid;
  }
  RC_ASSERT(decoded.value().number == batch.number);
  RC_ASSERT(decoded.value().cleared == batch.cleared);
  RC_ASSERT(decoded.value().residencies == batch.residencies);
}

RC_GTEST_PROP(Wire, AnyChangedBitIsRefused, ()) {
  std::string bytes = encode_batch(arbitrary_batch(), "here");
  const auto at = *rc::gen::inRange<std::size_t>(0, bytes.size());
  bytes[at] = static_cast<char>(bytes[at] ^ (1 << *rc::gen::inRange(0, 8)));
  RC_ASSERT(!decode_batch(bytes, "here").ok());
}

TEST(Wire, ABatchCostsEightBytesForEachBlockABitForThoseThatAreThereAndLittleElse) {
  Batch batch{1, false, {}};
  const std::size_t empty = encode_batch(batch, "here").size();
  for (Tag tag = 0; tag < 4096; ++tag) batch.residencies.push_back({tag, static_cast<Tiers>(tag % 2)});
  EXPECT_EQ(encode_batch(batch, "here").size(), empty + 4096 * sizeof(Tag) + 2 * 5 + 2048 / 8);
  for (Tag tag = 1; tag < 4096; tag += 8) batch.residencies[tag].before = kFirst;
  EXPECT_EQ(encode_batch(batch, "here").size(), empty + 4096 * sizeof(Tag) + 2 * 5 + 2048 / 8 + 512 * sizeof(Before));
  EXPECT_LT(empty, 32U);
}

// As what decodes must encode to the same bytes.
TEST(Wire, WhatNeedNotBeSaidIsRefused) {
  const auto refused = [](std::string bytes, std::size_t at, char value) {
    bytes.resize(bytes.size() - 8);
    bytes[at] = value;
    seal_entry(bytes, "here");
    return !decode_batch(bytes, "here").ok();
  };
  // Behind the head of 13 bytes and that of the group, of 5, are two blocks, a byte with a bit for each, whom each
  // follows.
  const std::string bytes = encode_batch({1, false, {{5, 1, 7}, {6, 1, 8}}}, "here");
  ASSERT_EQ(bytes.size(), 13U + 5 + 16 + 1 + 8 + 8);
  EXPECT_FALSE(refused(bytes, 34, 3));
  EXPECT_TRUE(refused(bytes, 34, 7)) << "a block that is not there";
  EXPECT_TRUE(refused(bytes, 34, 1)) << "bytes that nobody reads";
  EXPECT_TRUE(refused(bytes, 35, 0)) << "unsaid";
  EXPECT_TRUE(refused(bytes, 39, 5)) << "the one before it there";
}

TEST(Wire, ABeatComesBack) {
  const auto decoded = decode_beat(encode_beat(some_beat(), "here"), "here");
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded.value(), some_beat());
}

TEST(Wire, ABeatSaysInWhatConditionTheNodeIsAndOlderVersionsReadItAsANumber) {
  Beat beat = some_beat();
  const std::string serves = encode_beat(beat, "here");
  for (const auto condition : {Condition::kServes, Condition::kDrains, Condition::kDrained, Condition::kEnds}) {
    beat.condition = condition;
    const std::string bytes = encode_beat(beat, "here");
    const auto decoded = decode_beat(bytes, "here");
    ASSERT_TRUE(decoded.ok());
    EXPECT_EQ(decoded.value(), beat);
    ASSERT_EQ(bytes.size(), serves.size());
    for (std::size_t at = 0; at + 8 < bytes.size(); ++at) EXPECT_TRUE(bytes[at] == serves[at] || at == 11) << at;
  }
  beat.condition = static_cast<Condition>(kConditionCount);
  EXPECT_FALSE(decode_beat(encode_beat(beat, "here"), "here").ok());
}

TEST(Wire, WhatStandsInTheWrongPlaceIsRefused) {
  EXPECT_FALSE(decode_batch(encode_batch({1, false, {{5, 1}}}, "here"), "there").ok());
  EXPECT_FALSE(decode_beat(encode_beat(some_beat(), "here"), "there").ok());
  EXPECT_FALSE(decode_beat(encode_batch({1, false, {}}, "here"), "here").ok());
}

TEST(Wire, TooLittleIsRefused) {
  const std::string beat = encode_beat(some_beat(), "here");
  const std::string batch = encode_batch({1, false, {{5, 1}, {6, 0}}}, "here");
  for (std::size_t size = 0; size < beat.size(); ++size) EXPECT_FALSE(decode_beat(beat.substr(0, size), "here").ok());
  for (std::size_t size = 0; size < batch.size(); ++size)
    EXPECT_FALSE(decode_batch(batch.substr(0, size), "here").ok());
}

TEST(Wire, TheErrorSaysWhatIsWrong) {
  std::string bytes = encode_batch({1, false, {}}, "here");
  ++bytes[3];
  const auto decoded = decode_batch(bytes, "here");
  ASSERT_FALSE(decoded.ok());
  EXPECT_NE(decoded.error().message.find("another version"), std::string::npos);
  EXPECT_NE(decoded.error().message.find("'here'"), std::string::npos);
}

}  // namespace
}  // namespace flexkv::cluster
