// PrefixIndex alone: match, insert and evict on trees of 10K to 10M blocks, and bytes per block.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>

#include "bench/suites.h"

namespace flexkv::bench {
namespace {

index::PrefixIndex::Options options_for(unsigned tier_count) {
  index::PrefixIndex::Options options;
  options.tier_count = tier_count;
  return options;
}

// A cache that holds `blocks` blocks of a shape.
class Tree : public Cache {
 public:
  Tree(const Shape& shape, std::uint32_t blocks, unsigned tier_count = 1)
      : Cache(options_for(tier_count), blocks + 4096) {
    // A conversation adds 512 blocks, less its part of the shared ones.
    const double own = kConversationBlocks - shape.shared_blocks * (1 - 1.0 / shape.group);
    conversations_ = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(blocks / own));
    const std::uint32_t first = shape.shared_blocks + shape.turn_blocks;
    for (std::uint32_t length = first; length <= kConversationBlocks; length += shape.turn_blocks) {
      for (std::uint64_t c = 0; c < conversations_; ++c) {
        Keys keys = conversation_keys(shape, c);
        keys.resize(length);
        visit(keys, tick());
      }
    }
  }

  std::uint64_t conversations() const { return conversations_; }
  Nanos tick() { return now_ += kMillisecond; }

 private:
  std::uint64_t conversations_ = 0;
  Nanos now_ = 0;
};

void bm_match(benchmark::State& state, const Shape& shape) {
  Tree tree(shape, static_cast<std::uint32_t>(state.range(0)));
  const auto hit_blocks = static_cast<std::uint32_t>(kConversationBlocks * state.range(1) / 100);
  Prng prng(1);
  std::vector<Keys> queries;
  const std::uint64_t query_count = std::min<std::uint64_t>(tree.conversations(), 2048);
  for (std::uint64_t i = 0; i < query_count; ++i) {
    Keys keys = conversation_keys(shape, prng.below(tree.conversations()));
    keys.resize(hit_blocks);
    append_keys(keys, prng.next() | 1, kConversationBlocks - hit_blocks);
    queries.push_back(std::move(keys));
  }
  std::vector<index::Slot> slots(kConversationBlocks);
  std::size_t next = 0;
  for (auto _ : state) {
    const Keys& keys = queries[next++ % queries.size()];
    const auto match = tree.index().match(keys, true, tree.tick());
    tree.index().collect(match.pin, 0, 0, std::span(slots).first(match.block_count));
    benchmark::DoNotOptimize(slots.data());
    tree.unpin(match.pin);
    if (match.block_count != hit_blocks) state.SkipWithError("wrong match");
  }
  state.counters["bytes/block"] =
      static_cast<double>(tree.index().memory_bytes()) / static_cast<double>(tree.index().block_count(0));
}

// 32 new blocks behind a matched conversation; what they replace is evicted outside the measured time.
void bm_insert(benchmark::State& state, const Shape& shape) {
  Tree tree(shape, static_cast<std::uint32_t>(state.range(0)));
  const std::uint64_t blocks = tree.index().block_count(0);
  Prng prng(2);
  Keys tail;
  for (auto _ : state) {
    Keys keys = conversation_keys(shape, prng.below(tree.conversations()));
    const auto known = tree.index().match(keys, true, tree.tick());
    tree.insert(known.pin, std::span(keys).subspan(known.block_count), tree.tick());
    tail.assign(1, next_key(keys.back(), prng.next()));
    append_keys(tail, 7, 31);
    const auto begin = std::chrono::steady_clock::now();
    tree.insert(known.pin, tail, tree.tick());
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    tree.unpin(known.pin);
    tree.evict(static_cast<std::uint32_t>(tree.index().block_count(0) - blocks), tree.tick());
  }
}

void bm_evict(benchmark::State& state, const Shape& shape) {
  const auto blocks = static_cast<std::uint32_t>(state.range(0));
  const auto count = static_cast<std::uint32_t>(state.range(1));
  Tree tree(shape, blocks);
  for (auto _ : state) {
    if (tree.evict(count, tree.tick()) != count) state.SkipWithError("nothing to evict");
  }
  state.counters["per_block"] = benchmark::Counter(
      static_cast<double>(count), benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void bm_memory(benchmark::State& state, const Shape& shape) {
  double bytes[3] = {};
  for (auto _ : state) {
    for (unsigned tiers = 1; tiers <= 2; ++tiers) {
      Tree tree(shape, static_cast<std::uint32_t>(state.range(0)), tiers);
      bytes[tiers] =
          static_cast<double>(tree.index().memory_bytes()) / static_cast<double>(tree.index().block_count(0));
    }
  }
  state.counters["bytes/block"] = bytes[1];
  state.counters["more_per_tier"] = bytes[2] - bytes[1];
}

}  // namespace

void register_index() {
  for (const Shape* shape : {&kFlat512, &kChat32, &kChat4}) {
    const std::string name = shape->name;
    auto named = [&](const char* what) { return what + ("/" + name); };
    benchmark::RegisterBenchmark(named("match").c_str(), [=](auto& state) { bm_match(state, *shape); })
        ->ArgNames({"blocks", "hit"})
        ->ArgsProduct({{10'000, 100'000, 1'000'000}, {0, 50, 100}});
    benchmark::RegisterBenchmark(named("insert32").c_str(), [=](auto& state) { bm_insert(state, *shape); })
        ->ArgName("blocks")
        ->Arg(1'000'000)
        ->UseManualTime();
    for (const auto& [blocks, count] : {std::pair(10'000, 32), std::pair(100'000, 32), std::pair(1'000'000, 32),
                                        std::pair(10'000'000, 32), std::pair(1'000'000, 1024)}) {
      benchmark::RegisterBenchmark(named("evict").c_str(), [=](auto& state) { bm_evict(state, *shape); })
          ->ArgNames({"blocks", "count"})
          ->Args({blocks, count})
          ->Iterations(blocks / 2 / count);  // half of the tree
    }
    benchmark::RegisterBenchmark(named("memory").c_str(), [=](auto& state) { bm_memory(state, *shape); })
        ->ArgName("blocks")
        ->Arg(1'000'000)
        ->Iterations(1);
  }
}

}  // namespace flexkv::bench
