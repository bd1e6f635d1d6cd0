// The directory of a cluster: lookups in a replica of other nodes' blocks beside lookups in the node's own index that
// holds as many, and what a change costs in time and bytes, without Redis.
#include <benchmark/benchmark.h>

#include "bench/suites.h"
#include "flexkv/cluster/publisher.h"
#include "flexkv/cluster/replica.h"
#include "flexkv/cluster/wire.h"

namespace flexkv::bench {
namespace {

// Conversations that together have `blocks` blocks.
std::uint64_t conversations_for(const Shape& shape, std::int64_t blocks) {
  const double own = kConversationBlocks - shape.shared_blocks * (1 - 1.0 / shape.group);
  return static_cast<std::uint64_t>(static_cast<double>(blocks) / own);
}

// Calls add(conversation, keys) turn by turn over all conversations: with all keys up to that turn.
template <typename Add>
void grow(const Shape& shape, std::uint64_t conversations, Add add) {
  std::vector<Keys> all;
  for (std::uint64_t c = 0; c < conversations; ++c) all.push_back(conversation_keys(shape, c));
  for (std::uint32_t length = shape.shared_blocks + shape.turn_blocks; length <= kConversationBlocks;
       length += shape.turn_blocks) {
    for (std::uint64_t c = 0; c < conversations; ++c) add(c, std::span(all[c]).first(length));
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
  grow(shape, conversations, [&](std::uint64_t, std::span<const key::BlockKey> keys) { cache.visit(keys, ++now); });
  std::vector<index::Slot> slots(kConversationBlocks);
  time_lookups(state, shape, conversations, [&](const Keys& keys) {
    const auto match = cache.index().match(keys, true, ++now);
    cache.index().collect(match.pin, 0, 0, std::span(slots).first(match.block_count));
    benchmark::DoNotOptimize(slots.data());
    cache.unpin(match.pin);
    return match.block_count == kConversationBlocks;
  });
}

cluster::Before before(std::span<const key::BlockKey> keys, std::size_t at) {
  return at == 0 ? cluster::kFirst : cluster::half(cluster::tag_of(keys[at - 1]));
}

// The conversations of a group are spread over all nodes, so that each node has what they share. `whole`: what is
// looked up is the whole prompt, which one node has; else only what all have is known of it.
void bm_replica(benchmark::State& state, const Shape& shape, bool whole) {
  const std::uint64_t conversations = conversations_for(shape, state.range(0));
  const auto nodes = static_cast<std::uint64_t>(state.range(1));
  cluster::Replica replica(static_cast<std::uint64_t>(state.range(0)) * 2);
  for (std::uint64_t node = 1; node <= nodes; ++node) replica.refresh(node, "", kSecond);
  std::vector<cluster::Residency> turn;
  grow(shape, conversations, [&](std::uint64_t conversation, std::span<const key::BlockKey> keys) {
    const bool first = keys.size() == shape.shared_blocks + shape.turn_blocks;
    turn.clear();
    for (std::size_t i = first ? 0 : keys.size() - shape.turn_blocks; i < keys.size(); ++i) {
      turn.push_back({cluster::tag_of(keys[i]), 1, before(keys, i)});
    }
    if (!replica.apply(1 + conversation % nodes, 0, turn)) state.SkipWithError("no room");
  });
  std::vector<cluster::Replica::Holding> found;
  const std::size_t holders = shape.shared_blocks == 0 ? 1 : nodes;
  const std::uint32_t known = whole ? kConversationBlocks : shape.shared_blocks;
  time_lookups(state, shape, conversations, [&](const Keys& keys) {
    if (whole) {
      replica.lookup(0, keys, 0, found);
    } else {
      const Keys only_shared(keys.begin(), keys.begin() + shape.shared_blocks);
      replica.lookup(0, only_shared, 0, found);
    }
    return found.size() == holders && found[0].blocks == known;
  });
  const auto stats = replica.stats();
  state.counters["bytes/block"] = static_cast<double>(stats.memory_bytes) / static_cast<double>(stats.blocks);
}

// Chains of 512 blocks that together are `blocks`, and grow in turns by `piece` blocks: the n-th block of all that
// come. When a chain is complete another one begins.
class Chains {
 public:
  Chains(std::uint64_t blocks, std::uint64_t piece) : chains_(blocks / kConversationBlocks), piece_(piece) {}
  key::BlockKey key(std::uint64_t n) const { return key_at(number(n)); }
  // Zero: there is none.
  key::BlockKey parent(std::uint64_t n) const {
    const std::uint64_t at = number(n);
    return at % kConversationBlocks == 0 ? key::BlockKey{} : key_at(at - 1);
  }
  cluster::Before before(std::uint64_t n) const {
    const key::BlockKey key = parent(n);
    return key == key::BlockKey{} ? cluster::kFirst : cluster::half(cluster::tag_of(key));
  }

 private:
  std::uint64_t number(std::uint64_t n) const {
    const std::uint64_t turn = n / piece_;
    const std::uint64_t in_chain = turn / chains_ * piece_ + n % piece_;
    const std::uint64_t chain = turn % chains_ + in_chain / kConversationBlocks * chains_;
    return chain * kConversationBlocks + in_chain % kConversationBlocks;
  }
  static key::BlockKey key_at(std::uint64_t number) { return {0, Prng::mix(number + 1)}; }

  std::uint64_t chains_;
  std::uint64_t piece_;
};

// A node of that many blocks whose cache turns over: each new block pushes an old one out. Counts both as changes.
void bm_publish(benchmark::State& state) {
  const auto blocks = static_cast<std::uint64_t>(state.range(0));
  const Chains chains(blocks, static_cast<std::uint64_t>(state.range(1)));
  cluster::Publisher publisher{cluster::PublisherLimits{}};
  publisher.move_to({"stream", "snapshot:"}, 0);
  const auto change = [&](cluster::Change::Kind kind, std::uint64_t number) {
    publisher.apply({kind, 0, 0, chains.key(number), chains.parent(number)}, 0);
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
  const auto blocks = static_cast<std::uint64_t>(state.range(0)) / cluster::kBatchMax * cluster::kBatchMax;
  const Chains chains(blocks, static_cast<std::uint64_t>(state.range(1)));
  cluster::Replica replica(blocks * 2);
  replica.refresh(1, "", kSecond);
  const auto batch_from = [&](std::uint64_t first, cluster::Tiers tiers) {
    cluster::Batch batch{1, false, {}};
    for (std::uint64_t k = first; k < first + cluster::kBatchMax; ++k) {
      batch.residencies.push_back({cluster::tag_of(chains.key(k)), tiers, chains.before(k)});
    }
    return batch;
  };
  std::uint64_t next = 0;
  for (; next < blocks; next += cluster::kBatchMax) (void)replica.apply(1, 0, batch_from(next, 1).residencies);
  for (auto _ : state) {
    state.PauseTiming();
    const std::string bytes[] = {encode_batch(batch_from(next - blocks, 0), "s"),
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
  state.counters["bytes/block"] = static_cast<double>(replica.stats().memory_bytes) / static_cast<double>(blocks);
}

// Prompts of 64 blocks that 64 conversations at each node share, and conversations saved in pieces.
struct Chat {
  std::uint32_t piece;
  std::uint32_t nodes;
};
Shape shape_of(const Chat& chat) { return {"", 64, 64 * chat.nodes, std::min(chat.piece, kConversationBlocks - 64)}; }

}  // namespace

void register_directory() {
  constexpr std::int64_t kMany = 10'000'000;
  for (const std::int64_t blocks : {kMany / 10, kMany}) {
    benchmark::RegisterBenchmark("lookup/own_index/alone/512", [](auto& state) { bm_local(state, kFlat512); })
        ->ArgName("blocks")
        ->Arg(blocks)
        ->UseManualTime();
    benchmark::RegisterBenchmark("lookup/replica/alone/512", [](auto& state) { bm_replica(state, kFlat512, true); })
        ->ArgNames({"blocks", "nodes"})
        ->Args({blocks, 8})
        ->UseManualTime();
    for (const std::uint32_t piece : {1U, 4U, 32U, 512U}) {
      for (const std::uint32_t nodes : {8U, 64U}) {
        const Shape shape = shape_of({piece, nodes});
        const std::string name = "shared64/" + std::to_string(piece);
        benchmark::RegisterBenchmark(("lookup/own_index/" + name).c_str(), [=](auto& state) { bm_local(state, shape); })
            ->ArgNames({"blocks", "nodes"})
            ->Args({blocks, nodes})
            ->UseManualTime();
        benchmark::RegisterBenchmark(("lookup/replica/" + name).c_str(),
                                     [=](auto& state) { bm_replica(state, shape, true); })
            ->ArgNames({"blocks", "nodes"})
            ->Args({blocks, nodes})
            ->UseManualTime();
      }
    }
  }
  for (const std::uint32_t nodes : {8U, 64U, 512U}) {
    const Shape shape = shape_of({512, nodes});
    benchmark::RegisterBenchmark("lookup/replica/only_shared64", [=](auto& state) { bm_replica(state, shape, false); })
        ->ArgNames({"blocks", "nodes"})
        ->Args({kMany, nodes})
        ->UseManualTime();
  }
  for (const int piece : {1, 4, 32, 512}) {
    benchmark::RegisterBenchmark("publish", bm_publish)
        ->ArgNames({"blocks", "piece"})
        ->Args({kMany / 10, piece})
        ->Iterations(3'000'000);
    benchmark::RegisterBenchmark("follow", bm_follow)
        ->ArgNames({"blocks", "piece"})
        ->Args({kMany / 10, piece})
        ->Args({kMany, piece})
        ->Iterations(2000);
  }
}

}  // namespace flexkv::bench
