// PrefixIndex alone: match, insert and evict on trees of 10K to 10M blocks, bytes per block, and how policies fare on
// the conversation trace against the offline optimum.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <set>

#include "flexkv/index/prefix_index.h"
#include "workloads.h"

namespace flexkv::bench {
namespace {

using index::PinId;
using index::PrefixIndex;
using index::Slot;
using Evicted = PrefixIndex::Evicted;

PrefixIndex::Options options_for(index::PolicyKind kind, unsigned tier_count = 1) {
  PrefixIndex::Options options;
  options.tier_count = tier_count;
  for (auto& policy : options.policy) policy.kind = kind;
  return options;
}

// Owns an index that holds `blocks` blocks of a shape.
class Tree {
 public:
  Tree(const Shape& shape, std::uint32_t blocks, unsigned tier_count = 1)
      : shape_(shape), index_(options_for(index::PolicyKind::kAdaptive, tier_count)), free_(blocks + 4096) {
    for (Slot i = 0; i < free_.size(); ++i) free_[i] = i;
    // A conversation adds 512 blocks, less its part of the shared ones.
    const double own = kConversationBlocks - shape.shared_blocks * (1 - 1.0 / shape.group);
    conversations_ = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(blocks / own));
    const std::uint32_t first = shape.shared_blocks + shape.turn_blocks;
    for (std::uint32_t length = first; length <= kConversationBlocks; length += shape.turn_blocks) {
      for (std::uint64_t c = 0; c < conversations_; ++c) {
        Keys keys = conversation_keys(shape, c);
        keys.resize(length);
        put(keys);
      }
    }
  }

  PrefixIndex& index() { return index_; }
  std::uint64_t conversations() const { return conversations_; }
  Nanos tick() { return now_ += 1'000'000; }

  PinId put(const Keys& keys, bool keep_pin = false) {
    const auto match = index_.match(keys, true, tick());
    insert(match.pin, std::span(keys).subspan(match.block_count));
    if (!keep_pin) index_.unpin(match.pin, evicted_);
    return match.pin;
  }
  void insert(PinId pin, std::span<const key::BlockKey> keys) {
    slots_.resize(keys.size());
    for (auto& slot : slots_) slot = free_.back(), free_.pop_back();
    index_.insert(pin, 0, keys, slots_, tick(), free_);
  }
  std::uint32_t evict(std::uint32_t count) {
    evicted_.clear();
    const std::uint32_t taken = index_.evict(0, count, tick(), evicted_);
    for (const auto& evicted : evicted_) free_.push_back(evicted.slot);
    return taken;
  }

 private:
  const Shape shape_;
  PrefixIndex index_;
  std::vector<Slot> free_;
  std::vector<Slot> slots_;
  std::vector<Evicted> evicted_;
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
  std::vector<Slot> slots(kConversationBlocks);
  std::vector<Evicted> freed;
  std::size_t next = 0;
  for (auto _ : state) {
    const Keys& keys = queries[next++ % queries.size()];
    const auto match = tree.index().match(keys, true, tree.tick());
    tree.index().collect(match.pin, 0, 0, std::span(slots).first(match.block_count));
    benchmark::DoNotOptimize(slots.data());
    tree.index().unpin(match.pin, freed);
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
  std::vector<Evicted> freed;
  Keys tail;
  for (auto _ : state) {
    Keys keys = conversation_keys(shape, prng.below(tree.conversations()));
    const PinId pin = tree.put(keys, true);
    tail.assign(1, next_key(keys.back(), prng.next()));
    append_keys(tail, 7, 31);
    const auto begin = std::chrono::steady_clock::now();
    tree.insert(pin, tail);
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    tree.index().unpin(pin, freed);
    tree.evict(static_cast<std::uint32_t>(tree.index().block_count(0) - blocks));
  }
}

void bm_evict(benchmark::State& state, const Shape& shape) {
  const auto blocks = static_cast<std::uint32_t>(state.range(0));
  const auto count = static_cast<std::uint32_t>(state.range(1));
  Tree tree(shape, blocks);
  for (auto _ : state) {
    if (tree.evict(count) != count) state.SkipWithError("nothing to evict");
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

// ---- the trace, in blocks of 512 tokens: hit ratios of policies
// ------------------------------------------------------

const std::vector<TraceRequest>& trace() {
  static const auto requests = read_trace(trace_path());
  return requests;
}

double hit_percent(std::uint32_t capacity, index::PolicyKind kind, double ghosts) {
  auto options = options_for(kind);
  options.ghost_count_max = static_cast<std::size_t>(capacity * ghosts);
  PrefixIndex index(options);
  std::vector<Slot> free(capacity), slots, rejected;
  for (Slot i = 0; i < capacity; ++i) free[i] = i;
  std::vector<Evicted> evicted;
  double hits = 0, all = 0;
  for (const TraceRequest& request : trace()) {
    const auto now = static_cast<Nanos>(request.seconds * 1e9);
    Keys keys;
    for (const std::uint32_t block : request.blocks)
      keys.push_back({Prng::mix(block + 1), Prng::mix(~std::uint64_t{block})});
    const auto match = index.match(keys, true, now);
    hits += std::min(request.tokens, match.block_count * kTraceBlockTokens);
    all += request.tokens;
    auto missing = std::span(keys).subspan(match.block_count);
    evicted.clear();
    if (missing.size() > free.size())
      index.evict(0, static_cast<std::uint32_t>(missing.size() - free.size()), now, evicted);
    for (const auto& e : evicted) free.push_back(e.slot);
    missing = missing.first(std::min(missing.size(), free.size()));
    slots.assign(free.end() - static_cast<std::ptrdiff_t>(missing.size()), free.end());
    free.resize(free.size() - missing.size());
    index.insert(match.pin, 0, missing, slots, now, rejected);
    index.unpin(match.pin, evicted);
  }
  return 100 * hits / all;
}

// Belady: of all blocks, those used again soonest stay; a block never used again is not kept. A block is used whenever
// one behind it is, so this takes leaves first by itself.
double optimal_hit_percent(std::uint32_t capacity) {
  std::map<std::uint32_t, std::vector<std::uint32_t>> uses;  // of a block: requests, last first
  for (std::size_t i = trace().size(); i-- > 0;) {
    for (const auto block : trace()[i].blocks) uses[block].push_back(static_cast<std::uint32_t>(i));
  }
  std::set<std::pair<std::uint32_t, std::uint32_t>> held;  // (next use, block)
  double hits = 0, all = 0;
  for (std::uint32_t i = 0; i < trace().size(); ++i) {
    std::uint32_t matched = 0;
    bool matching = true;
    for (const auto block : trace()[i].blocks) {
      auto& next = uses[block];
      matching = matching && held.contains({i, block});
      matched += matching ? 1U : 0U;
      held.erase({i, block});
      next.pop_back();
      if (!next.empty()) held.insert({next.back(), block});
    }
    while (held.size() > capacity) held.erase(std::prev(held.end()));
    hits += std::min(trace()[i].tokens, matched * kTraceBlockTokens);
    all += trace()[i].tokens;
  }
  return 100 * hits / all;
}

void print_policies() {
  using index::PolicyKind;
  struct Row {
    const char* name;
    PolicyKind kind;
    double ghosts;  // per block
  };
  const Row rows[] = {{"lru", PolicyKind::kLru, 0},
                      {"lru + 60 s a hit", PolicyKind::kHitReward, 0},
                      {"lfu", PolicyKind::kLfu, 0},
                      {"slru", PolicyKind::kSlru, 0},
                      {"fifo", PolicyKind::kFifo, 0},
                      {"filo", PolicyKind::kFilo, 0},
                      {"mru", PolicyKind::kMru, 0},
                      {"s3fifo, 1 ghost a block", PolicyKind::kS3Fifo, 1},
                      {"adaptive, no ghosts", PolicyKind::kAdaptive, 0},
                      {"adaptive, 1 ghost a block", PolicyKind::kAdaptive, 1},
                      {"adaptive, 4 ghosts a block", PolicyKind::kAdaptive, 4}};
  const std::uint32_t capacities[] = {1'000, 5'000, 10'000, 30'000, 50'000};
  std::printf("\nHit %% of tokens on the trace, by capacity in blocks of 512 tokens\n%-28s", "");
  for (const auto capacity : capacities) std::printf("%9u", capacity);
  for (const Row& row : rows) {
    std::printf("\n%-28s", row.name);
    for (const auto capacity : capacities) std::printf("%9.2f", hit_percent(capacity, row.kind, row.ghosts));
  }
  std::printf("\n%-28s", "offline optimum");
  for (const auto capacity : capacities) std::printf("%9.2f", optimal_hit_percent(capacity));
  std::printf("\n");
}

void register_all() {
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

}  // namespace
}  // namespace flexkv::bench

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  flexkv::bench::register_all();
  benchmark::RunSpecifiedBenchmarks();
  if (!flexkv::bench::trace().empty()) flexkv::bench::print_policies();
}
