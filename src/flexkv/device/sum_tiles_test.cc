#include "flexkv/device/sum_tiles.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "flexkv/layout/element_walk.h"
#include "flexkv/layout/example_tensors.h"

namespace flexkv::device {
namespace {

struct alignas(256) Memory {
  std::byte bytes[1 << 20];
};

// A block in its host form, element by element: without copy plans.
std::vector<std::byte> host_form(const std::vector<layout::TensorDesc>& tensors, std::uint32_t block) {
  std::vector<std::byte> bytes;
  for (const layout::Piece& piece : layout::pieces_of_block(tensors, block)) {
    const auto* const from = reinterpret_cast<const std::byte*>(piece.address);
    bytes.insert(bytes.end(), from, from + piece.bytes);
  }
  return bytes;
}

// As the kernel does it: CTAs of warps of threads share out the tiles and the lanes, and add up what they have. In
// any order.
std::uint64_t sum_by_threads(const layout::BlockLayout& layout, std::uint32_t block, std::uint32_t ctas,
                             std::uint32_t warps, std::uint32_t threads, Prng& prng) {
  const auto tiles = tiles_of(layout);
  const auto count = static_cast<std::uint32_t>(tiles.size());
  std::vector<std::pair<std::uint32_t, std::uint32_t>> work;
  for (std::uint32_t warp = 0; warp < ctas * warps; ++warp) {
    for (std::uint32_t thread = 0; thread < threads; ++thread) work.emplace_back(warp, thread);
  }
  BlockSum sum;
  while (!work.empty()) {
    std::swap(work[prng.below(work.size())], work.back());
    const auto [warp, thread] = work.back();
    work.pop_back();
    TileSummer summer(tiles.data(), count, block);
    for (std::uint32_t tile = warp; tile < count; tile += ctas * warps) summer.add(tile, thread, threads);
    sum.add(summer.sum());
  }
  return sum.value(layout.shard_bytes());
}

class SumTilesTest : public testing::Test {
 protected:
  SumTilesTest() {
    for (std::byte& byte : memory_->bytes) byte = static_cast<std::byte>(prng_.next() >> 40);
  }
  void expect_sums(const std::string& name, const std::vector<layout::TensorDesc>& tensors, std::uint32_t blocks) {
    const auto layout = layout::BlockLayout::derive(tensors, blocks);
    ASSERT_TRUE(layout) << name << ": " << layout.error().message;
    for (std::uint32_t block = 0; block < blocks; ++block) {
      const std::uint64_t expected = block_sum(host_form(tensors, block));
      EXPECT_EQ(sum_by_threads(layout.value(), block, 4, 8, 32, prng_), expected) << name << ", block " << block;
      EXPECT_EQ(sum_by_threads(layout.value(), block, 1, 3, 5, prng_), expected) << name << ", block " << block;
    }
  }

  Prng prng_{5};
  std::unique_ptr<Memory> memory_ = std::make_unique<Memory>();
  const std::uint64_t base_ = reinterpret_cast<std::uint64_t>(memory_->bytes);
};

TEST_F(SumTilesTest, add_up_to_the_sum_of_the_host_form) {
  for (const layout::ExampleCase& example : layout::example_cases(base_)) {
    expect_sums(example.name, example.tensors, example.blocks);
  }
}

TEST_F(SumTilesTest, cut_long_runs) {
  expect_sums("whole", {layout::dense_tensor("kv", base_, 1, {3, 5 * kTileBytes + 17})}, 3);
  expect_sums(
      "across tiles",
      {layout::dense_tensor("a", base_ + 2, 2, {3, 11}), layout::dense_tensor("b", base_ + 512, 2, {3, kTileBytes}),
       layout::dense_tensor("c", base_ + (600 << 10), 1, {3, 1})},
      3);
}

// Pages of any size at any address, also smaller than a lane.
RC_GTEST_PROP(SumTiles, agree_on_pages_of_any_size_at_any_address, ()) {
  static const auto memory = std::make_unique<Memory>();
  Prng prng(*rc::gen::arbitrary<std::uint64_t>());
  for (std::size_t i = 0; i < 64 << 10; ++i) memory->bytes[i] = static_cast<std::byte>(prng.next() >> 40);
  const auto base = reinterpret_cast<std::uint64_t>(memory->bytes);
  const auto planes = *rc::gen::inRange<std::uint64_t>(1, 12);
  std::vector<layout::TensorDesc> tensors;
  for (std::uint64_t plane = 0; plane < planes; ++plane) {
    const auto bytes = static_cast<std::int64_t>(1 + prng.below(prng.chance(30) ? 900 : 40));
    const auto padding = static_cast<std::int64_t>(prng.below(20));
    tensors.push_back(layout::dense_tensor("plane", base + plane * 4096 + prng.below(64), 1, {4, bytes}, padding));
  }
  const auto layout = layout::BlockLayout::derive(tensors, 4).value();
  const auto block = *rc::gen::inRange<std::uint32_t>(0, 4);
  RC_ASSERT(sum_by_threads(layout, block, 2, 2, 8, prng) == block_sum(host_form(tensors, block)));
}

}  // namespace
}  // namespace flexkv::device
