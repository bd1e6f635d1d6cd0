// Keys from tokens, and the conversation trace with them: get then put per request, no data moved.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <ctime>

#include "flexkv/index/prefix_index.h"
#include "flexkv/key/token_chain.h"
#include "workloads.h"

namespace flexkv::bench {
namespace {

using index::PrefixIndex;
using index::Slot;

key::Root bench_root() {
  const std::array<std::uint8_t, 32> secret{};
  return key::NamespaceBuilder(secret).add(key::Field::kModel, "bench").finish();
}

void bm_token_chain(benchmark::State& state) {
  const auto tokens_per_block = static_cast<std::size_t>(state.range(0));
  std::vector<std::int32_t> tokens(12'288);
  for (std::uint32_t i = 0; i < tokens.size(); ++i) tokens[i] = trace_token(1, i);
  const key::Root root = bench_root();
  Keys keys;
  for (auto _ : state) {
    keys.clear();
    key::TokenChain(root, tokens_per_block).append(tokens, keys);
    benchmark::DoNotOptimize(keys.data());
  }
  const auto blocks = static_cast<double>(tokens.size() / tokens_per_block);
  state.counters["per_block"] =
      benchmark::Counter(blocks, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(tokens.size()), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(bm_token_chain)->ArgName("tokens_per_block")->Arg(16)->Arg(64)->Arg(256);

void bm_fold_engine_hash(benchmark::State& state) {
  const key::Root root = bench_root();
  std::array<std::byte, 32> hash{};
  for (auto _ : state) {
    const key::BlockKey folded = key::fold_engine_hash(root, hash);
    hash[0] = static_cast<std::byte>(folded.low);
  }
}
BENCHMARK(bm_fold_engine_hash);

// Of this thread: requests/s are in CPU time, so that other work on the machine does not count.
double cpu_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

double micros(std::vector<double>& seconds, double quantile) {
  std::sort(seconds.begin(), seconds.end());
  return seconds[static_cast<std::size_t>(static_cast<double>(seconds.size() - 1) * quantile)] * 1e6;
}

// Replays the trace with 16-token blocks. `from_tokens`: keys are computed inside the measured get, once per request.
void replay(const std::vector<TraceRequest>& trace, index::PolicyKind kind, std::uint32_t capacity_512,
            bool from_tokens) {
  constexpr std::uint32_t kTokens = 16;
  const std::uint32_t capacity = capacity_512 * (kTraceBlockTokens / kTokens);
  const key::Root root = bench_root();
  PrefixIndex::Options options;
  options.policy[0].kind = kind;
  options.ghost_count_max = capacity;
  PrefixIndex index(options);
  std::vector<Slot> free(capacity), slots, rejected;
  for (Slot i = 0; i < capacity; ++i) free[i] = i;
  std::vector<PrefixIndex::Evicted> evicted;
  std::vector<std::int32_t> tokens;
  std::vector<double> gets, puts;
  Keys keys;
  double hits = 0, all = 0, total = 0;
  for (const TraceRequest& request : trace) {
    const auto now = static_cast<Nanos>(request.seconds * 1e9);
    tokens.clear();
    for (const auto block : request.blocks) {
      for (std::uint32_t j = 0; j < kTraceBlockTokens && tokens.size() < request.tokens; ++j) {
        tokens.push_back(trace_token(block, j));
      }
    }
    keys.clear();
    if (!from_tokens) key::TokenChain(root, kTokens).append(tokens, keys);

    const double cpu_begin = cpu_seconds();
    const auto begin = std::chrono::steady_clock::now();
    if (from_tokens) key::TokenChain(root, kTokens).append(tokens, keys);
    auto match = index.match(keys, true, now);
    slots.resize(match.block_count);
    index.collect(match.pin, 0, 0, slots);
    const auto middle = std::chrono::steady_clock::now();
    auto missing = std::span(keys).subspan(match.block_count);
    evicted.clear();
    if (missing.size() > free.size()) {
      index.evict(0, static_cast<std::uint32_t>(missing.size() - free.size()), now, evicted);
      for (const auto& e : evicted) free.push_back(e.slot);
    }
    missing = missing.first(std::min(missing.size(), free.size()));
    slots.assign(free.end() - static_cast<std::ptrdiff_t>(missing.size()), free.end());
    free.resize(free.size() - missing.size());
    index.insert(match.pin, 0, missing, slots, now, rejected);
    index.unpin(match.pin, evicted);
    const auto end = std::chrono::steady_clock::now();

    hits += match.block_count * kTokens;
    all += request.tokens;
    gets.push_back(std::chrono::duration<double>(middle - begin).count());
    puts.push_back(std::chrono::duration<double>(end - middle).count());
    total += cpu_seconds() - cpu_begin;
  }
  std::printf("%9u  %-9s %-7s %6.2f %10.0f   %6.1f / %6.1f   %6.1f / %6.1f\n", capacity_512,
              kind == index::PolicyKind::kLru ? "lru" : "adaptive", from_tokens ? "tokens" : "keys", 100 * hits / all,
              static_cast<double>(trace.size()) / total, micros(gets, 0.5), micros(gets, 0.99), micros(puts, 0.5),
              micros(puts, 0.99));
}

}  // namespace
}  // namespace flexkv::bench

int main(int argc, char** argv) {
  using flexkv::index::PolicyKind;
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  const auto trace = flexkv::bench::read_trace(flexkv::bench::trace_path());
  if (trace.empty()) return 0;
  std::printf(
      "\nTrace, 16-token blocks, one thread\n capacity  policy    from     hit %%  req/CPU s    get us p50 / p99    "
      "put us p50 / p99\n");
  for (const bool from_tokens : {true, false}) {
    for (const auto kind : {PolicyKind::kLru, PolicyKind::kAdaptive}) {
      for (const std::uint32_t capacity : {1'000U, 10'000U, 50'000U, 190'000U}) {
        flexkv::bench::replay(trace, kind, capacity, from_tokens);
      }
    }
  }
}
