// The conversation trace. `replay`: through the real node on virtual time, a lookup and a save per request, no data
// moved, one thread. Arguments: capacity in 512-token blocks; keys from tokens (0), or engine-made block hashes (1).
// Counters: requests a second, hit ratio of tokens, p50 and p99 in microseconds of get (keys and lookup) and put (save,
// its evictions, the commit, close).
// `policy`: what the policies keep of it, beside the offline optimum. `drives`: replay_drives_bench.cc.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <set>

#include "bench/suites.h"
#include "flexkv/key/namespace.h"
#include "flexkv/key/token_chain.h"
#include "flexkv/node/node.h"

namespace flexkv::bench {
namespace {

using Trace = std::vector<TraceRequest>;

constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kPerTraceBlock = kTraceBlockTokens / kBlockTokens;
constexpr std::uint64_t kSlotBytes = 4096;

// Answers every command with success as soon as the node has returned.
class InstantRanks final : public node::Outbox {
 public:
  bool send(node::AgentHandle, const proto::ToAgent& message) override {
    if (const auto* copy = std::get_if<proto::CopyCommand>(&message)) waiting_.push_back({copy->job, copy->job_blocks});
    return true;
  }
  void send(node::EngineHandle, const proto::JobResult&) override {}
  void answer(node::Node& node, node::AgentHandle agent, Nanos now) {
    for (const auto [job, blocks] : waiting_) node.on_report(agent, {job, proto::JobStatus::kDone, blocks}, now);
    waiting_.clear();
  }

 private:
  std::vector<std::pair<proto::JobId, std::uint32_t>> waiting_;
};

// What an engine has at hand before it asks: tokens, or the hashes that it has made of them.
class Prompt {
 public:
  Prompt(const TraceRequest& request, bool engine_hashes) : block_count_(request.tokens / kBlockTokens) {
    for (std::uint32_t block = 0; block < block_count_; ++block) {
      const std::uint32_t trace_block = request.blocks[block / kPerTraceBlock];
      const std::uint32_t part = block % kPerTraceBlock;
      if (engine_hashes) {
        std::array<std::uint64_t, 4> hash;
        for (std::uint64_t i = 0; i < 4; ++i) hash[i] = Prng::mix(std::uint64_t{trace_block} << 16 | part << 2 | i);
        hashes_.push_back(hash);
      } else {
        for (std::uint32_t i = 0; i < kBlockTokens; ++i) {
          tokens_.push_back(trace_token(trace_block, part * kBlockTokens + i));
        }
      }
    }
  }
  std::uint32_t block_count() const { return block_count_; }
  void append_keys(const key::Root& root, Keys& keys) const {
    for (const auto& hash : hashes_) keys.push_back(key::fold_engine_hash(root, std::as_bytes(std::span(hash))));
    if (!tokens_.empty()) key::TokenChain(root, kBlockTokens).append(tokens_, keys);
  }

 private:
  const std::uint32_t block_count_;
  std::vector<std::array<std::uint64_t, 4>> hashes_;
  std::vector<std::int32_t> tokens_;
};

void bm_replay(benchmark::State& state, const Trace& trace) {
  const std::array<std::uint8_t, 32> secret{1, 2, 3};
  const key::Root root = key::NamespaceBuilder(secret).add(key::Field::kModel, std::string_view("bench")).finish();
  for (auto _ : state) {
    InstantRanks ranks;
    node::NodeOptions options;
    options.pool_bytes = static_cast<std::uint64_t>(state.range(0)) * kPerTraceBlock * kSlotBytes;
    node::Node node(options, ranks);
    const auto engine = node.attach_client({"engine", 1, "bench", {}}).value();
    const auto agent = node.attach_agent({"engine", 0, 1, {}, kSlotBytes, 1U << 20, "none"}).value();
    double queried = 0;
    double hit = 0;
    std::uint64_t id = 0;
    std::vector<Nanos> gets;
    std::vector<Nanos> puts;
    Keys keys;
    Nanos busy = 0;
    for (const TraceRequest& request : trace) {
      ++id;
      const auto now = static_cast<Nanos>(request.seconds * kSecond);
      const Prompt prompt(request, state.range(1) != 0);
      proto::TransferRequest save{true, true, id, id, prompt.block_count(), {}, 0, {}};
      save.device_blocks.resize(prompt.block_count());

      const Nanos begin = monotonic_now();
      keys.clear();
      prompt.append_keys(root, keys);
      const auto found = node.lookup(engine, id, 0, keys, now);
      const Nanos middle = monotonic_now();
      (void)node.save(engine, save, now);
      ranks.answer(node, agent, now);
      node.close_sequence(engine, id);
      const Nanos end = monotonic_now();

      gets.push_back(middle - begin);
      puts.push_back(end - middle);
      busy += end - begin;
      queried += request.tokens;
      hit += std::uint64_t{found.matched_blocks} * kBlockTokens;
    }
    state.SetIterationTime(static_cast<double>(busy) / kSecond);
    state.counters["requests/s"] = static_cast<double>(trace.size()) * kSecond / static_cast<double>(busy);
    state.counters["hit_%"] = 100 * hit / queried;
    state.counters["get_p50_us"] = percentile_us(gets, 0.5);
    state.counters["get_p99_us"] = percentile_us(gets, 0.99);
    state.counters["put_p50_us"] = percentile_us(puts, 0.5);
    state.counters["put_p99_us"] = percentile_us(puts, 0.99);
  }
}

// ---- policies ------------------------------------------------------------------------------------------------------

// The index alone, in blocks of 512 tokens. Arguments: capacity in blocks.
void bm_policy(benchmark::State& state, const Trace& trace, index::PolicyKind kind, unsigned ghosts_per_block) {
  const auto capacity = static_cast<std::uint32_t>(state.range(0));
  index::PrefixIndex::Options options;
  options.policy[0].kind = kind;
  options.ghost_count_max = std::size_t{capacity} * ghosts_per_block;
  for (auto _ : state) {
    Cache cache(options, capacity);
    double hits = 0;
    double all = 0;
    Keys keys;
    for (const TraceRequest& request : trace) {
      keys.clear();
      for (const std::uint32_t block : request.blocks) {
        keys.push_back({Prng::mix(block + 1), Prng::mix(~std::uint64_t{block})});
      }
      const std::uint32_t found = cache.visit(keys, static_cast<Nanos>(request.seconds * kSecond));
      hits += std::min(request.tokens, found * kTraceBlockTokens);
      all += request.tokens;
    }
    state.counters["hit_%"] = 100 * hits / all;
  }
}

// Belady: of all blocks, those used again soonest stay; a block never used again is not kept. A block is used whenever
// one behind it is, so this takes leaves first by itself.
void bm_optimum(benchmark::State& state, const Trace& trace) {
  const auto capacity = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) {
    std::map<std::uint32_t, std::vector<std::uint32_t>> uses;  // of a block: requests, last first
    for (std::size_t i = trace.size(); i-- > 0;) {
      for (const auto block : trace[i].blocks) uses[block].push_back(static_cast<std::uint32_t>(i));
    }
    std::set<std::pair<std::uint32_t, std::uint32_t>> held;  // (next use, block)
    double hits = 0;
    double all = 0;
    for (std::uint32_t i = 0; i < trace.size(); ++i) {
      std::uint32_t matched = 0;
      bool matching = true;
      for (const auto block : trace[i].blocks) {
        auto& next = uses[block];
        matching = matching && held.contains({i, block});
        matched += matching ? 1U : 0U;
        held.erase({i, block});
        next.pop_back();
        if (!next.empty()) held.insert({next.back(), block});
      }
      while (held.size() > capacity) held.erase(std::prev(held.end()));
      hits += std::min(trace[i].tokens, matched * kTraceBlockTokens);
      all += trace[i].tokens;
    }
    state.counters["hit_%"] = 100 * hits / all;
  }
}

struct NamedPolicy {
  const char* name;
  index::PolicyKind kind;
  unsigned ghosts_per_block;
};
constexpr NamedPolicy kPolicies[] = {{"adaptive_4_ghosts", index::PolicyKind::kAdaptive, 4},
                                     {"adaptive_1_ghost", index::PolicyKind::kAdaptive, 1},
                                     {"adaptive_no_ghosts", index::PolicyKind::kAdaptive, 0},
                                     {"lru", index::PolicyKind::kLru, 0},
                                     {"lru_60_s_a_hit", index::PolicyKind::kHitReward, 0},
                                     {"lfu", index::PolicyKind::kLfu, 0},
                                     {"slru", index::PolicyKind::kSlru, 0},
                                     {"fifo", index::PolicyKind::kFifo, 0},
                                     {"filo", index::PolicyKind::kFilo, 0},
                                     {"mru", index::PolicyKind::kMru, 0},
                                     {"s3fifo_1_ghost", index::PolicyKind::kS3Fifo, 1}};

}  // namespace

Status register_replay(const std::string& trace_path, const Options& options) {
  auto requests = read_trace(trace_path);
  if (!requests) return requests.error();
  const auto trace = std::make_shared<const Trace>(std::move(requests).value());
  const auto hosts = options.counts("host-blocks", {10'000});
  const auto ssds = options.counts("ssd-blocks", {100'000});
  const auto drive_gbs = options.positive("drive-gbs", 6);
  if (!hosts) return hosts.error();
  if (!ssds) return ssds.error();
  if (!drive_gbs) return drive_gbs.error();
  DriveReplay drives{{{2'000, 30'000}, {10'000, 30'000}, {10'000, 100'000}, {10'000, 200'000}, {50'000, 200'000}},
                     drive_gbs.value()};
  const bool only_drives = options.has("host-blocks") || options.has("ssd-blocks");
  if (only_drives) {
    drives.sizes.clear();
    for (const auto host : hosts.value()) {
      for (const auto ssd : ssds.value()) drives.sizes.emplace_back(host, ssd);
    }
  }
  if (auto added = register_replay_drives(trace, drives); !added || only_drives) return added;
  benchmark::RegisterBenchmark("replay", [=](auto& state) { bm_replay(state, *trace); })
      ->ArgNames({"capacity", "engine_hashes"})
      ->ArgsProduct({{1'000, 10'000, 50'000, 190'000}, {0, 1}})
      ->UseManualTime()
      ->Iterations(1)
      ->Unit(benchmark::kMillisecond);
  const auto add_policy = [](const std::string& name, auto run) {
    benchmark::RegisterBenchmark(("policy/" + name).c_str(), run)
        ->ArgName("capacity")
        ->ArgsProduct({{1'000, 5'000, 10'000, 30'000, 50'000}})
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
  };
  for (const NamedPolicy& policy : kPolicies) {
    add_policy(policy.name, [=](auto& state) { bm_policy(state, *trace, policy.kind, policy.ghosts_per_block); });
  }
  add_policy("optimum", [=](auto& state) { bm_optimum(state, *trace); });
  return {};
}

}  // namespace flexkv::bench
