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

// Conversations that together have `blocks` blocks.
std::uint64_t conversations_for(const Shape& shape, std::int64_t blocks) {
  const double own = kConversationBlocks - shape.shared_blocks * (1 - 1.0 / shape.group);
  return static_cast<std::uint64_t>(static_cast<double>(blocks) / own);
}

// Calls add(conversation, keys) turn by turn over all conversations: with all keys up to that turn.
template <typename Add>
void grow(const Shape& shape, std::uint64_t conversations, Add add) {
  for (std::uint32_t length = shape.shared_blocks + shape.turn_blocks; length <= kConversationBlocks;
       length += shape.turn_blocks) {
    for (std::uint64_t c = 0; c < conversations; ++c) {
      Keys keys = conversation_keys(shape, c);
      keys.resize(length);
      add(c, keys);
    }
  }
}

// Times lookup(keys) of random conversations. Their keys have just been made, as a prompt's have; the rest is as far
// away as it is among so many blocks.
template <typename Lookup>
void time_lookups(benchmark::State& state, const Shape& shape, std::uint64_t conversations, Lookup lookup) {
  Prng random(1);
  std::vector<Nanos> times;
  for (auto _ : state) {
    const Keys keys = conversation_keys(shape, random.below(conversations));
    const Nanos begin = monotonic_now();
    const bool right = lookup(keys);
    times.push_back(monotonic_now() - begin);
    state.SetIterationTime(static_cast<double>(times.back()) / kSecond);
    if (!right) state.SkipWithError("wrong answer");
  }
  state.counters["median_ns"] = percentile_us(times, 0.5) * 1000;
}

void bm_local(benchmark::State& state, const Shape& shape) {
  const std::uint64_t conversations = conversations_for(shape, state.range(0));
  index::PrefixIndex::Options options;
  options.tier_count = 1;
  Cache cache(options, static_cast<std::uint32_t>(state.range(0)) + kConversationBlocks);
  Nanos now = 0;
  grow(shape, conversations, [&](std::uint64_t, const Keys& keys) { cache.visit(keys, ++now); });
  std::vector<index::Slot> slots(kConversationBlocks);
  time_lookups(state, shape, conversations, [&](const Keys& keys) {
    const auto match = cache.index().match(keys, true, ++now);
    cache.index().collect(match.pin, 0, 0, std::span(slots).first(match.block_count));
    benchmark::DoNotOptimize(slots.data());
    cache.unpin(match.pin);
    return match.block_count == kConversationBlocks;
  });
}

// Each group of conversations is at one of the nodes.
void bm_replica(benchmark::State& state, const Shape& shape) {
  const std::uint64_t conversations = conversations_for(shape, state.range(0));
  cluster::Replica replica(static_cast<std::uint64_t>(state.range(0)) + kConversationBlocks);
  for (std::uint64_t node = 1; node <= kNodes; ++node) replica.refresh(node, "", kSecond);
  std::vector<cluster::Residency> turn;
  grow(shape, conversations, [&](std::uint64_t conversation, const Keys& keys) {
    const bool first = keys.size() == shape.shared_blocks + shape.turn_blocks;
    turn.clear();
    for (std::size_t i = first ? 0 : keys.size() - shape.turn_blocks; i < keys.size(); ++i) {
      turn.push_back({cluster::tag_of(keys[i]), 1});
    }
    if (!replica.apply(1 + conversation / shape.group % kNodes, 0, turn)) state.SkipWithError("no room");
  });
  std::vector<cluster::Replica::Holding> found;
  time_lookups(state, shape, conversations, [&](const Keys& keys) {
    replica.lookup(0, keys, 0, found);
    return found.size() == 1 && found[0].blocks == kConversationBlocks;
  });
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
  for (const Shape* shape : {&kFlat512, &kChat32, &kChat4}) {
    for (const auto& [name, run] :
         {std::pair("lookup/own_index/", &bm_local), std::pair("lookup/replica/", &bm_replica)}) {
      benchmark::RegisterBenchmark((std::string(name) + shape->name).c_str(), [=](auto& state) { run(state, *shape); })
          ->ArgName("blocks")
          ->Arg(1'000'000)
          ->Arg(10'000'000)
          ->UseManualTime();
    }
  }
  benchmark::RegisterBenchmark("publish", bm_publish)->ArgName("blocks")->Arg(1'000'000)->Iterations(3'000'000);
  benchmark::RegisterBenchmark("follow", bm_follow)->ArgName("blocks")->Arg(10'000'000)->Iterations(500);
}

}  // namespace flexkv::bench
