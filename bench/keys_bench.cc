// Keys of blocks: from tokens, and from the hashes that an engine has made.
#include <benchmark/benchmark.h>
#include <xxhash.h>

#include <array>

#include "bench/suites.h"
#include "flexkv/key/token_chain.h"

namespace flexkv::bench {
namespace {

constexpr std::uint32_t kTokens = 12'288;

key::Root bench_root() {
  const std::array<std::uint8_t, 32> secret{};
  return key::NamespaceBuilder(secret).add(key::Field::kModel, "bench").finish();
}

void count(benchmark::State& state, std::size_t tokens_per_block) {
  const auto per_iteration = [](double amount, bool invert) {
    return benchmark::Counter(amount, invert
                                          ? benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert
                                          : benchmark::Counter::kIsIterationInvariantRate);
  };
  state.counters["per_block"] = per_iteration(static_cast<double>(kTokens / tokens_per_block), true);
  state.counters["tokens/s"] = per_iteration(kTokens, false);
}

void bm_token_chain(benchmark::State& state) {
  const auto tokens_per_block = static_cast<std::size_t>(state.range(0));
  std::vector<std::int32_t> tokens(kTokens);
  for (std::uint32_t i = 0; i < kTokens; ++i) tokens[i] = trace_token(1, i);
  const key::Root root = bench_root();
  Keys keys;
  for (auto _ : state) {
    keys.clear();
    key::TokenChain(root, tokens_per_block).append(tokens, keys);
    benchmark::DoNotOptimize(keys.data());
  }
  count(state, tokens_per_block);
}

// What the original does in place of the above: says how fast this machine is beside the one its figures come from.
void bm_original(benchmark::State& state) {
  const auto tokens_per_block = static_cast<std::size_t>(state.range(0));
  std::vector<std::int64_t> tokens(kTokens);
  for (std::uint32_t i = 0; i < kTokens; ++i) tokens[i] = trace_token(1, i);
  std::vector<std::uint64_t> hashes(kTokens / tokens_per_block);
  XXH64_state_t* chain = XXH64_createState();
  for (auto _ : state) {
    XXH64_reset(chain, 0);
    for (std::size_t block = 0; block < hashes.size(); ++block) {
      XXH64_update(chain, tokens.data() + block * tokens_per_block, tokens_per_block * sizeof(tokens[0]));
      hashes[block] = XXH64_digest(chain);
    }
    benchmark::DoNotOptimize(hashes.data());
  }
  XXH64_freeState(chain);
  count(state, tokens_per_block);
}

void bm_fold_engine_hash(benchmark::State& state) {
  const key::Root root = bench_root();
  std::vector<std::byte> hash(static_cast<std::size_t>(state.range(0)));
  for (auto _ : state) {
    const key::BlockKey folded = key::fold_engine_hash(root, hash);
    hash[0] = static_cast<std::byte>(folded.low);
  }
}

}  // namespace

void register_keys() {
  benchmark::RegisterBenchmark("keys", bm_token_chain)->ArgName("tokens_per_block")->Arg(16)->Arg(64)->Arg(256);
  benchmark::RegisterBenchmark("xxh64", bm_original)->ArgName("tokens_per_block")->Arg(16)->Arg(64);
  benchmark::RegisterBenchmark("fold", bm_fold_engine_hash)->ArgName("hash_bytes")->Arg(32)->Arg(64);
}

}  // namespace flexkv::bench
