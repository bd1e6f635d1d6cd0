// The conversation trace through the real node on virtual time: a lookup and a save per request, no data moved, one
// thread. FLEXKV_TRACE names the trace. Arguments: capacity in 512-token blocks; keys from tokens (0), or engine-made
// block hashes (1). Counters: requests a second, hit ratio of tokens, p50 and p99 of each call in microseconds.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstring>

#include "bench/workloads.h"
#include "flexkv/key/namespace.h"
#include "flexkv/key/token_chain.h"
#include "flexkv/node/node.h"

namespace flexkv::bench {
namespace {

constexpr std::uint32_t kBlockTokens = 16;
constexpr std::uint32_t kPerTraceBlock = kTraceBlockTokens / kBlockTokens;
constexpr std::uint64_t kSlotBytes = 4096;

// Answers every command with success as soon as the node has returned.
class InstantRanks final : public node::Outbox {
 public:
  bool send(node::AgentHandle, const proto::ToAgent& message) override {
    if (const auto* copy = std::get_if<proto::CopyCommand>(&message)) waiting_.push_back(copy->job);
    return true;
  }
  void send(node::EngineHandle, const proto::JobResult&) override {}
  void answer(node::Node& node, node::AgentHandle agent, Nanos now) {
    for (const auto job : waiting_) node.on_report(agent, {job, proto::JobStatus::kDone}, now);
    waiting_.clear();
  }

 private:
  std::vector<proto::JobId> waiting_;
};

double percentile(std::vector<Nanos>& values, double share) {
  if (values.empty()) return 0;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return static_cast<double>(*at) / kMicrosecond;
}

void replay(benchmark::State& state) {
  const auto trace = read_trace(trace_path());
  const auto capacity = static_cast<std::uint64_t>(state.range(0)) * kPerTraceBlock;
  const bool engine_hashes = state.range(1) != 0;
  const std::array<std::uint8_t, 32> secret{1, 2, 3};
  const key::Root root = key::NamespaceBuilder(secret).add(key::Field::kModel, std::string_view("bench")).finish();

  for (auto _ : state) {
    state.PauseTiming();
    InstantRanks ranks;
    node::NodeOptions options;
    options.pool_bytes = capacity * kSlotBytes;
    auto node = std::make_unique<node::Node>(options, ranks);
    proto::ClientHello client{"engine", 1, "bench", {}};
    const auto engine = node->attach_client(client).value();
    const auto agent = node->attach_agent({"engine", 0, 1, {}, kSlotBytes, 1U << 20, "none"}).value();
    std::uint64_t queried = 0;
    std::uint64_t hit = 0;
    std::uint64_t id = 0;
    std::vector<Nanos> lookups;
    std::vector<Nanos> saves;
    std::vector<Nanos> folds;
    std::vector<std::int32_t> tokens;
    Keys hashes;
    Keys keys;
    state.ResumeTiming();
    Nanos busy = 0;
    for (const auto& request : trace) {
      ++id;
      const std::uint32_t blocks = request.tokens / kBlockTokens;
      const auto now = static_cast<Nanos>(request.seconds * kSecond);
      // What an engine has at hand before it asks: not part of the time.
      tokens.clear();
      std::vector<std::array<std::byte, 32>> engine_made;
      for (std::uint32_t block = 0; block < blocks; ++block) {
        const std::uint32_t trace_block = request.blocks[block / kPerTraceBlock];
        if (engine_hashes) {
          std::array<std::byte, 32> hash{};
          for (std::size_t word = 0; word < 4; ++word) {
            const auto value = Prng::mix(std::uint64_t{trace_block} << 16 | (block % kPerTraceBlock) << 2 | word);
            std::memcpy(hash.data() + word * 8, &value, 8);
          }
          engine_made.push_back(hash);
        } else {
          for (std::uint32_t i = 0; i < kBlockTokens; ++i) {
            tokens.push_back(trace_token(trace_block, block % kPerTraceBlock * kBlockTokens + i));
          }
        }
      }
      keys.clear();
      const Nanos begin = monotonic_now();
      if (engine_hashes) {
        for (const auto& hash : engine_made) keys.push_back(key::fold_engine_hash(root, hash));
      } else {
        key::TokenChain(root, kBlockTokens).append(tokens, keys);
      }
      const Nanos folded = monotonic_now();
      const auto found = node->lookup(engine, id, 0, keys, now);
      const Nanos looked = monotonic_now();
      proto::TransferRequest save{true, true, id, id, blocks, {}, 0, {}};
      save.device_blocks.resize(blocks);
      const Nanos before_save = monotonic_now();
      (void)node->save(engine, save, now);
      ranks.answer(*node, agent, now);
      node->close_sequence(engine, id);
      const Nanos end = monotonic_now();
      folds.push_back(folded - begin);
      lookups.push_back(looked - folded);
      saves.push_back(end - before_save);
      busy += (looked - begin) + (end - before_save);
      queried += request.tokens;
      hit += std::uint64_t{found.matched_blocks} * kBlockTokens;
    }
    state.SetIterationTime(static_cast<double>(busy) / kSecond);
    state.counters["requests/s"] = static_cast<double>(trace.size()) * kSecond / static_cast<double>(busy);
    state.counters["hit_%"] = 100.0 * static_cast<double>(hit) / static_cast<double>(queried);
    state.counters["keys_p50_us"] = percentile(folds, 0.5);
    state.counters["lookup_p50_us"] = percentile(lookups, 0.5);
    state.counters["lookup_p99_us"] = percentile(lookups, 0.99);
    state.counters["save_p50_us"] = percentile(saves, 0.5);
    state.counters["save_p99_us"] = percentile(saves, 0.99);
  }
}

}  // namespace
}  // namespace flexkv::bench

int main(int argc, char** argv) {
  if (!flexkv::bench::trace_path().empty()) {
    benchmark::RegisterBenchmark("replay", flexkv::bench::replay)
        ->ArgNames({"capacity", "engine_hashes"})
        ->ArgsProduct({{1000, 10000, 50000, 190000}, {0, 1}})
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond);
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
