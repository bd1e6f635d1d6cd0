#include "flexkv/base/block_sum.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <set>
#include <vector>

namespace flexkv {
namespace {

std::vector<std::byte> random_bytes(std::uint64_t seed, std::size_t size) {
  std::vector<std::byte> bytes(size);
  Prng prng(seed);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(prng.next() >> 40);
  return bytes;
}

// Written down once: what one process computes is compared by another.
TEST(BlockSum, stays_what_it_is) {
  EXPECT_EQ(block_sum(std::vector<std::byte>(64)), 16805792566256807498ULL);
  EXPECT_EQ(block_sum(random_bytes(1, 1000)), 14938839626302350099ULL);
}

RC_GTEST_PROP(BlockSum, is_the_same_in_pieces_of_any_size, ()) {
  const auto bytes = random_bytes(*rc::gen::arbitrary<std::uint64_t>(), *rc::gen::inRange<std::size_t>(0, 400));
  Prng prng(*rc::gen::arbitrary<std::uint64_t>());
  BlockSummer summer;
  for (std::span<const std::byte> rest = bytes; !rest.empty();) {
    const auto piece = rest.first(1 + prng.below(std::min<std::size_t>(rest.size(), 40)));
    summer.add(piece);
    rest = rest.subspan(piece.size());
  }
  RC_ASSERT(summer.value() == block_sum(bytes));
}

TEST(BlockSum, is_the_same_by_every_way_of_this_processor) {
  for (std::size_t lanes = 0; lanes < 300; ++lanes) {
    const auto bytes = random_bytes(lanes, lanes * kSumLaneBytes);
    const std::uint32_t first = lanes % 7 == 0 ? ~0U - 100 : static_cast<std::uint32_t>(lanes * lanes);
    BlockSum expected;
    for (std::uint32_t i = 0; i < lanes; ++i) {
      SumLane lane;
      std::memcpy(&lane, bytes.data() + i * kSumLaneBytes, kSumLaneBytes);
      expected.add_lane(first + i, lane);
    }
    for (const AddLanes add : ways_to_add_lanes()) {
      BlockSum sum;
      add(sum, first, bytes);
      EXPECT_EQ(sum.value(1), expected.value(1)) << lanes << " lanes";
    }
  }
}

RC_GTEST_PROP(BlockSum, is_the_same_with_lanes_in_any_order_in_any_shares, ()) {
  const std::size_t lanes = *rc::gen::inRange<std::size_t>(1, 60);
  const auto bytes = random_bytes(*rc::gen::arbitrary<std::uint64_t>(), lanes * kSumLaneBytes);
  Prng prng(*rc::gen::arbitrary<std::uint64_t>());
  std::vector<std::uint32_t> order(lanes);
  for (std::uint32_t i = 0; i < lanes; ++i) order[i] = i;
  for (std::size_t i = lanes; i > 1; --i) std::swap(order[i - 1], order[prng.below(i)]);
  BlockSum shares[3];
  for (const std::uint32_t number : order) {
    SumLane lane;
    std::memcpy(&lane, bytes.data() + number * kSumLaneBytes, kSumLaneBytes);
    shares[prng.below(3)].add_lane(number, lane);
  }
  BlockSum sum(shares[2].low(), shares[2].high());
  sum.add(shares[0]);
  sum.add(shares[1]);
  RC_ASSERT(sum.value(bytes.size()) == block_sum(bytes));
}

TEST(BlockSum, tells_every_flipped_bit_and_every_length) {
  for (const bool zeros : {false, true}) {
    auto bytes = zeros ? std::vector<std::byte>(331) : random_bytes(3, 331);
    std::set<std::uint64_t> sums{block_sum(bytes)};
    for (std::size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
      EXPECT_TRUE(sums.insert(block_sum(bytes)).second) << bit;
      bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
    }
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_TRUE(sums.insert(block_sum(std::span(bytes).first(size))).second) << size;
    }
  }
}

// A line of the link that is stuck: the same bit, the same way, in a row of lanes of equal bytes.
TEST(BlockSum, tells_bits_flipped_alike_in_neighbouring_lanes) {
  constexpr std::size_t kLanes = 512;
  for (const unsigned content : {0x00U, 0xFFU, 0x3FU}) {
    std::vector<std::byte> bytes(kLanes * kSumLaneBytes, static_cast<std::byte>(content));
    const std::uint64_t right = block_sum(bytes);
    for (const std::size_t step : {1U, 2U, 64U}) {
      for (const std::size_t count : {2U, 4U, 8U, 16U, 100U}) {
        for (std::size_t first = 0; first + (count - 1) * step < kLanes; ++first) {
          const std::size_t at = (first * 37 + count) % kSumLaneBytes;
          const auto bit = static_cast<std::byte>(1U << (first % 8));
          const auto flip = [&] {
            for (std::size_t i = 0; i < count; ++i) bytes[(first + i * step) * kSumLaneBytes + at] ^= bit;
          };
          flip();
          ASSERT_NE(block_sum(bytes), right) << first << ' ' << step << ' ' << count;
          flip();
        }
      }
    }
  }
}

// What a wrong plan or a page that came too late makes of a block of 8 pages.
TEST(BlockSum, tells_pages_that_are_swapped_shifted_stale_or_zero) {
  constexpr std::size_t kPage = 1152;
  for (std::uint64_t seed = 1; seed < 50; ++seed) {
    const auto right = random_bytes(seed, 8 * kPage);
    const auto stale = random_bytes(seed + 1000, kPage);
    std::set<std::uint64_t> sums{block_sum(right)};
    std::size_t made = 1;
    const auto expect_new = [&](const std::vector<std::byte>& bytes) {
      sums.insert(block_sum(bytes));
      EXPECT_EQ(sums.size(), ++made) << seed;
    };
    for (std::size_t page = 0; page < 8; ++page) {
      auto bytes = right;
      std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(page * kPage), kPage, std::byte{0});
      expect_new(bytes);
      std::copy(stale.begin(), stale.end(), bytes.begin() + static_cast<std::ptrdiff_t>(page * kPage));
      expect_new(bytes);
      for (std::size_t other = page + 1; other < 8; ++other) {
        bytes = right;
        std::swap_ranges(bytes.begin() + static_cast<std::ptrdiff_t>(page * kPage),
                         bytes.begin() + static_cast<std::ptrdiff_t>((page + 1) * kPage),
                         bytes.begin() + static_cast<std::ptrdiff_t>(other * kPage));
        expect_new(bytes);
      }
    }
    for (const std::ptrdiff_t shift : {2, 16, 32, 1152}) {
      auto bytes = right;
      std::rotate(bytes.begin(), bytes.begin() + shift, bytes.end());
      expect_new(bytes);
    }
  }
}

TEST(BlockSum, extents_of_a_slot_are_compared_each_for_itself) {
  const auto slot = random_bytes(7, 3 * 4096);
  const auto sum = [&](std::size_t offset, std::size_t bytes) {
    return block_sum(std::span(slot).subspan(offset, bytes));
  };
  std::vector<SummedExtent> extents{{0, 4000, sum(0, 4000)}, {8192, 100, sum(8192, 100)}};
  EXPECT_TRUE(holds_sums(slot, {}));
  EXPECT_TRUE(holds_sums(slot, extents));
  std::swap(extents[0].sum, extents[1].sum);
  EXPECT_FALSE(holds_sums(slot, extents));
}

}  // namespace
}  // namespace flexkv
