// The data path of host memory: copies between device blocks of the `host` device and the pool, for the layouts that
// engines use, and how long a pool takes to start. round_trip_bench.cc has what goes through node, agent and client.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>

#include "bench/suites.h"
#include "flexkv/device/host_device.h"
#include "flexkv/layout/example_tensors.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::bench {
namespace {

constexpr std::uint64_t kGiB = 1U << 30;

// Memory that stays from one benchmark to the next, so that only the first of a size pays for its pages.
std::span<std::byte> arena(unsigned which, std::uint64_t bytes) {
  static std::optional<memory::HostRegion> regions[2];
  auto& region = regions[which];
  if (!region || region->bytes() < bytes) {
    region.reset();
    auto made = memory::HostRegion::create(bytes, {.huge_pages = false});
    if (!made || !made.value().touch()) return {};
    region = std::move(made).value();
  }
  return {region->data(), bytes};
}

// One rank's part of a model: 8 layers with 2 KV heads of 128 in bfloat16, or MLA's 576 a token.
struct LayoutCase {
  const char* name;
  std::vector<layout::TensorDesc> (*tensors)(std::uint32_t blocks, std::uint32_t tokens, std::uint64_t base);
};

template <char... order>
std::vector<layout::TensorDesc> vllm(std::uint32_t blocks, std::uint32_t tokens, std::uint64_t base) {
  constexpr char kOrder[] = {order...};
  return layout::vllm_tensors({kOrder, sizeof kOrder}, {8, blocks, 2, tokens, 256, 2}, base);
}

// A (block, head) page holds its keys, then its values; float32, half the layers for the same bytes.
std::vector<layout::TensorDesc> cpu_pages(std::uint32_t blocks, std::uint32_t tokens, std::uint64_t base) {
  return layout::vllm_tensors("LBHNC", {4, blocks, 2, tokens, 256, 4}, base);
}

std::vector<layout::TensorDesc> mla(std::uint32_t blocks, std::uint32_t tokens, std::uint64_t base) {
  std::vector<layout::TensorDesc> tensors;
  for (std::uint64_t layer = 0; layer < 8; ++layer) {
    tensors.push_back(layout::dense_tensor("mla" + std::to_string(layer), base + layer * blocks * tokens * 576 * 2, 2,
                                           {blocks, tokens, 576}));
  }
  return tensors;
}

constexpr LayoutCase kLayouts[] = {{"LBNHC", vllm<'L', 'B', 'N', 'H', 'C'>},
                                   {"LBHNC", vllm<'L', 'B', 'H', 'N', 'C'>},
                                   {"BLNHC", vllm<'B', 'L', 'N', 'H', 'C'>},
                                   {"MLA", mla},
                                   {"cpu_pages", cpu_pages}};

// All blocks of the device memory, in random order, to random slots; in turn with one memcpy of as many bytes.
void bm_copy(benchmark::State& state, const LayoutCase& layout_case, device::Direction direction) {
  const auto tokens = static_cast<std::uint32_t>(state.range(0));
  const auto blocks = static_cast<std::uint32_t>(state.range(1));
  const std::uint64_t shard =
      layout::BlockLayout::derive(layout_case.tensors(1, tokens, kGiB), 1).value().shard_bytes();
  const std::uint64_t bytes = shard * blocks;
  const std::span<std::byte> engine = arena(0, bytes);
  const std::span<std::byte> pool = arena(1, bytes);
  if (engine.empty() || pool.empty()) return state.SkipWithError("too little memory");
  const auto base = reinterpret_cast<std::uint64_t>(engine.data());
  const auto layout = layout::BlockLayout::derive(layout_case.tensors(blocks, tokens, base), blocks).value();
  const auto device = device::open_host_device().value();
  const auto stream = device->open_stream(direction, layout, pool).value();
  std::vector<device::BlockCopy> copies;
  for (std::uint32_t block = 0; block < blocks; ++block) copies.push_back({block, block * shard});
  Prng prng(1);
  for (std::size_t i = blocks; i > 1; --i) std::swap(copies[i - 1].host_offset, copies[prng.below(i)].host_offset);
  for (std::size_t i = blocks; i > 1; --i) std::swap(copies[i - 1], copies[prng.below(i)]);

  const bool to_host = direction == device::Direction::kToHost;
  Nanos copying = 0;
  Nanos plain = 0;
  std::uint64_t rounds = 0;
  for (auto _ : state) {
    const Nanos begin = monotonic_now();
    if (!stream->submit(copies) || !stream->synchronize()) return state.SkipWithError("copy failed");
    const Nanos middle = monotonic_now();
    std::memcpy(to_host ? pool.data() : engine.data(), to_host ? engine.data() : pool.data(), bytes);
    benchmark::ClobberMemory();
    plain += monotonic_now() - middle;
    copying += middle - begin;
    ++rounds;
    state.SetIterationTime(static_cast<double>(middle - begin) / kSecond);
  }
  // Bytes a nanosecond are GB/s.
  state.counters["GB/s"] = static_cast<double>(bytes * rounds) / static_cast<double>(copying);
  state.counters["memcpy_GB/s"] = static_cast<double>(bytes * rounds) / static_cast<double>(plain);
}

void bm_pool_start(benchmark::State& state, bool huge_pages) {
  for (auto _ : state) {
    auto pool = memory::HostRegion::create(kGiB, {.huge_pages = huge_pages});
    if (!pool) return state.SkipWithError(pool.error().message.c_str());
    if (!pool.value().touch()) return state.SkipWithError("touch failed");
    state.PauseTiming();
    state.SetLabel(pool.value().description());
    { const auto gone = std::move(pool).value(); }
    state.ResumeTiming();
  }
}

}  // namespace

void register_host() {
  for (const LayoutCase& layout_case : kLayouts) {
    for (const auto direction : {device::Direction::kToHost, device::Direction::kToDevice}) {
      const std::string name = std::string("copy/") + layout_case.name +
                               (direction == device::Direction::kToHost ? "/to_host" : "/to_device");
      // The CPU backend's blocks are multiples of 32 tokens.
      const std::int64_t smallest = layout_case.tensors == cpu_pages ? 32 : 16;
      benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) { bm_copy(state, layout_case, direction); })
          ->ArgNames({"tokens", "blocks"})
          ->ArgsProduct({{smallest, 64, 128}, {1, 32, 1000}})
          ->UseManualTime()
          ->MinTime(0.05);
    }
  }
  for (const bool huge_pages : {false, true}) {
    benchmark::RegisterBenchmark(huge_pages ? "pool_start_1_GiB/huge_pages" : "pool_start_1_GiB/normal_pages",
                                 [=](auto& state) { bm_pool_start(state, huge_pages); })
        ->Unit(benchmark::kMillisecond)
        ->UseRealTime()
        ->Iterations(1);
  }
  register_round_trips();
}

}  // namespace flexkv::bench
