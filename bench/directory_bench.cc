// The directory of a cluster: lookups in a replica of other nodes' blocks beside lookups in the node's own index that
// holds as many, and what a change costs in time and bytes, without Redis.
#include <benchmark/benchmark.h>

#include "bench/suites.h"
#include "flexkv/cluster/publisher.h"
#include "flexkv/cluster/replica.h"
#include "flexkv/cluster/wire.h"

namespace flexkv::bench {
namespace {

constexpr std::uint64_t kNodes = 8;
constexpr std::size_t kQueries = 2048;

std::uint64_t conversation_count(std::int64_t blocks) {
  return static_cast<std::uint64_t>(blocks) / kConversationBlocks;
}

std::vector<Keys> queries_for(std::uint64_t conversations) {
  Prng random(1);
  std::vector<Keys> queries;
  for (std::size_t i = 0; i < kQueries; ++i) {
    queries.push_back(conversation_keys(kFlat512, random.below(conversations)));
  }
  return queries;
}

std::vector<cluster::Residency> residencies_of(const Keys& keys) {
  std::vector<cluster::Residency> all;
  for (const key::BlockKey& key : keys) all.push_back({cluster::tag_of(key), 1});
  return all;
}

void bm_local(benchmark::State& state) {
  const std::uint64_t conversations = conversation_count(state.range(0));
  index::PrefixIndex::Options options;
  options.tier_count = 1;
  Cache cache(options, static_cast<std::uint32_t>(state.range(0)));
  Nanos now = 0;
  for (std::uint64_t c = 0; c < conversations; ++c) cache.visit(conversation_keys(kFlat512, c), ++now);
  const auto queries = queries_for(conversations);
  std::vector<index::Slot> slots(kConversationBlocks);
  std::size_t next = 0;
  for (auto _ : state) {
    const auto match = cache.index().match(queries[next++ % kQueries], true, ++now);
    cache.index().collect(match.pin, 0, 0, std::span(slots).first(match.block_count));
    benchmark::DoNotOptimize(slots.data());
    cache.unpin(match.pin);
    if (match.block_count != kConversationBlocks) state.SkipWithError("wrong match");
  }
}

// Each conversation is at one of the nodes.
void bm_replica(benchmark::State& state) {
  const std::uint64_t conversations = conversation_count(state.range(0));
  cluster::Replica replica(static_cast<std::uint64_t>(state.range(0)) + 1);
  for (std::uint64_t node = 1; node <= kNodes; ++node) replica.refresh(node, "", kSecond);
  for (std::uint64_t c = 0; c < conversations; ++c) {
    if (!replica.apply(1 + c % kNodes, 0, residencies_of(conversation_keys(kFlat512, c)))) {
      state.SkipWithError("no room");
    }
  }
  const auto queries = queries_for(conversations);
  std::vector<cluster::Replica::Holding> found;
  std::size_t next = 0;
  for (auto _ : state) {
    replica.lookup(0, queries[next++ % kQueries], 0, found);
    if (found.size() != 1 || found[0].blocks != kConversationBlocks) state.SkipWithError("wrong holdings");
  }
  const auto stats = replica.stats();
  state.counters["bytes/block"] = static_cast<double>(stats.memory_bytes) / static_cast<double>(stats.blocks);
}

// A node of that many blocks whose cache turns over: each new block pushes an old one out. Counts both as changes.
void bm_publish(benchmark::State& state) {
  const auto blocks = static_cast<std::uint64_t>(state.range(0));
  cluster::Publisher publisher{cluster::PublisherLimits{}};
  publisher.move_to({"stream", "snapshot:"}, 0);
  const auto key_of = [](std::uint64_t number) { return key::BlockKey{0, Prng::mix(number)}; };
  const auto change = [&](cluster::Change::Kind kind, std::uint64_t number) {
    publisher.apply({kind, 0, 0, key_of(number)}, 0);
  };
  const auto send = [&] {
    while (publisher.due(0) <= 0) {
      benchmark::DoNotOptimize(publisher.publish_request(0, kSecond));
      publisher.published();
    }
    while (publisher.snapshot_due()) {
      benchmark::DoNotOptimize(publisher.snapshot_request(kSecond));
      (void)publisher.part_written();
    }
  };
  std::uint64_t next = 0;
  while (next < blocks) change(cluster::Change::Kind::kAdded, next++), send();
  const std::uint64_t bytes_before = publisher.stream_bytes() + publisher.snapshot_bytes();
  for (auto _ : state) {
    change(cluster::Change::Kind::kRemoved, next - blocks);
    change(cluster::Change::Kind::kAdded, next++);
    send();
  }
  const auto changes = static_cast<double>(2 * state.iterations());
  const std::uint64_t bytes = publisher.stream_bytes() + publisher.snapshot_bytes() - bytes_before;
  state.counters["bytes/change"] = static_cast<double>(bytes) / changes;
  state.counters["changes/s"] = benchmark::Counter(changes, benchmark::Counter::kIsRate);
}

// Batches as they come from Redis, into a replica that holds so many blocks.
void bm_follow(benchmark::State& state) {
  const auto blocks = static_cast<std::uint64_t>(state.range(0));
  cluster::Replica replica(blocks * 2);
  replica.refresh(1, "", kSecond);
  const auto batch_from = [](std::uint64_t first, cluster::Tiers tiers) {
    cluster::Batch batch{1, false, {}};
    for (std::uint64_t k = first; k < first + cluster::kBatchMax; ++k) {
      batch.residencies.push_back({Prng::mix(k), tiers});
    }
    return batch;
  };
  std::uint64_t next = 0;
  for (; next < blocks; next += cluster::kBatchMax) (void)replica.apply(1, 0, batch_from(next, 1).residencies);
  for (auto _ : state) {
    state.PauseTiming();
    const std::string bytes[] = {
        encode_batch(batch_from(next - blocks / cluster::kBatchMax * cluster::kBatchMax, 0), "s"),
        encode_batch(batch_from(next, 1), "s")};
    next += cluster::kBatchMax;
    state.ResumeTiming();
    for (const std::string& entry : bytes) {
      const auto batch = cluster::decode_batch(entry, "s");
      (void)replica.apply(1, 0, batch.value().residencies);
    }
  }
  const double changes = 2.0 * cluster::kBatchMax * static_cast<double>(state.iterations());
  state.counters["changes/s"] = benchmark::Counter(changes, benchmark::Counter::kIsRate);
}

}  // namespace

void register_directory() {
  for (const std::int64_t blocks : {1'000'000, 10'000'000}) {
    benchmark::RegisterBenchmark("lookup/own_index", bm_local)->ArgName("blocks")->Arg(blocks);
    benchmark::RegisterBenchmark("lookup/replica", bm_replica)->ArgName("blocks")->Arg(blocks);
  }
  benchmark::RegisterBenchmark("publish", bm_publish)->ArgName("blocks")->Arg(1'000'000)->Iterations(3'000'000);
  benchmark::RegisterBenchmark("follow", bm_follow)->ArgName("blocks")->Arg(10'000'000)->Iterations(500);
}

}  // namespace flexkv::bench
