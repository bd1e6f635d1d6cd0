// KV tensors as engines register them, small: the cases that every copy plan and every device form is tested with.
// For tests; values only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flexkv/layout/tensor_desc.h"

namespace flexkv::layout {

struct KvSize {
  std::uint32_t layers = 3, blocks = 7, heads = 2, tokens = 4, content = 8, element_bytes = 2;

  std::int64_t of(char axis) const {
    switch (axis) {
      case 'L':
        return layers;
      case 'B':
        return blocks;
      case 'H':
        return heads;
      case 'N':
        return tokens;
      default:
        return content;
    }
  }
  std::uint64_t bytes() const { return std::uint64_t{layers} * blocks * heads * tokens * content * element_bytes; }
};

// Stride in elements of `axis` when the axes lie in memory in `order`, outermost first.
inline std::int64_t stride_in(std::string_view order, const KvSize& size, char axis) {
  std::int64_t stride = 1;
  for (auto at = order.rbegin(); at != order.rend() && *at != axis; ++at) stride *= size.of(*at);
  return stride;
}

// vLLM: one allocation, a view [B, H, N, C] of it per layer.
inline std::vector<TensorDesc> vllm_tensors(std::string_view order, const KvSize& size, std::uint64_t base) {
  std::vector<TensorDesc> tensors;
  for (std::uint32_t layer = 0; layer < size.layers; ++layer) {
    const auto offset = static_cast<std::uint64_t>(stride_in(order, size, 'L')) * layer * size.element_bytes;
    TensorDesc tensor{.name = "layer" + std::to_string(layer),
                      .address = base + offset,
                      .element_bytes = size.element_bytes,
                      .shape = {},
                      .stride = {}};
    for (const char axis : {'B', 'H', 'N', 'C'}) {
      tensor.shape.push_back(size.of(axis));
      tensor.stride.push_back(stride_in(order, size, axis));
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

// A tensor of its own, dense but for `padding` elements behind each entry of axis 0.
inline TensorDesc dense_tensor(std::string name, std::uint64_t address, std::uint32_t element_bytes,
                               std::vector<std::int64_t> shape, std::int64_t padding = 0) {
  std::vector<std::int64_t> stride(shape.size(), 1);
  for (std::size_t axis = shape.size() - 1; axis > 0; --axis) stride[axis - 1] = stride[axis] * shape[axis];
  stride[0] += padding;
  return {.name = std::move(name),
          .address = address,
          .element_bytes = element_bytes,
          .shape = std::move(shape),
          .stride = std::move(stride)};
}

struct ExampleCase {
  std::string name;
  std::uint32_t blocks = 0;
  std::vector<TensorDesc> tensors;
  std::uint64_t memory_bytes = 0;  // the tensors lie within this many bytes from the base
};

// Every case in memory that starts at `base`. REQUIRES: base is a multiple of 256, and not 0.
inline std::vector<ExampleCase> example_cases(std::uint64_t base) {
  const KvSize size;
  const std::uint32_t blocks = size.blocks;
  const auto b = std::int64_t{blocks};
  std::vector<ExampleCase> cases;
  auto add = [&](std::string name, std::vector<TensorDesc> tensors) {
    std::uint64_t end = base;
    for (const TensorDesc& tensor : tensors) {
      std::int64_t elements = 1;
      for (std::size_t i = 0; i < tensor.shape.size(); ++i) elements += (tensor.shape[i] - 1) * tensor.stride[i];
      end = std::max(end, tensor.address + static_cast<std::uint64_t>(elements) * tensor.element_bytes);
    }
    cases.push_back({std::move(name), blocks, std::move(tensors), end - base});
  };
  for (const char* order : {"LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"}) {
    add(std::string("vllm_") + order, vllm_tensors(order, size, base));
  }

  std::vector<TensorDesc> separate, descending, stacked, mla, with_index, padded, kernel_blocks, paired;
  for (std::uint64_t layer = 0; layer < 3; ++layer) {
    const std::string name = std::to_string(layer);
    separate.push_back(dense_tensor("k" + name, base + layer * 4096, 2, {b, 4, 2, 8}));
    separate.push_back(dense_tensor("v" + name, base + layer * 4096 + 65536, 2, {b, 4, 2, 8}));
    descending.push_back(dense_tensor("kv" + name, base + (2 - layer) * 4096, 2, {b, 4, 2, 16}));
    stacked.push_back(dense_tensor("kv" + name, base + layer * 8192, 2, {2, b, 4, 2, 8}));
    stacked.back().block_axis = 1;
    mla.push_back(dense_tensor("mla" + name, base + layer * 4096, 1, {b, 1, 4, 73}));
    with_index.push_back(dense_tensor("mla" + name, base + layer * 8192, 2, {b, 4, 9}));
    with_index.push_back(dense_tensor("index" + name, base + layer * 8192 + 4096, 1, {b, 4, 5}));
    padded.push_back(dense_tensor("padded" + name, base + layer * 4096, 2, {b, 4, 2, 8}, 24));
    padded.back().stride[1] += 5;  // tokens apart as well: the runs are heads of one token
    kernel_blocks.push_back(dense_tensor("kv" + name, base + layer * 4096, 2, {b * 2, 2, 2, 8}));
    kernel_blocks.back().kernel_blocks_per_block = 2;
    // Two layers in a page: one run, which parts may cut.
    paired.push_back(dense_tensor("paired" + name, base + layer / 2 * 8192 + layer % 2 * 256, 2, {b, 4, 2, 16}, 128));
  }
  add("separate_k_and_v", separate);
  add("descending_allocations", descending);
  add("stacked_kv", stacked);
  add("mla", mla);
  add("mla_with_index", with_index);
  add("padded", padded);
  add("kernel_blocks", kernel_blocks);
  add("pairs_of_layers", paired);

  std::vector<TensorDesc> head_major = vllm_tensors("LBHNC", {.blocks = blocks * 2, .tokens = 2}, base);
  for (TensorDesc& tensor : head_major) tensor.kernel_blocks_per_block = 2;
  add("kernel_blocks_head_major", head_major);
  std::vector<TensorDesc> heads_outside = vllm_tensors("LHBNC", {.blocks = blocks * 2, .tokens = 2}, base);
  for (TensorDesc& tensor : heads_outside) tensor.kernel_blocks_per_block = 2;
  add("kernel_blocks_heads_outside", heads_outside);
  add("cpu_pages", vllm_tensors("LBHNC", {.blocks = blocks, .tokens = 32, .content = 64}, base));

  std::vector<TensorDesc> aliases = vllm_tensors("LBNHC", size, base);
  aliases.push_back(aliases[0]);
  aliases.back().name = "shares layer0";
  add("aliases", aliases);
  return cases;
}

}  // namespace flexkv::layout
