#include "flexkv/ipc/wire.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <string>

namespace flexkv::ipc {
namespace {

struct Pair {
  std::uint32_t a;
  std::uint32_t b;
  bool operator==(const Pair&) const = default;
};

static_assert(!WirePod<bool>);
static_assert(!WirePod<int*>);
struct Padded {
  std::uint8_t a;
  std::uint32_t b;
};
static_assert(!WirePod<Padded>);

TEST(Wire, RoundTripAndEveryTruncationFails) {
  EXPECT_TRUE(
      rc::check([](std::uint64_t a, std::int16_t b, const std::string& text, const std::vector<std::uint32_t>& c) {
        Writer writer;
        writer.pod(a);
        writer.string(text);
        writer.array(std::span<const std::uint32_t>(c));
        writer.pod(Pair{.a = 1, .b = 2});
        writer.pod(b);
        const auto bytes = writer.take();
        const auto read = [&](std::span<const std::byte> from) {
          Reader reader(from);
          const auto a2 = reader.pod<std::uint64_t>();
          const auto text2 = std::string(reader.string(1 << 20));
          const auto c2 = reader.array<std::uint32_t>(1 << 20);
          const auto pair = reader.pod<Pair>();
          const auto b2 = reader.pod<std::int16_t>();
          return reader.done() && a2 == a && text2 == text && c2 == c && pair == Pair{1, 2} && b2 == b;
        };
        RC_ASSERT(read(bytes));
        for (std::size_t size = 0; size < bytes.size(); ++size) RC_ASSERT(!read(std::span(bytes).first(size)));
        auto longer = bytes;
        longer.push_back({});
        RC_ASSERT(!read(longer));
      }));
}

TEST(Wire, CapsHold) {
  Writer writer;
  writer.array(std::span<const std::uint64_t>(std::vector<std::uint64_t>{1, 2, 3}));
  Reader exact(writer.data());
  EXPECT_EQ(exact.array<std::uint64_t>(3).size(), 3U);
  EXPECT_TRUE(exact.done());
  Reader capped(writer.data());
  EXPECT_TRUE(capped.array<std::uint64_t>(2).empty());
  EXPECT_FALSE(capped.ok());
}

TEST(Wire, HugeCountAllocatesNothing) {
  Writer writer;
  writer.pod(std::uint32_t{0xFFFF'FFFF});
  Reader reader(writer.data());
  EXPECT_TRUE(reader.array<Pair>(~std::size_t{0}).empty());
  EXPECT_FALSE(reader.ok());
}

TEST(Wire, FailureSticks) {
  Writer writer;
  writer.pod(std::uint16_t{7});
  Reader reader(writer.data());
  EXPECT_EQ(reader.pod<std::uint32_t>(), 0U);
  EXPECT_EQ(reader.pod<std::uint16_t>(), 0U);
  EXPECT_FALSE(reader.done());
}

}  // namespace
}  // namespace flexkv::ipc
