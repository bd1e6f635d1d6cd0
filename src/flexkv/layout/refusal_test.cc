// What BlockLayout::derive refuses, and that it says which tensor and why.
#include <gtest/gtest.h>

#include <limits>

#include "flexkv/layout/block_layout.h"
#include "flexkv/layout/example_tensors.h"

namespace flexkv::layout {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

// The refusal of one dense tensor [7, 4, 8] after `spoil` changed it; empty if it was accepted.
template <typename Spoil>
std::string refusal(Spoil spoil, std::uint32_t blocks = 7) {
  TensorDesc tensor = dense_tensor("kv", 4096, 2, {7, 4, 8});
  spoil(tensor);
  const Result<BlockLayout> layout = BlockLayout::derive(std::vector{tensor}, blocks);
  return layout ? "" : layout.error().message;
}

TEST(Refusals, one_tensor) {
  const auto refused = [](auto spoil, const std::string& why) {
    const std::string message = refusal(spoil);
    EXPECT_NE(message.find("\"kv\""), std::string::npos) << message;
    EXPECT_NE(message.find(why), std::string::npos) << message;
  };
  EXPECT_EQ(refusal([](TensorDesc&) {}), "");
  refused([](TensorDesc& t) { t.address = 0; }, "null");
  refused([](TensorDesc& t) { t.shape.clear(); }, "0 sizes and 3 strides");
  refused([](TensorDesc& t) { t.stride.pop_back(); }, "3 sizes and 2 strides");
  refused([](TensorDesc& t) { t.block_axis = 3; }, "block axis 3 of 3");
  refused([](TensorDesc& t) { t.element_bytes = 0; }, "above 0");
  refused([](TensorDesc& t) { t.kernel_blocks_per_block = 0; }, "above 0");
  refused([](TensorDesc& t) { t.kernel_blocks_per_block = 2; }, "7 entries, 7 blocks of 2 need 14");
  refused([](TensorDesc& t) { t.shape[1] = 0; }, "axis 1 has size 0");
  refused([](TensorDesc& t) { t.shape[2] = -8; }, "axis 2 has size -8");
  refused([](TensorDesc& t) { t.stride[1] = 0; }, "axis 1 has stride 0");
  refused([](TensorDesc& t) { t.stride[1] = -8; }, "axis 1 has stride -8");
  refused([](TensorDesc& t) { t.stride[0] = 31; }, "block axis 0 steps by 62 bytes over 64");
  refused([](TensorDesc& t) { t.stride[1] = 7; }, "axis 1 steps by 14 bytes over 16");
  refused([](TensorDesc& t) { t.stride[1] = 1; }, "overlap");
  refused([](TensorDesc& t) { t.stride[0] = kHuge; }, "beyond any address");
  refused([](TensorDesc& t) { t.shape[0] = kHuge, t.stride[1] = kHuge / 2; }, "beyond any address");
  refused([](TensorDesc& t) { t.address = ~std::uint64_t{0} - 10; }, "beyond any address");
  refused([](TensorDesc& t) { t.address = kMaxAddress - 7 * 4 * 8 * 2 + 1; }, "beyond any address");
  refused([](TensorDesc& t) { t.element_bytes = 1U << 31; }, "4 GiB");
  refused([](TensorDesc& t) { t.shape = {7, 1 << 19, 1}, t.stride = {1 << 20, 2, 1}; }, "too many pieces");
}

TEST(Refusals, one_block_and_unit_axes_need_no_stride) {
  EXPECT_EQ(refusal([](TensorDesc& t) { t.shape[0] = 1, t.stride[0] = 0; }, 1), "");
  EXPECT_EQ(refusal([](TensorDesc& t) { t.shape[1] = 1, t.stride[1] = -3; }), "");
}

TEST(Refusals, no_blocks_or_no_tensors) {
  EXPECT_NE(refusal([](TensorDesc&) {}, 0), "");
  EXPECT_FALSE(BlockLayout::derive({}, 7));
}

std::string pair_refusal(const TensorDesc& a, const TensorDesc& b, std::uint32_t blocks) {
  const Result<BlockLayout> layout = BlockLayout::derive(std::vector{a, b}, blocks);
  return layout ? "" : layout.error().message;
}

TEST(Refusals, tensors_that_overlap_in_part) {
  const TensorDesc a = dense_tensor("a", 4096, 2, {7, 4, 8});
  const std::uint64_t end = 4096 + 7 * 64;
  EXPECT_EQ(pair_refusal(a, dense_tensor("b", end, 2, {7, 4, 8}), 7), "");
  const std::string message = pair_refusal(a, dense_tensor("b", end - 1, 2, {7, 4, 8}), 7);
  EXPECT_NE(message.find("\"a\" and \"b\" overlap"), std::string::npos) << message;
  EXPECT_NE(pair_refusal(a, dense_tensor("b", 4096, 2, {7, 4, 4}), 7), "");
  EXPECT_NE(pair_refusal(a, dense_tensor("b", 4096, 1, {7, 4, 16}), 7), "") << "the same bytes seen as another type";
  EXPECT_EQ(pair_refusal(a, dense_tensor("b", end - 1, 2, {7, 4, 8}), 6), "") << "only bytes of blocks count";
}

TEST(Refusals, interleaved_layers_of_unequal_size_are_told_from_overlap) {
  // A block holds 64 bytes of a, then 48 of b.
  TensorDesc a = dense_tensor("a", 4096, 2, {7, 4, 8});
  TensorDesc b = dense_tensor("b", 4096 + 64, 1, {7, 48});
  a.stride[0] = 56;
  b.stride[0] = 112;
  EXPECT_EQ(pair_refusal(a, b, 7), "");
  b.address -= 1;
  EXPECT_NE(pair_refusal(a, b, 7), "");
  b.address += 2;
  EXPECT_NE(pair_refusal(a, b, 7), "");
}

}  // namespace
}  // namespace flexkv::layout
