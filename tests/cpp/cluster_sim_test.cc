// A small cluster that serves a trace made here: what must hold in one of any size.
#include "flexkv/testing/cluster_sim.h"

#include <gtest/gtest.h>

#include <array>

namespace flexkv::testing {
namespace {

constexpr std::uint32_t kTraceBlock = 512;
constexpr std::uint32_t kNodes = 8;

// Conversations that take turns: all begin with the same block, each turn has the one before it in it.
std::vector<TracedPrompt> conversations() {
  constexpr std::uint32_t kConversations = 60;
  Prng random(7);
  std::vector<std::vector<std::uint32_t>> blocks(kConversations, {0});
  std::vector<TracedPrompt> trace;
  std::uint32_t next = 1;
  for (std::uint32_t r = 0; r < 400; ++r) {
    auto& conversation = blocks[random.below(kConversations)];
    for (std::uint64_t i = 1 + random.below(4); i > 0; --i) conversation.push_back(next++);
    trace.push_back({static_cast<Nanos>(r / 5) * kSecond, static_cast<std::uint32_t>(conversation.size() * kTraceBlock),
                     conversation});
  }
  return trace;
}

// Memory for about half of what the load has.
ClusterShape small(ClusterRouter router, std::uint32_t replicas) { return {kNodes, replicas, 8'000, 64, router, 3}; }

struct Outcome {
  ClusterFigures figures;
  ServedBlocks ideal;
  ServedBlocks alone;
};

Outcome run(const ClusterShape& shape) {
  const auto trace = conversations();
  const ClusterLoad load(trace, shape.nodes, shape.seed);
  ClusterSim sim(shape, load);
  sim.join();
  sim.serve();
  EXPECT_TRUE(sim.agree());
  sim.kill_one();
  sim.empty_store();
  EXPECT_TRUE(sim.agree());
  return {sim.figures(), serve_apart(load, shape, 1), serve_apart(load, shape, shape.nodes)};
}

double ratio(const ServedBlocks& served) {
  return static_cast<double>(served.hits()) / static_cast<double>(served.asked);
}

void expect_sound(const Outcome& outcome) {
  const ClusterFigures& figures = outcome.figures;
  EXPECT_EQ(figures.blocks.requests, outcome.ideal.requests);
  EXPECT_EQ(figures.blocks.asked, outcome.ideal.asked);
  EXPECT_LE(ratio(figures.blocks), ratio(outcome.ideal));
  EXPECT_GE(ratio(figures.blocks), ratio(outcome.alone));
  EXPECT_GT(figures.blocks.remote, 0U);
  ASSERT_TRUE(figures.converged.has_value());
  EXPECT_LE(*figures.converged, kSecond) << "a batch is cut after 0.1 s";
  ASSERT_TRUE(figures.death_seen.has_value());
  EXPECT_LE(*figures.death_seen, 2 * 30 * kSecond);
  ASSERT_TRUE(figures.emptied_and_converged.has_value());
  EXPECT_LE(*figures.emptied_and_converged, 76 * kSecond) << "docs/decisions/0019";
}

TEST(ClusterSim, RoundRobin) {
  const Outcome outcome = run(small(ClusterRouter::kRoundRobin, kNodes));
  expect_sound(outcome);
  EXPECT_GT(ratio(outcome.figures.blocks), 1.2 * ratio(outcome.alone)) << "most turns come to another node";
}

TEST(ClusterSim, ByPrefix) { expect_sound(run(small(ClusterRouter::kPrefix, kNodes))); }

TEST(ClusterSim, NodesWithoutAReplicaFindBlocksToo) {
  const Outcome some = run(small(ClusterRouter::kRoundRobin, 2));
  expect_sound(some);
  EXPECT_EQ(some.figures.followers, 3U);
  const Outcome all = run(small(ClusterRouter::kRoundRobin, kNodes));
  EXPECT_NEAR(ratio(some.figures.blocks), ratio(all.figures.blocks), 0.02);
}

TEST(ClusterSim, RepeatsItself) {
  const auto shape = small(ClusterRouter::kRoundRobin, 3);
  const ClusterFigures first = run(shape).figures;
  const ClusterFigures again = run(shape).figures;
  EXPECT_EQ(first.trace_hash, again.trace_hash);
  EXPECT_EQ(first.blocks.remote, again.blocks.remote);
  EXPECT_EQ(first.store_bytes, again.store_bytes);
  EXPECT_EQ(first.emptied_and_converged, again.emptied_and_converged);
  for (std::size_t i = 0; i < kDirectoryUses; ++i) {
    EXPECT_EQ(first.all.by_use[i].sent_bytes, again.all.by_use[i].sent_bytes);
    EXPECT_EQ(first.all.by_use[i].received_bytes, again.all.by_use[i].received_bytes);
  }
}

// What it costs follows from what changes, not from what is there.
TEST(ClusterSim, NothingIsSentOfBlocksThatStay) {
  const auto trace = conversations();
  std::array<std::uint64_t, 2> rounds{};
  for (const std::size_t requests : {40U, 400U}) {
    const std::vector<TracedPrompt> part(trace.begin(), trace.begin() + static_cast<std::ptrdiff_t>(requests));
    ClusterShape shape = small(ClusterRouter::kRoundRobin, kNodes);
    const ClusterLoad load(part, shape.nodes, shape.seed);
    ClusterSim sim(shape, load);
    sim.join();
    sim.serve();
    const std::uint64_t batches = sim.batches();
    const DirectoryTraffic before = sim.traffic();
    sim.wait(600 * kSecond);
    const DirectoryTraffic idle = sim.traffic() - before;
    EXPECT_EQ(sim.batches(), batches);
    EXPECT_EQ(idle.of(DirectoryUse::kStream).sent_bytes, 0U);
    EXPECT_EQ(idle.of(DirectoryUse::kSnapshot).sent_bytes, 0U);
    EXPECT_EQ(idle.of(DirectoryUse::kLoad).sent_bytes, 0U);
    rounds[requests == 400U] = idle.of(DirectoryUse::kRound).sent_bytes;
    EXPECT_GT(sim.figures().blocks.asked, 0U);
  }
  // Ten times the requests: a snapshot is there now, and is kept alive.
  EXPECT_LE(static_cast<double>(rounds[1]), 1.2 * static_cast<double>(rounds[0]));
}

// However many nodes have something to say.
TEST(ClusterSim, WhoFollowsReadsTenTimesASecond) {
  const ClusterFigures figures = run(small(ClusterRouter::kRoundRobin, kNodes)).figures;
  const double seconds = static_cast<double>(figures.served) / kSecond;
  EXPECT_GT(static_cast<double>(figures.batches), 25 * seconds);
  const auto reads = static_cast<double>(figures.follower.of(DirectoryUse::kFollow).requests);
  EXPECT_LE(reads, 11 * seconds * figures.followers);
}

// Twice the changes, twice the bytes: about 8 a change and what the batches are wrapped in.
TEST(ClusterSim, BytesFollowChanges) {
  const ClusterFigures figures = run(small(ClusterRouter::kRoundRobin, kNodes)).figures;
  const auto bytes = static_cast<double>(figures.all.of(DirectoryUse::kStream).sent_bytes);
  const auto changes = static_cast<double>(figures.changes);
  const auto batches = static_cast<double>(figures.batches);
  EXPECT_LE(bytes, 8 * changes + 500 * batches);
  EXPECT_GE(bytes, 4 * changes) << "of those that come and go between two batches nobody hears";
}

}  // namespace
}  // namespace flexkv::testing
