// Nodes of a cluster that drain, leave and come again, while others read from them: real nodes, TCP, files and Redis.
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>

#include "cluster_machine.h"
#include "flexkv/base/prng.h"

namespace flexkv {
namespace {

using testing::ClusterTest;
using testing::eventually;
using testing::kBlockBytes;
using testing::kBlocks;
using testing::kSecret;
using Machine = testing::ClusterMachine;

constexpr std::uint64_t kDisk = 64U << 20;
constexpr std::uint64_t kLarge = 8U << 20;  // of host memory: holds all
constexpr std::uint64_t kSmallBlocks = 64;  // less than three prompts
constexpr std::uint64_t kSmall = kSmallBlocks * 2 * kBlockBytes;
constexpr Nanos kPatience = 60 * kSecond;

bool drained(Machine& machine) {
  machine.node().drain(kPatience);
  return machine.node().wait_drained();
}
std::string state(const Machine& machine) { return machine.status().at("node").at("drain").at("state"); }

TEST_F(ClusterTest, WhoReadsFromANodeThatDrainsSeesNoFailureAndThenNothing) {
  constexpr std::uint64_t kPrompts = 8;
  const auto a = machine("a", {kSecret, kLarge, kDisk});
  const auto b = machine("b", {kSecret, kSmall});
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) a->compute(seed);
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) ASSERT_TRUE(b->loads_all(seed));
  const auto failed = b->status().at("loads").at("failed");
  std::atomic<bool> done = false;
  std::jthread draining([&] {
    EXPECT_TRUE(drained(*a));
    done = true;
  });
  do {
    for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) (void)b->load(seed);
  } while (!done);
  EXPECT_EQ(b->status().at("loads").at("failed"), failed);
  EXPECT_TRUE(eventually([&] { return a->status().at("cluster").at("directory").at("left").get<bool>(); }));
  EXPECT_TRUE(eventually([&] { return b->status().at("cluster").at("directory").at("blocks") == 0; }));
  const auto condition = [&] {
    const auto peers = b->status().at("cluster").at("peers");
    return peers.empty() ? std::string("gone") : peers.at(0).at("condition").get<std::string>();
  };
  EXPECT_TRUE(eventually([&] { return condition() == "drained"; })) << condition();
  std::uint64_t found = 0;
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) found += b->load(seed);
  EXPECT_LE(found, kSmallBlocks) << "what is in its own memory";
  EXPECT_EQ(state(*a), "drained");
  EXPECT_EQ(a->status().at("queues").at("disk_writes"), 0);
  EXPECT_EQ(a->load(1), 0U) << "to its engine it is a node without blocks";
  // More than twice the time after which one that gives no sign is forgotten, for good.
  const auto lasts = [&] { return a->status().at("node").at("drain").at("lasts_s").get<double>(); };
  EXPECT_TRUE(eventually([&] { return lasts() > 7 && condition() == "drained"; })) << condition();
  a->stop();
  EXPECT_TRUE(eventually([&] { return condition() == "ends" || condition() == "gone"; })) << condition();
  a->start();
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) EXPECT_TRUE(a->loads_all(seed)) << "prompt " << seed;
  EXPECT_TRUE(b->loads_all(1)) << "and others find it again";
}

TEST_F(ClusterTest, WaitsForTransfersOfItsEnginesNoLongerThanItMay) {
  const auto a = machine("a", {kSecret, kLarge, kDisk});
  a->compute(1);
  auto& client = a->engine().client();
  const auto hashes = testing::prompt(2);
  const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
  for (std::uint32_t block = 0; block < kBlocks; ++block) a->engine().fill(block, 2 * 1000 + block);
  std::vector<std::uint32_t> device_blocks(kBlocks);
  for (std::uint32_t i = 0; i < kBlocks; ++i) device_blocks[i] = i;
  const auto jobs = [&] { return a->status().at("queues").at("jobs_in_flight").get<int>(); };
  ASSERT_TRUE(eventually([&] { return jobs() == 0; }));
  const auto save = client.save(client.open_sequence(), 0, views, 0, device_blocks);
  ASSERT_TRUE(eventually([&] { return jobs() == 1; }));
  a->node().drain(kMillisecond);
  EXPECT_FALSE(a->node().wait_drained()) << "the engine has not given its blocks yet";
  EXPECT_EQ(state(*a), "late");
  EXPECT_EQ(a->status().at("node").at("drain").at("jobs"), 1);
  a->node().drain(kPatience);
  EXPECT_EQ(state(*a), "draining");
  for (const std::uint32_t rank : {0U, 1U}) a->engine().agent(rank).arm_saves({&save, 1}, 0);
  EXPECT_TRUE(a->node().wait_drained());
  a->stop();
  a->start();
  EXPECT_TRUE(a->loads_all(1));
  EXPECT_TRUE(eventually([&] { return a->load(2) > 0; })) << "what was under way was kept, too";
}

TEST_F(ClusterTest, WhoIsDrainedHearsOfResets) {
  const auto a = machine("a", {kSecret, kLarge, kDisk});
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  ASSERT_TRUE(drained(*a));
  b->node().reset_all();
  EXPECT_TRUE(eventually([&] { return a->epoch() == 1; }));
  a->node().reset_all();
  EXPECT_TRUE(eventually([&] { return b->epoch() == 2; })) << "and may be told to reset";
}

TEST_F(ClusterTest, DrainsWithoutRedis) {
  const auto a = machine("a", {kSecret, kLarge, kDisk});
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  redis_.kill();
  EXPECT_TRUE(drained(*a));
  a->stop();
  redis_.start();
  a->start();
  EXPECT_TRUE(a->loads_all(1));
}

// Nodes drain, end and start again in turns while engines compute and load at the others. Each prompt is on the drives
// of a node that had it when it drained, so in the end all nodes find all.
class TurnsTest : public ClusterTest, public ::testing::WithParamInterface<std::uint64_t> {};

TEST_P(TurnsTest, NodesThatComeAndGoLoseNothing) {
  Prng prng(GetParam());
  const Machine::Options options{.pool_bytes = kLarge, .disk_bytes = kDisk, .lease_time = 200 * kMillisecond};
  std::vector<std::unique_ptr<Machine>> machines;
  for (const char* name : {"a", "b", "c"}) machines.push_back(machine(name, options));
  std::uint64_t prompts = 0;
  for (auto& one : machines) one->compute(++prompts);
  for (int turn = 0; turn < 5; ++turn) {
    const std::size_t leaver = prng.next() % machines.size();
    std::atomic<bool> back = false;
    std::jthread leaving([&] {
      EXPECT_TRUE(drained(*machines[leaver]));
      machines[leaver]->stop();
      machines[leaver]->start();
      back = true;
    });
    std::uint64_t computed = 0;
    do {
      const std::size_t at = (leaver + 1 + prng.next() % 2) % machines.size();
      // Whatever is found is right; a node that is away is no obstacle.
      (void)machines[at]->load(1 + prng.next() % prompts);
      if (computed++ < 3) machines[at]->compute(++prompts);
    } while (!back);
  }
  for (auto& one : machines) {
    for (std::uint64_t seed = 1; seed <= prompts; ++seed) EXPECT_TRUE(one->loads_all(seed)) << "prompt " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(, TurnsTest, ::testing::Values(1, 2, 3),
                         [](const auto& seed) { return "seed_" + std::to_string(seed.param); });

}  // namespace
}  // namespace flexkv
