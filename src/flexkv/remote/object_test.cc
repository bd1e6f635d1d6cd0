#include "flexkv/remote/object.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <string>

namespace flexkv::remote {
namespace {

constexpr SpaceName kSpace{1};
constexpr SpaceName kOtherSpace{2};
constexpr std::uint64_t kSlotBytes = 256;

Chain any_chain() {
  Chain chain;
  chain.parent = {*rc::gen::arbitrary<std::uint64_t>(), 1};
  const auto count = *rc::gen::inRange<std::size_t>(1, 20);
  for (std::size_t i = 0; i < count; ++i) chain.keys.push_back({*rc::gen::arbitrary<std::uint64_t>(), i});
  return chain;
}

RC_GTEST_PROP(Object, AHeaderSaysWhatWasWritten, ()) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const Chain chain = any_chain();
  const ObjectName name = codec.name_of(chain);
  RC_ASSERT(codec.parse_path(codec.path_of(name)) == name);
  const auto bytes = codec.encode_header(chain);
  RC_ASSERT(bytes.size() == ObjectCodec::header_bytes(name.blocks));
  Chain read;
  RC_ASSERT(!codec.decode_header(bytes, name, read).has_value());
  RC_ASSERT(read.parent == chain.parent && read.keys == chain.keys);
}

RC_GTEST_PROP(Object, AHeaderWithAChangedByteOrTooFewIsNotBelieved, ()) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const Chain chain = any_chain();
  const ObjectName name = codec.name_of(chain);
  auto bytes = codec.encode_header(chain);
  Chain read;
  const auto length = *rc::gen::inRange<std::size_t>(0, bytes.size());
  RC_ASSERT(codec.decode_header(std::span(bytes).first(length), name, read) == Fault::kShort);
  bytes[*rc::gen::inRange<std::size_t>(0, bytes.size())] ^= static_cast<std::byte>(*rc::gen::inRange(1, 256));
  RC_ASSERT(codec.decode_header(bytes, name, read).has_value());
}

RC_GTEST_PROP(Object, ABlockIsBelievedOnlyWhereItBelongs, ()) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const key::BlockKey key{*rc::gen::arbitrary<std::uint64_t>(), 1};
  const key::BlockKey other_key{key.high ^ 1, key.low};
  std::vector<std::byte> payload(kSlotBytes, static_cast<std::byte>(*rc::gen::inRange(0, 256)));
  BlockHead head = codec.encode_head(key, kNoParent, payload);
  RC_ASSERT(!codec.check_block(head, payload, key).has_value());
  RC_ASSERT(codec.check_block(head, payload, other_key) == Fault::kOther);
  RC_ASSERT(codec.check_block(head, std::span(payload).first(kSlotBytes - 1), key) == Fault::kShort);
  RC_ASSERT(ObjectCodec(kOtherSpace, kSlotBytes).check_block(head, payload, key) == Fault::kHead);
  RC_ASSERT(ObjectCodec(kSpace, kSlotBytes * 2).check_block(head, payload, key) == Fault::kHead);
  const auto at = *rc::gen::inRange<std::size_t>(0, kHeadBytes + kSlotBytes);
  (at < kHeadBytes ? head[at] : payload[at - kHeadBytes]) ^= static_cast<std::byte>(*rc::gen::inRange(1, 256));
  RC_ASSERT(codec.check_block(head, payload, key).has_value());
}

// Bytes with a right head of another block's key: the payload's checksum knows the key, too.
TEST(Object, AChecksumIsOfOneKey) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const std::vector<std::byte> payload(kSlotBytes, std::byte{3});
  const BlockHead one = codec.encode_head({1, 1}, kNoParent, payload);
  const BlockHead other = codec.encode_head({2, 2}, kNoParent, payload);
  EXPECT_FALSE(std::ranges::equal(std::span(one).subspan(32, 8), std::span(other).subspan(32, 8)));
}

TEST(Object, ObjectsOfAnotherSpaceOrNameAreNotBelieved) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const Chain chain{kNoParent, {{1, 2}, {3, 4}}};
  const Chain other{kNoParent, {{1, 2}, {3, 5}}};
  const auto bytes = codec.encode_header(chain);
  Chain read;
  EXPECT_EQ(codec.decode_header(bytes, codec.name_of(other), read), Fault::kOther);
  EXPECT_EQ(ObjectCodec(kOtherSpace, kSlotBytes).decode_header(bytes, codec.name_of(chain), read), Fault::kOther);
  EXPECT_EQ(ObjectCodec(kSpace, kSlotBytes * 2).decode_header(bytes, codec.name_of(chain), read), Fault::kOther);
}

TEST(Object, OnlyItsOwnNamesAreNames) {
  const ObjectCodec codec(kSpace, kSlotBytes);
  const std::string good = codec.path_of(codec.name_of({kNoParent, {{1, 2}, {3, 4}}}));
  ASSERT_TRUE(codec.parse_path(good));
  const std::size_t count_at = good.rfind('-') + 1;
  const auto with = [&](std::string_view count) { return good.substr(0, count_at) + std::string(count) + ".kv"; };
  for (const std::string& bad :
       {std::string(), good.substr(1), good + "x", with(""), with("0"), with("02"), with("-2"), with("2x"),
        with("65537"), with("99999999999999999999"), ObjectCodec(kOtherSpace, 1).path_of({})}) {
    EXPECT_FALSE(codec.parse_path(bad)) << bad;
  }
  std::string moved = good;
  moved[codec.folder().size()] ^= 1;  // the folder does not fit the digest
  EXPECT_FALSE(codec.parse_path(moved));
}

}  // namespace
}  // namespace flexkv::remote
