// Nodes of a cluster that share a Mooncake Store: real nodes, engines, Redis and Mooncake. What must come is waited
// for, as long as it takes; what must not come is asked for once that is settled.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "flexkv/server/node_server.h"
#include "mooncake_server.h"
#include "real_machine.h"
#include "redis_server.h"

namespace flexkv {
namespace {

namespace fs = std::filesystem;
using testing::eventually;
using testing::kBlocks;
using testing::MooncakeServer;

class Machine : public testing::RealMachine {
 public:
  struct Options {
    std::string secret = testing::kSecret;
    std::uint64_t disk_bytes = 0;
    bool in_cluster = true;
    bool with_store = true;
    bool wait = true;  // until it may use the store: the first node of a cluster resets it once
  };

  Machine(const std::string& root, const std::string& name, const testing::RedisServer& redis,
          const MooncakeServer& mooncake, const Options& given)
      : RealMachine(root, name, 1U << 20, given.disk_bytes) {
    const std::string secret = testing::write_secret(dir_ + "/secret", given.secret);
    if (given.with_store) {
      auto& remote = options_.remote.emplace();
      remote.url = mooncake.url();
      remote.mooncake = mooncake.options();
      remote.cluster = "test";
      remote.secret_file = secret;
      remote.tier.engine.scan_every = 20 * kMillisecond;
      remote.tier.engine.dispatch.breaker.probe_after = 20 * kMillisecond;
    }
    if (given.in_cluster) join(name, secret, redis.over_tcp());
    start();
    attach_engine(device::open_host_device().value());
    if (given.in_cluster && given.with_store && given.wait) {
      EXPECT_TRUE(knows_the_epoch()) << node_->status_json();
    }
  }

  nlohmann::json remote() const { return status().at("remote"); }
  std::uint64_t epoch() const { return status().at("cluster").at("directory").at("epoch"); }
  std::string messages() const { return status().at("health").at("messages").dump(); }
  bool says(const std::string& what) const {
    return eventually([&] { return messages().find(what) != std::string::npos; });
  }
  bool knows_the_epoch() const {
    return eventually([&] { return remote().at("trouble") == ""; });
  }
  void wait_until_stored(std::uint64_t blocks) {
    ASSERT_TRUE(eventually([&] { return remote().at("written").at("blocks") >= blocks; })) << node_->status_json();
  }
  // Until it has looked through the store once more, from its beginning.
  void wait_for_scans() {
    const std::uint64_t before = remote().at("looked_through");
    ASSERT_TRUE(eventually([&] { return remote().at("looked_through") >= before + 2; })) << node_->status_json();
  }
  // Once it knows what is in the store.
  std::uint32_t load_after_a_look(std::uint64_t seed) {
    EXPECT_TRUE(knows_the_epoch()) << node_->status_json();
    wait_for_scans();
    return load(seed);
  }
  std::uint64_t from_store() const { return status().at("transfers").at("from_remote").at("blocks"); }
};

class MooncakeNodesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!MooncakeServer::possible()) GTEST_SKIP() << "FLEXKV_TEST_MOONCAKE does not say which Python has Mooncake";
    ::signal(SIGPIPE, SIG_IGN);
    std::string name = (fs::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
    mooncake_.emplace();
    redis_.emplace();
  }
  void TearDown() override {
    if (!dir_.empty()) fs::remove_all(dir_);
  }
  std::unique_ptr<Machine> machine(const std::string& name, const Machine::Options& options = {}) {
    return std::make_unique<Machine>(dir_, name, *redis_, *mooncake_, options);
  }

  std::string dir_;
  std::optional<MooncakeServer> mooncake_;
  std::optional<testing::RedisServer> redis_;
};

TEST_F(MooncakeNodesTest, ANodeFindsWhatOneThatIsGoneHasComputed) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  a->stop();
  const auto b = machine("b");
  EXPECT_TRUE(b->loads_all(1));
  EXPECT_EQ(b->from_store(), kBlocks);
  a->start();  // the same node again, with nothing of its own
  a->stop();
}

TEST_F(MooncakeNodesTest, WhatWasStoredBeforeAResetIsFoundByNobody) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  ASSERT_TRUE(b->loads_all(1));
  const std::uint64_t before = a->epoch();
  a->node().reset_all();
  EXPECT_EQ(a->load(1), 0U) << "at once";
  ASSERT_TRUE(eventually([&] { return a->epoch() > before && b->epoch() > before; }));
  EXPECT_EQ(a->load_after_a_look(1), 0U);
  EXPECT_EQ(b->load_after_a_look(1), 0U);
  const auto c = machine("c");
  EXPECT_EQ(c->load_after_a_look(1), 0U);
  a->compute(2);
  a->wait_until_stored(2 * kBlocks);
  a->stop();
  EXPECT_TRUE(b->loads_all(2));
  EXPECT_TRUE(c->loads_all(2));
  EXPECT_EQ(c->load(1), 0U);
}

TEST_F(MooncakeNodesTest, WhoWasAwayDuringAResetFindsNothingOfBefore) {
  Machine::Options with_drives;
  with_drives.disk_bytes = 64U << 20;
  const auto a = machine("a", with_drives);
  const auto b = machine("b");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  ASSERT_TRUE(eventually([&] { return a->status().at("queues").at("disk_writes") == 0; }));
  a->stop();
  const std::uint64_t before = b->epoch();
  b->node().reset_all();
  ASSERT_TRUE(eventually([&] { return b->epoch() > before; }));
  a->start();
  EXPECT_EQ(a->load_after_a_look(1), 0U);
  b->compute(2);
  b->wait_until_stored(kBlocks);
  b->stop();
  EXPECT_TRUE(a->loads_all(2));
}

TEST_F(MooncakeNodesTest, WhileTheEpochIsNotKnownNothingIsReadOrWritten) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  const std::uint64_t before = a->epoch();
  a->node().reset_all();
  ASSERT_TRUE(eventually([&] { return a->epoch() > before; }));
  ASSERT_TRUE(a->knows_the_epoch());
  a->compute(2);
  a->wait_until_stored(2 * kBlocks);
  redis_->freeze();
  Machine::Options at_once;
  at_once.wait = false;
  const auto b = machine("b", at_once);
  b->compute(3);
  EXPECT_TRUE(b->says("until Redis has told")) << b->messages();
  EXPECT_EQ(b->load(1), 0U);
  EXPECT_EQ(b->load(2), 0U);
  EXPECT_EQ(b->remote().at("written").at("blocks"), 0U);
  EXPECT_EQ(a->load(2), kBlocks) << "it goes on with what it knows";
  redis_->thaw();
  EXPECT_TRUE(b->loads_all(2));
  EXPECT_EQ(b->load_after_a_look(1), 0U);
}

// A reset that nobody reaches Redis with is one all the same, for who asked for it.
TEST_F(MooncakeNodesTest, WhoResetsWithoutRedisFindsNothingOfBefore) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  const std::uint64_t before = a->epoch();
  redis_->freeze();
  a->node().reset_all();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_TRUE(a->says("until Redis has told")) << a->messages();
  redis_->thaw();
  ASSERT_TRUE(eventually([&] { return a->epoch() > before; }));
  EXPECT_EQ(a->load_after_a_look(1), 0U);
}

// Redis has lost everything, and nobody is there who knew: what is stored may be from before a reset.
TEST_F(MooncakeNodesTest, WithARedisThatBeganAnewNothingOfBeforeIsFound) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  a->stop();
  redis_.emplace();
  const auto b = machine("b");
  EXPECT_EQ(b->load_after_a_look(1), 0U);
  b->compute(2);
  b->wait_until_stored(kBlocks);
  b->stop();
  const auto c = machine("c");
  EXPECT_TRUE(c->loads_all(2));
  EXPECT_EQ(c->load(1), 0U);
}

TEST_F(MooncakeNodesTest, ClustersThatShareAMooncakeFindNothingOfEachOthers) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  Machine::Options stranger;
  stranger.secret = "another secret, which is long enough as well";
  const auto b = machine("b", stranger);
  EXPECT_EQ(b->load_after_a_look(1), 0U);
  EXPECT_EQ(b->remote().at("known_objects"), 0U);
}

TEST_F(MooncakeNodesTest, NodesWithAndWithoutItReadFromEachOther) {
  const auto a = machine("a");
  Machine::Options without;
  without.with_store = false;
  const auto b = machine("b", without);
  ASSERT_TRUE(eventually([&] { return b->epoch() == a->epoch(); }));
  a->compute(1);
  EXPECT_TRUE(b->loads_all(1));
  b->compute(2);
  EXPECT_TRUE(a->loads_all(2));
}

TEST_F(MooncakeNodesTest, DamagedObjectsAreMisses) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  a->stop();
  mooncake_->spoil();
  const auto b = machine("b");
  b->wait_for_scans();
  EXPECT_LT(b->load(1), kBlocks);  // compares what came
  b->compute(1);
  EXPECT_EQ(b->load(1), kBlocks);
}

TEST_F(MooncakeNodesTest, WithoutAClusterItIsRefused) {
  Machine::Options alone;
  alone.in_cluster = false;
  const auto a = machine("a", alone);
  EXPECT_NE(a->messages().find("needs a cluster"), std::string::npos) << a->messages();
  a->compute(1);
}

}  // namespace
}  // namespace flexkv
