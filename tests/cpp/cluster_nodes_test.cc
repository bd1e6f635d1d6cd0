// Nodes of one cluster in one process: real nodes, engines, TCP and redis-server. What must come is waited for, as long
// as it takes; what must not come is asked for once that is settled.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "cluster_machine.h"
#include "flexkv/device/host_device.h"
#include "flexkv/server/node_server.h"
#include "flexkv/testing/faulty_device.h"

namespace flexkv {
namespace {

using testing::ClusterTest;
using testing::eventually;
using testing::kBlockBytes;
using testing::kBlocks;
using testing::kSecret;
using testing::Wire;
using Machine = testing::ClusterMachine;

TEST_F(ClusterTest, ANodeReadsWhatAnotherHasComputed) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  EXPECT_TRUE(b->loads_all(1));
  // And tells of it itself, as it has it now.
  a->stop();
  const auto c = machine("c");
  EXPECT_TRUE(c->loads_all(1));
  b->compute(2);
  EXPECT_TRUE(c->loads_all(2));
}

class DirectReadsTest : public ClusterTest, public ::testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    const std::string transport = GetParam();
    const char* const given = std::getenv(transport == "nixl" ? "FLEXKV_TEST_NIXL" : "FLEXKV_TEST_MOONCAKE");
    if (given == nullptr) GTEST_SKIP() << "nothing says where " << transport << " is";
    if (transport == "nixl") with_.nixl_library = given;
    if (transport == "mooncake") with_.mooncake_helper = {given, "-P", "-m", "flexkv.mooncake.reader"};
    ClusterTest::SetUp();
  }
  Machine::Options with_;
};

TEST_P(DirectReadsTest, BringWhatAnotherHasComputed) {
  const auto works = [](const Machine& one) {
    return eventually([&] { return one.status().at("cluster").at("transport") == GetParam(); });
  };
  const auto a = machine("a", with_);
  ASSERT_TRUE(works(*a));
  a->compute(1);
  {
    const auto b = machine("b", with_);
    ASSERT_TRUE(works(*b));
    EXPECT_TRUE(b->loads_all(1));
    // What is counted is told a moment after it has happened.
    const auto count = [](const Machine& one, const char* flow, const char* what) {
      return one.status().at("cluster").at(flow).at(what).get<std::uint64_t>();
    };
    EXPECT_TRUE(eventually([&] { return count(*b, "read", "one_sided_blocks") == kBlocks; }));
    EXPECT_EQ(count(*b, "read", "one_sided_failures"), 0U);
    EXPECT_TRUE(eventually([&] { return count(*a, "lent", "under_way") == 0; }));
    EXPECT_EQ(count(*a, "lent", "one_sided_blocks"), kBlocks);
    EXPECT_EQ(count(*a, "lent", "bytes"), 0U);
  }
  // One that cannot gets bytes.
  const auto c = machine("c");
  EXPECT_TRUE(c->loads_all(1));
  EXPECT_EQ(c->status().at("cluster").at("read").at("one_sided_blocks"), 0);
}

INSTANTIATE_TEST_SUITE_P(, DirectReadsTest, ::testing::Values("nixl", "mooncake"),
                         [](const auto& transport) { return std::string(transport.param); });

void expect_says_so_and_reads_over_tcp(Machine& a, Machine& b, const std::string& what) {
  a.compute(1);
  EXPECT_TRUE(b.loads_all(1));
  EXPECT_EQ(b.status().at("cluster").at("transport"), "tcp");
  EXPECT_TRUE(eventually([&] { return b.status().at("health").dump().find(what) != std::string::npos; }))
      << b.status().at("health");
}

TEST_F(ClusterTest, ANodeWithoutNixlSaysSoAndReadsOverTcp) {
  Machine::Options without;
  without.nixl_library = "/nowhere/libnixl_capi.so";
  expect_says_so_and_reads_over_tcp(*machine("a", without), *machine("b", without), "/nowhere/libnixl_capi.so");
}

TEST_F(ClusterTest, ANodeWithoutMooncakeSaysSoAndReadsOverTcp) {
  Machine::Options without;
  without.mooncake_helper = {"/nowhere/python"};
  expect_says_so_and_reads_over_tcp(*machine("a", without), *machine("b", without), "/nowhere/python");
}

// Loads may take far longer than a test: what ends them is that nothing more comes.
class StallTest : public ClusterTest {
 protected:
  static Machine::Options patient(Wire* behind = nullptr) {
    Machine::Options options;
    options.load_timeout = 3600 * kSecond;
    options.behind = behind;
    return options;
  }
  static std::uint64_t given_up(const Machine& one) { return one.status().at("cluster").at("read").at("given_up"); }
  static std::uint64_t from_others(const Machine& one) {
    return one.status().at("transfers").at("from_remote").at("blocks");
  }
  static void wait_until_known(const Machine& one, std::uint64_t blocks) {
    ASSERT_TRUE(eventually([&] { return one.status().at("cluster").at("directory").at("blocks") == blocks; }));
  }
  // Some blocks of a prompt, and not all.
  static constexpr std::int64_t kSome = kBlocks * 2 * kBlockBytes / 3;
};

TEST_F(StallTest, ALoadEndsWithWhatHasComeWhenItsOwnerStops) {
  Wire wire("");
  const auto a = machine("a", patient(&wire));
  const auto b = machine("b", patient());
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  a->compute(2);
  wait_until_known(*b, 2 * kBlocks);
  std::atomic<std::int64_t> left = kSome;
  wire.swallow_after(left);
  EXPECT_EQ(b->load(2), 0U) << "not all of it came";
  EXPECT_EQ(given_up(*b), 1U);
  const std::uint64_t came = from_others(*b) - kBlocks;
  EXPECT_GT(came, 0U);
  EXPECT_LT(came, kBlocks);
  EXPECT_TRUE(b->status().at("cluster").at("peers").at(0).at("resting"));
  wire.swallow(false);
  EXPECT_TRUE(b->loads_all(2)) << "it is asked again, and what comes late of the first read does no harm";
}

TEST_F(StallTest, ALoadGoesOnAtAnotherNode) {
  Wire wire_a("");
  Wire wire_c("");
  const auto a = machine("a", patient(&wire_a));
  const auto c = machine("c", patient(&wire_c));
  const auto b = machine("b", patient());
  a->compute(1);
  ASSERT_TRUE(c->loads_all(1));
  ASSERT_TRUE(b->loads_all(1));
  a->compute(2);
  ASSERT_TRUE(c->loads_all(2));
  wait_until_known(*b, 4 * kBlocks);
  std::atomic<std::int64_t> left = kSome;
  wire_a.swallow_after(left);
  wire_c.swallow_after(left);
  EXPECT_EQ(b->load(2), kBlocks);
  EXPECT_EQ(given_up(*b), 1U);
  EXPECT_EQ(from_others(*b), 2 * kBlocks);
}

TEST_F(ClusterTest, WhatIsOnDrivesOfAnotherIsReadFromThere) {
  const std::uint64_t pool = 64 * 2 * kBlockBytes;  // less than three prompts
  const auto a = machine("a", {kSecret, pool, 64U << 20});
  const auto b = machine("b", {kSecret, pool, 0});
  constexpr std::uint64_t kPrompts = 8;
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) {
    a->compute(seed);
    a->wait_until_written();
  }
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) EXPECT_TRUE(b->loads_all(seed)) << "prompt " << seed;
}

TEST_F(ClusterTest, WhatIsOnDrivesIsFoundByOthersAfterARestart) {
  const auto a = machine("a", {kSecret, 1U << 20, 64U << 20});
  a->compute(1);
  a->wait_until_written();
  a->stop();
  a->start();
  const auto b = machine("b");
  // A node opens what it has of a model when an engine of that comes.
  EXPECT_TRUE(a->loads_all(1));
  EXPECT_TRUE(b->loads_all(1));
}

// The first block of prompt 1, when it is first saved, is not what the device held.
class DamageTest : public ClusterTest, public ::testing::WithParamInterface<testing::Fault::Kind> {
 protected:
  Machine::Options damaged(std::uint64_t disk_bytes) const { return {kSecret, 1U << 20, disk_bytes, device_}; }
  void compute_damaged(Machine& machine) {
    machine.compute(2);  // a save that not all ranks were ready for would take the fault away
    device_->add_next({.direction = device::Direction::kToHost, .kind = GetParam()});
    machine.compute(1);
  }
  static int damaged_blocks(const Machine& machine) { return machine.status().at("saves").at("damaged_blocks"); }

 private:
  const std::shared_ptr<testing::FaultyDevice> device_ =
      std::make_shared<testing::FaultyDevice>(device::open_host_device(1).value());
};

TEST_P(DamageTest, IsFoundBeforeItReachesADrive) {
  const auto a = machine("a", damaged(64U << 20));
  compute_damaged(*a);
  ASSERT_TRUE(eventually([&] { return damaged_blocks(*a) == 1; }));
  a->compute(1);
  a->wait_until_written();
  EXPECT_EQ(damaged_blocks(*a), 1);
  const auto status = a->status();
  EXPECT_EQ(status.at("transfers").at("to_disk").at("failed_blocks").at("damaged"), 1);
  EXPECT_EQ(status.at("transfers").at("to_disk").at("checked_blocks"), 2 * kBlocks);
  EXPECT_EQ(status.at("health").at("state"), "degraded");
  a->stop();
  a->start();
  EXPECT_TRUE(a->loads_all(1)) << "and all of it is right";
}

TEST_P(DamageTest, IsFoundBeforeItReachesAnotherNode) {
  const auto a = machine("a", damaged(0));
  const auto b = machine("b");
  compute_damaged(*a);
  ASSERT_TRUE(eventually([&] {
    EXPECT_EQ(b->load(1), 0U) << "it is the first block";
    return damaged_blocks(*a) == 1;
  }));
  a->compute(1);
  EXPECT_TRUE(b->loads_all(1)) << "and all of it is right";
  EXPECT_EQ(damaged_blocks(*a), 1);
}

INSTANTIATE_TEST_SUITE_P(, DamageTest,
                         ::testing::Values(testing::Fault::Kind::kFlipBit, testing::Fault::Kind::kWrongBlock),
                         [](const auto& kind) {
                           return kind.param == testing::Fault::Kind::kFlipBit ? "flipped_bit" : "wrong_block";
                         });

TEST_F(ClusterTest, ANodeThatGoesWhileItIsReadFromCostsMissesOnly) {
  const std::uint64_t pool = 8U << 20;  // holds all
  const auto b = machine("b", {kSecret, pool});
  for (std::uint64_t round = 0; round < 4; ++round) {
    const auto a = machine("a" + std::to_string(round), {kSecret, pool});
    constexpr std::uint64_t kPrompts = 6;
    const std::uint64_t first = round * 100 + 1;
    for (std::uint64_t seed = first; seed < first + kPrompts; ++seed) a->compute(seed);
    ASSERT_TRUE(b->loads_all(first));
    std::atomic<bool> gone = false;
    std::jthread stopping([&] {
      a->stop();
      gone = true;
    });
    do {
      for (std::uint64_t seed = first + 1; seed < first + kPrompts; ++seed) (void)b->load(seed);
    } while (!gone);
    EXPECT_EQ(b->load(first), kBlocks) << "what was read is this node's own";
  }
}

TEST_F(ClusterTest, WithoutRedisEachServesItsOwnAndFindsTheOthersAgainLater) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  redis_.kill();
  EXPECT_EQ(b->load(1), kBlocks);
  a->compute(2);
  b->compute(3);
  redis_.start();
  EXPECT_TRUE(b->loads_all(2));
  EXPECT_TRUE(a->loads_all(3));
}

TEST_F(ClusterTest, ANodeStartsAndEndsWithoutRedis) {
  redis_.kill();
  const auto a = machine("a");
  a->compute(1);
  a->stop();
}

TEST_F(ClusterTest, WhoHasAnotherSecretFindsNothing) {
  const auto a = machine("a");
  const auto stranger = machine("stranger", {"another secret, which is as long as the first"});
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  EXPECT_EQ(stranger->load(1), 0U);
  stranger->compute(2);
  b->compute(3);
  ASSERT_TRUE(a->loads_all(3));
  EXPECT_EQ(a->load(2), 0U);
}

// Who has reset the cluster forgets once more when it hears from Redis that it is done.
void expect_work_goes_on(Machine& a, Machine& b) {
  EXPECT_TRUE(eventually([&] {
    a.compute(2);
    return b.load(2) == kBlocks;
  }));
}

TEST_F(ClusterTest, ResetsTheOthersOnceRedisIsBack) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  redis_.kill();
  a->node().reset_all();
  EXPECT_EQ(a->load(1), 0U) << "b has it, from before";
  redis_.start();
  EXPECT_TRUE(eventually([&] { return b->load(1) == 0; }));
  expect_work_goes_on(*a, *b);
}

TEST_F(ClusterTest, WhatDrivesHoldOfBeforeAResetIsForgottenByWhoWasDown) {
  const auto a = machine("a", {kSecret, 1U << 20, 64U << 20});
  const auto b = machine("b");
  a->compute(1);
  a->wait_until_written();
  a->stop();
  b->node().reset_all();
  ASSERT_TRUE(eventually([&] { return b->epoch() == 1; }));
  a->start();
  ASSERT_TRUE(eventually([&] { return a->epoch() == 1; }));
  a->compute(2);  // its engine is there
  EXPECT_EQ(a->load(1), 0U);
  ASSERT_TRUE(b->loads_all(2));
  EXPECT_EQ(b->load(1), 0U);
  // Once only.
  a->wait_until_written();
  ASSERT_TRUE(eventually([&] { return a->has_recorded_resets(); }));
  a->stop();
  b->stop();
  a->start();
  ASSERT_TRUE(eventually([&] { return a->epoch() == 1; }));
  EXPECT_TRUE(a->loads_all(2));
  // A new drive has not missed a reset.
  a->stop();
  a->add_drive();
  for (int start = 0; start < 2; ++start) {
    a->start();
    ASSERT_TRUE(eventually([&] { return a->epoch() == 1; }));
    EXPECT_TRUE(a->loads_all(2));
    a->stop();
  }
}

TEST_F(ClusterTest, ResetsAllNodes) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));
  a->node().reset_all();
  EXPECT_TRUE(eventually([&] { return a->load(1) == 0 && b->load(1) == 0; }));
  expect_work_goes_on(*a, *b);
}

}  // namespace
}  // namespace flexkv
