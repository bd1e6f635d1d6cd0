#include "flexkv/layout/block_layout.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <map>

#include "flexkv/base/prng.h"
#include "flexkv/layout/element_walk.h"
#include "flexkv/layout/example_tensors.h"

namespace flexkv::layout {
namespace {

std::uint64_t address_of(const std::vector<std::byte>& memory) {
  return reinterpret_cast<std::uint64_t>(memory.data());
}

std::byte* pointer(std::uint64_t address) { return reinterpret_cast<std::byte*>(address); }

std::vector<std::byte> random_bytes(std::size_t bytes, std::uint64_t seed) {
  Prng prng(seed);
  std::vector<std::byte> memory(bytes);
  for (std::byte& byte : memory) byte = static_cast<std::byte>(prng.next());
  return memory;
}

BlockLayout derived(const std::vector<TensorDesc>& tensors, std::uint32_t blocks) {
  Result<BlockLayout> layout = BlockLayout::derive(tensors, blocks);
  if (!layout) {
    ADD_FAILURE() << layout.error().message;
    std::abort();
  }
  return std::move(layout).value();
}

// The host form, found element by element.
std::vector<std::byte> host_form_by_elements(const std::vector<TensorDesc>& tensors, std::uint32_t block) {
  std::vector<std::byte> host;
  for (const Piece& piece : pieces_of_block(tensors, block)) {
    host.insert(host.end(), pointer(piece.address), pointer(piece.address) + piece.bytes);
  }
  return host;
}

std::vector<std::byte> host_form_by_runs(const BlockLayout& layout, std::uint32_t block) {
  std::vector<std::byte> host(layout.shard_bytes());
  layout.for_each_run(block, [&](std::uint64_t address, std::uint32_t offset, std::uint32_t bytes) {
    std::memcpy(host.data() + offset, pointer(address), bytes);
  });
  return host;
}

// What a copy engine does with the rectangles.
std::vector<std::byte> host_form_by_rectangles(const BlockLayout& layout, std::uint32_t block) {
  std::vector<std::byte> host(layout.shard_bytes());
  for (const Rectangle& r : layout.rectangles()) {
    for (std::uint64_t row = 0; row < r.rows; ++row) {
      std::memcpy(host.data() + r.host_offset + row * r.host_step,
                  pointer(r.address + block * r.block_stride + row * r.row_step), r.row_bytes);
    }
  }
  return host;
}

// Every way of moving a block agrees with element by element addressing, and a block written to the device changes its
// own bytes alone. `memory` is all memory that the tensors lie in. Empty: all is well.
std::string check_plan(const std::vector<TensorDesc>& tensors, std::uint32_t blocks, std::vector<std::byte>& memory) {
  const BlockLayout layout = derived(tensors, blocks);
  for (std::uint32_t block = 0; block < blocks; ++block) {
    const std::vector<std::byte> host = host_form_by_elements(tensors, block);
    if (host.size() != layout.shard_bytes()) return "shard_bytes is wrong";
    if (host_form_by_runs(layout, block) != host) return "runs of block " + std::to_string(block);
    if (host_form_by_rectangles(layout, block) != host) return "rectangles of block " + std::to_string(block);

    const std::vector<std::byte> fresh = random_bytes(host.size(), block + 99);
    std::vector<std::byte> expected = memory;
    for (const Piece& piece : pieces_of_block(tensors, block)) {
      std::memcpy(expected.data() + (piece.address - address_of(memory)), fresh.data() + piece.host_offset,
                  piece.bytes);
    }
    layout.for_each_run(block, [&](std::uint64_t address, std::uint32_t offset, std::uint32_t bytes) {
      std::memcpy(pointer(address), fresh.data() + offset, bytes);
    });
    if (memory != expected) return "writing block " + std::to_string(block);
  }
  return {};
}

TEST(BlockLayout, agrees_with_element_addressing_on_every_example) {
  for (const ExampleCase& example : example_cases(1 << 20)) {
    std::vector<std::byte> memory = random_bytes(example.memory_bytes, 1);
    std::vector<TensorDesc> tensors = example.tensors;
    for (TensorDesc& tensor : tensors) tensor.address += address_of(memory) - (1 << 20);
    EXPECT_EQ(check_plan(tensors, example.blocks, memory), "") << example.name;
  }
}

// Layers of one allocation whose axes (layer included) lie in any order with any padding: all there is to layouts.
RC_GTEST_PROP(BlockLayout, agrees_with_element_addressing_on_any_order_and_padding, ()) {
  const auto rank = *rc::gen::inRange<std::size_t>(1, 6);
  const auto element_bytes = *rc::gen::element<std::uint32_t>(1, 2, 3, 4);
  const auto block_axis = *rc::gen::inRange<std::size_t>(0, rank);
  const auto kernel_blocks = *rc::gen::inRange<std::uint32_t>(1, 4);
  const auto blocks = *rc::gen::inRange<std::uint32_t>(1, 5);
  const auto layers = *rc::gen::inRange<std::int64_t>(1, 4);
  std::vector<std::int64_t> sizes;  // the tensor's axes, then the layer axis
  for (std::size_t axis = 0; axis < rank; ++axis) sizes.push_back(*rc::gen::inRange<std::int64_t>(1, 4));
  sizes[block_axis] = std::int64_t{blocks} * kernel_blocks;
  sizes.push_back(layers);
  std::vector<std::size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0U);
  Prng prng(*rc::gen::arbitrary<std::uint64_t>());
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[prng.below(i)]);

  std::vector<std::int64_t> strides(sizes.size());
  std::int64_t extent = 1;
  for (const std::size_t axis : order) {  // innermost first
    strides[axis] = extent + (prng.chance(30) ? static_cast<std::int64_t>(prng.below(3)) : 0);
    extent = (sizes[axis] - 1) * strides[axis] + extent;
    if (prng.chance(20)) extent += static_cast<std::int64_t>(prng.below(4));
  }
  std::vector<std::byte> memory = random_bytes(static_cast<std::size_t>(extent) * element_bytes, prng.next());
  std::vector<TensorDesc> tensors;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    tensors.push_back(
        {.name = std::to_string(layer),
         .address = address_of(memory) + static_cast<std::uint64_t>(layer * strides[rank]) * element_bytes,
         .element_bytes = element_bytes,
         .shape = {sizes.begin(), sizes.end() - 1},
         .stride = {strides.begin(), strides.end() - 1},
         .block_axis = static_cast<unsigned>(block_axis),
         .kernel_blocks_per_block = kernel_blocks});
  }
  RC_ASSERT(check_plan(tensors, blocks, memory) == "");
}

// The elements carry their own logical coordinates, so equal host bytes mean equal meaning.
std::vector<std::byte> meaning(std::string_view order, std::uint32_t block) {
  const KvSize size;
  std::vector<std::byte> memory(size.bytes());
  const std::vector<TensorDesc> tensors = vllm_tensors(order, size, address_of(memory));
  for (std::uint32_t layer = 0; layer < size.layers; ++layer) {
    const TensorDesc& t = tensors[layer];
    for (std::int64_t b = 0; b < t.shape[0]; ++b) {
      for (std::int64_t h = 0; h < t.shape[1]; ++h) {
        for (std::int64_t n = 0; n < t.shape[2]; ++n) {
          for (std::int64_t c = 0; c < t.shape[3]; ++c) {
            const auto value =
                static_cast<std::uint16_t>((((layer * t.shape[0] + b) * t.shape[1] + h) * t.shape[2] + n) * 8 + c);
            const auto at = b * t.stride[0] + h * t.stride[1] + n * t.stride[2] + c * t.stride[3];
            std::memcpy(pointer(t.address + static_cast<std::uint64_t>(at) * 2), &value, 2);
          }
        }
      }
    }
  }
  return host_form_by_runs(derived(tensors, size.blocks), block);
}

TEST(BlockLayout, equal_ids_mean_equal_host_bytes) {
  const std::vector<std::string> orders = {"LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"};
  const KvSize size;
  for (const std::string& a : orders) {
    for (const std::string& b : orders) {
      const bool same_id =
          derived(vllm_tensors(a, size, 4096), 7).id() == derived(vllm_tensors(b, size, 65536), 7).id();
      EXPECT_EQ(same_id, meaning(a, 5) == meaning(b, 5)) << a << ' ' << b;
    }
  }
  EXPECT_EQ(meaning("LBNHC", 3), meaning("BLNHC", 3));
  EXPECT_EQ(meaning("LBHNC", 3), meaning("LHBNC", 3));
  EXPECT_EQ(meaning("LBHNC", 3), meaning("BHLNC", 3));
  EXPECT_NE(meaning("LBHNC", 3), meaning("LBNHC", 3));
}

TEST(BlockLayout, id_is_that_of_the_host_form_alone) {
  const auto id_of = [](const KvSize& size, std::uint32_t block_count) {
    return derived(vllm_tensors("LBNHC", size, 4096), block_count).id();
  };
  const LayoutId id = id_of({}, 7);
  EXPECT_EQ(id, id_of({.blocks = 100}, 100));
  EXPECT_EQ(id, id_of({.blocks = 100}, 1));
  EXPECT_NE(id, id_of({.layers = 4}, 7));
  EXPECT_NE(id, id_of({.tokens = 8}, 7));
  EXPECT_NE(id, id_of({.heads = 4, .tokens = 2}, 7));
  EXPECT_NE(id, id_of({.content = 16, .element_bytes = 1}, 7));
  // Recorded once: when it changes, all that is stored under it is lost, so the canonical form needs a new version.
  std::string hex;
  for (const std::uint8_t byte : id.bytes) hex += "0123456789abcdef"[byte >> 4], hex += "0123456789abcdef"[byte & 15];
  EXPECT_EQ(hex, "233a2814b82aaeabc76bd96d7f916001");
}

TEST(BlockLayout, uses_as_few_pieces_as_the_memory_allows) {
  const KvSize size;
  const auto shape = [&](std::string_view order) {
    const BlockLayout layout = derived(vllm_tensors(order, size, 4096), size.blocks);
    std::uint32_t rows = 0;
    for (const Rectangle& r : layout.rectangles()) rows += r.rows;
    return std::vector<std::size_t>{layout.strips().size(), layout.rectangles().size(), rows};
  };
  using Counts = std::vector<std::size_t>;  // strips, rectangles, runs
  EXPECT_EQ(shape("BLHNC"), (Counts{1, 1, 1}));
  EXPECT_EQ(shape("BLNHC"), (Counts{1, 1, 1}));
  EXPECT_EQ(shape("LBNHC"), (Counts{3, 1, 3}));
  EXPECT_EQ(shape("LBHNC"), (Counts{3, 1, 3}));
  EXPECT_EQ(shape("LHBNC"), (Counts{3, 1, 6}));
  EXPECT_EQ(shape("BHLNC"), (Counts{3, 2, 6}));

  std::map<std::string, std::size_t> rectangles;
  for (const ExampleCase& example : example_cases(4096)) {
    rectangles[example.name] = derived(example.tensors, example.blocks).rectangles().size();
  }
  EXPECT_EQ(rectangles["separate_k_and_v"], 2U);
  EXPECT_EQ(rectangles["mla_with_index"], 2U);
  EXPECT_EQ(rectangles["descending_allocations"], 3U);
  EXPECT_EQ(rectangles["kernel_blocks"], 1U);
}

TEST(BlockLayout, stores_aliases_once) {
  std::vector<TensorDesc> tensors = vllm_tensors("LBNHC", {}, 4096);
  const BlockLayout plain = derived(tensors, 7);
  tensors.insert(tensors.begin() + 1, tensors[0]);
  const BlockLayout with_alias = derived(tensors, 7);
  EXPECT_EQ(plain.shard_bytes(), with_alias.shard_bytes());
  EXPECT_EQ(plain.id(), with_alias.id());
}

TEST(BlockLayout, describes_each_shape_once) {
  const std::string text = derived(vllm_tensors("LBHNC", {}, 4096), 7).describe();
  EXPECT_EQ(text,
            "3 tensor(s): 128 bytes a block, elements of 2, axes outermost first [0:2 1:4 2:8], in 1 run(s) of 128, "
            "block stride 128\n");
}

// Parts follow one another without gaps, hold whole tensors, and together copy what the whole does.
TEST(BlockLayout, cuts_a_block_into_parts_between_tensors) {
  std::vector<std::byte> memory = random_bytes(256 << 10, 3);
  const std::uint64_t base = (address_of(memory) + 255) / 256 * 256;
  for (const ExampleCase& example : example_cases(base)) {
    memory.resize(std::max<std::size_t>(memory.size(), example.memory_bytes));
    const BlockLayout layout = derived(example.tensors, example.blocks);
    std::uint32_t end = 0;
    std::vector<std::byte> host(layout.shard_bytes());
    for (const Part& part : layout.parts()) {
      EXPECT_EQ(part.host_begin, end) << example.name;
      end = part.host_end;
      std::uint64_t bytes = 0;
      for (const Rectangle& r : part.rectangles) {
        for (std::uint64_t row = 0; row < r.rows; ++row) {
          const std::uint64_t offset = r.host_offset + row * r.host_step;
          EXPECT_TRUE(offset >= part.host_begin && offset + r.row_bytes <= part.host_end) << example.name;
          std::memcpy(host.data() + offset, pointer(r.address + r.block_stride + row * r.row_step), r.row_bytes);
          bytes += r.row_bytes;
        }
      }
      EXPECT_EQ(bytes, part.host_end - part.host_begin) << example.name;
    }
    EXPECT_EQ(end, layout.shard_bytes()) << example.name;
    EXPECT_EQ(host, host_form_by_elements(example.tensors, 1)) << example.name;
    EXPECT_LE(layout.parts().size(), kMaxParts);
    EXPECT_EQ(layout.part_of(example.tensors.size() - 1), example.name == "aliases" ? 0 : layout.parts().size() - 1);
    EXPECT_EQ(BlockLayout::derive(example.tensors, example.blocks, layout.shard_bytes()).value().parts().size(), 1U);
  }
}

}  // namespace
}  // namespace flexkv::layout
