// Nodes that share a remote tier, in one process: real nodes, engines and files. What must come is waited for, as long
// as it takes; what must not come is asked for once that is settled.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "flexkv/server/node_server.h"
#include "real_machine.h"
#include "redis_server.h"
#include "s3_server.h"
#include "wire.h"

namespace flexkv {
namespace {

namespace fs = std::filesystem;
using testing::eventually;
using testing::kBlocks;

class Machine : public testing::RealMachine {
 public:
  struct Options {
    std::string url;
    remote::S3Options s3;
    std::uint64_t pool_bytes = 1U << 20;
    std::uint64_t disk_bytes = 0;
    const testing::RedisServer* redis = nullptr;  // of a cluster
    Nanos scan_every = 20 * kMillisecond;
    Nanos load_timeout = node::NodeOptions().load_timeout;
    testing::Wire* behind = nullptr;  // other nodes reach it through this wire
  };

  Machine(const std::string& root, const std::string& name, const Options& given)
      : RealMachine(root, name, given.pool_bytes, given.disk_bytes) {
    auto& remote = options_.remote.emplace();
    remote.url = given.url;
    remote.s3 = given.s3;
    remote.tier.engine.scan_every = given.scan_every;
    remote.tier.engine.dispatch.breaker.probe_after = 20 * kMillisecond;
    options_.node.load_timeout = given.load_timeout;
    if (given.redis != nullptr) join(name, testing::write_secret(root + "/secret"), given.redis->over_tcp());
    if (given.behind != nullptr) options_.cluster->told_address = given.behind->address();
    start();
    if (given.behind != nullptr) given.behind->lead_to(status().at("cluster").at("address"));
    attach();
  }

  // An engine of the same model comes instead of the one that was there.
  void attach() { attach_engine(device::open_host_device().value()); }

  // Blocks that it wrote there.
  void wait_until_stored(std::uint64_t blocks) {
    const bool stored = eventually([&] { return remote().at("written").at("blocks") >= blocks; });
    ASSERT_TRUE(stored) << node_->status_json();
  }
  // Until it has looked through the store once more, from its beginning.
  void wait_for_scans() {
    const std::uint64_t before = remote().at("looked_through");
    ASSERT_TRUE(eventually([&] { return remote().at("looked_through") >= before + 2; })) << node_->status_json();
  }

  nlohmann::json remote() const { return status().at("remote"); }
  std::string messages() const { return status().at("health").at("messages").dump(); }
  bool says(const std::string& what) const {
    return eventually([&] { return messages().find(what) != std::string::npos; });
  }
};

class RemoteNodesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
    fs::create_directory(shared());
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string shared() const { return dir_ + "/shared"; }
  std::unique_ptr<Machine> machine(const std::string& name, Machine::Options options = {}) {
    if (options.url.empty()) options.url = "file://" + shared();
    return std::make_unique<Machine>(dir_, name, options);
  }
  std::vector<fs::path> objects() const {
    std::vector<fs::path> found;
    for (const auto& entry : fs::recursive_directory_iterator(shared())) {
      if (entry.path().extension() == ".kv") found.push_back(entry.path());
    }
    return found;
  }

  std::string dir_;
};

TEST_F(RemoteNodesTest, ANodeThatStartsAnewAndAnotherNodeFindWhatOneHasComputed) {
  const auto a = machine("a");
  a->compute(1);
  a->stop();  // writes what it has gathered
  EXPECT_EQ(objects().size(), 1U);
  a->start();
  EXPECT_TRUE(a->loads_all(1));
  EXPECT_EQ(a->status().at("transfers").at("from_remote").at("blocks"), kBlocks);
  a->stop();
  const auto b = machine("b");
  EXPECT_TRUE(b->loads_all(1));
  EXPECT_EQ(b->status().at("transfers").at("from_remote").at("blocks"), kBlocks);
}

TEST_F(RemoteNodesTest, OneWhoIsThereLearnsWhatAnotherWrites) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  EXPECT_TRUE(b->loads_all(1));
  b->compute(2);
  b->wait_until_stored(kBlocks);
  EXPECT_TRUE(a->loads_all(2));
  // What was read is not written back.
  EXPECT_EQ(a->remote().at("written").at("blocks"), kBlocks);
}

TEST_F(RemoteNodesTest, DamagedObjectsAreMisses) {
  const auto a = machine("a");
  a->compute(1);
  a->compute(2);
  a->stop();
  for (const auto& path : objects()) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(fs::file_size(path) / 2));
    file.put('\x5a');
  }
  const auto b = machine("b");
  b->wait_for_scans();
  // Of each the beginning, before the damage, is good; load() compares it.
  EXPECT_LT(b->load(1), kBlocks);
  EXPECT_LT(b->load(2), kBlocks);
  b->compute(1);
  EXPECT_EQ(b->load(1), kBlocks);
}

TEST_F(RemoteNodesTest, AResetReachesAllWhoShareTheStore) {
  const auto a = machine("a");
  const auto b = machine("b");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  ASSERT_TRUE(b->loads_all(1));
  a->node().reset_all();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_TRUE(eventually([&] { return b->load(1) == 0; })) << "b has it in host memory, too";
  b->wait_for_scans();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_EQ(b->load(1), 0U);
  a->compute(2);
  a->wait_until_stored(2 * kBlocks);
  EXPECT_TRUE(b->loads_all(2));
  // Also who starts later, and who was there when it was reset.
  a->stop();
  a->start();
  const auto c = machine("c");
  c->wait_for_scans();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_EQ(c->load(1), 0U);
  EXPECT_TRUE(a->loads_all(2));
  EXPECT_TRUE(c->loads_all(2));
}

TEST_F(RemoteNodesTest, WhatDrivesHoldOfBeforeAResetIsForgottenByWhoWasDown) {
  Machine::Options with_drives;
  with_drives.disk_bytes = 64U << 20;
  const auto a = machine("a", with_drives);
  const auto b = machine("b");
  a->compute(1);
  ASSERT_TRUE(eventually([&] { return a->status().at("queues").at("disk_writes") == 0; }));
  a->stop();
  b->node().reset_all();
  b->wait_for_scans();
  a->start();
  a->wait_for_scans();
  a->compute(2);  // its engine is there
  EXPECT_EQ(a->load(1), 0U);
  a->wait_until_stored(kBlocks);
  ASSERT_TRUE(b->loads_all(2));
  EXPECT_EQ(b->load(1), 0U);
  // Once only.
  a->stop();
  a->start();
  a->wait_for_scans();
  EXPECT_TRUE(a->loads_all(2));
  EXPECT_EQ(a->status().at("node").at("resets"), 0);
}

TEST_F(RemoteNodesTest, WhatCannotBeWrittenOrFoundIsTold) {
  Machine::Options nowhere;
  nowhere.url = "file://" + dir_ + "/not/mounted";
  const auto a = machine("a", nowhere);
  EXPECT_TRUE(a->says("is not there; FlexKV does not make it")) << a->messages();
  a->compute(1);  // serves its own
  fs::create_directories(dir_ + "/not/mounted");
  EXPECT_TRUE(eventually([&] { return a->messages() == "[]"; })) << a->messages();
  if (::geteuid() == 0) return;  // may write everywhere
  const auto b = machine("b");
  fs::permissions(shared(), fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_TRUE(b->says("Permission denied")) << b->messages();
  fs::permissions(shared(), fs::perms::owner_all);
}

TEST_F(RemoteNodesTest, AWrongUrlLeavesTheNodeWithoutTheTier) {
  Machine::Options wrong;
  wrong.url = "s3://B";
  const auto a = machine("a", wrong);
  EXPECT_NE(a->messages().find("the remote tier is off: remote store 's3://B': a bucket's name has"), std::string::npos)
      << a->messages();
  a->compute(1);
}

TEST_F(RemoteNodesTest, ADirectoryThatDisappearsIsLeftAloneAndFoundAgain) {
  const auto a = machine("a");
  a->compute(1);
  a->wait_until_stored(kBlocks);
  fs::rename(shared(), shared() + ".away");
  EXPECT_TRUE(a->says("remote tier")) << a->messages();
  a->compute(2);
  EXPECT_EQ(a->load(1), kBlocks);
  fs::rename(shared() + ".away", shared());
  EXPECT_TRUE(eventually([&] { return a->messages() == "[]"; })) << a->messages();
  const auto b = machine("b");
  EXPECT_TRUE(b->loads_all(1));
}

TEST_F(RemoteNodesTest, WithDrivesAndPeersAndBehindThem) {
  const testing::RedisServer redis;
  Machine::Options in_cluster;
  in_cluster.redis = &redis;
  in_cluster.disk_bytes = 64U << 20;
  const auto a = machine("a", in_cluster);
  auto b = machine("b", in_cluster);
  a->compute(1);
  ASSERT_TRUE(b->loads_all(1));  // from a, or from the store
  a->node().reset_all();
  // Each hears of it by Redis and from the store.
  const auto settled = [](const Machine& machine) {
    const auto status = machine.status();
    return status.at("cluster").at("directory").at("epoch") == 1 && status.at("remote").at("resets") == 1;
  };
  ASSERT_TRUE(eventually([&] { return settled(*a) && settled(*b); })) << a->node().status_json();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_EQ(b->load(1), 0U);
  a->compute(2);
  EXPECT_TRUE(b->loads_all(2));
  a->stop();
  const auto c = machine("c", in_cluster);
  EXPECT_TRUE(c->loads_all(2));
  EXPECT_EQ(c->load(1), 0U);
}

TEST_F(RemoteNodesTest, WhoKnowsOfAResetReadsNothingFromANodeThatDoesNotYet) {
  const testing::RedisServer redis;
  Machine::Options in_cluster;
  in_cluster.redis = &redis;
  const auto a = machine("a", in_cluster);
  in_cluster.scan_every = 3600 * kSecond;
  const auto b = machine("b", in_cluster);
  const auto outside = machine("outside");
  a->wait_for_scans();
  b->compute(1);
  b->compute(2);
  ASSERT_TRUE(a->loads_all(2));  // so it knows of all that b has
  outside->node().reset_all();
  ASSERT_TRUE(eventually([&] { return a->remote().at("resets") == 1; }));
  EXPECT_EQ(a->load(1), 0U);
  a->wait_for_scans();
  EXPECT_EQ(a->load(1), 0U);
  EXPECT_EQ(b->load(1), kBlocks) << "it does not know";
  // Until it does.
  b->node().reset_all();
  const auto settled = [](const Machine& machine) {
    return machine.status().at("cluster").at("directory").at("epoch") == 1 && machine.remote().at("resets") == 2;
  };
  ASSERT_TRUE(eventually([&] { return settled(*a) && settled(*b); }));
  b->compute(3);
  EXPECT_TRUE(a->loads_all(3));
  EXPECT_EQ(a->load(1), 0U);
}

TEST_F(RemoteNodesTest, WhoMeetsItsClusterLateMakesNobodyForget) {
  testing::RedisServer redis;
  Machine::Options in_cluster;
  in_cluster.redis = &redis;
  const auto a = machine("a", in_cluster);
  a->wait_for_scans();  // who has listed no marks yet leaves others
  a->node().reset_all();
  const auto settled = [](const Machine& machine) {
    return machine.status().at("cluster").at("directory").at("epoch") == 1 && machine.remote().at("resets") == 1;
  };
  ASSERT_TRUE(eventually([&] { return settled(*a); })) << a->node().status_json();
  redis.freeze();
  const auto b = machine("b", in_cluster);
  b->compute(1);
  b->wait_for_scans();
  redis.thaw();
  ASSERT_TRUE(eventually([&] { return settled(*b); })) << b->node().status_json();
  a->wait_for_scans();
  EXPECT_TRUE(settled(*a)) << a->node().status_json();
  EXPECT_EQ(b->load(1), 0U) << "it may be from before the reset";
  b->compute(2);
  EXPECT_TRUE(a->loads_all(2));
}

TEST_F(RemoteNodesTest, WhoDrainsGivesTheStoreWhatOnlyItsMemoryHas) {
  constexpr std::uint64_t kPrompts = 8;
  Machine::Options late;
  late.url = "file://" + dir_ + "/mounted-late";
  late.pool_bytes = 8U << 20;
  const auto a = machine("a", late);
  ASSERT_TRUE(a->says("is not there"));
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) a->compute(seed);
  const auto drain = [&] { return a->status().at("node").at("drain"); };
  a->node().drain(100 * kMillisecond);
  EXPECT_FALSE(a->node().wait_drained()) << "the store is not there";
  ASSERT_TRUE(eventually([&] { return drain().at("host_only_blocks") == kPrompts * kBlocks; })) << drain();
  EXPECT_EQ(drain().at("state"), "late");
  fs::create_directory(dir_ + "/mounted-late");
  a->node().drain(60 * kSecond);
  EXPECT_TRUE(a->node().wait_drained()) << a->node().status_json();
  EXPECT_EQ(drain().at("offered_blocks"), kPrompts * kBlocks);
  EXPECT_EQ(drain().at("host_only_blocks"), 0);
  EXPECT_EQ(a->remote().at("written").at("blocks"), kPrompts * kBlocks) << "each once";
  a->stop();
  const auto b = machine("b", late);
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) EXPECT_TRUE(b->loads_all(seed));
  b->node().drain(60 * kSecond);
  EXPECT_TRUE(b->node().wait_drained());
  EXPECT_EQ(b->status().at("node").at("drain").at("offered_blocks"), 0) << "the store has all of it";
}

TEST_F(RemoteNodesTest, OverS3) {
  const testing::S3Server server;
  Machine::Options s3;
  s3.url = testing::S3Server::kUrl;
  s3.s3 = server.user();
  const auto a = machine("a", s3);
  a->compute(1);
  a->stop();
  const auto b = machine("b", s3);
  EXPECT_TRUE(b->loads_all(1));
  Machine::Options stranger = s3;
  stranger.s3.secret_key = "0123456789012345678901234567890123456789";
  const auto c = machine("c", stranger);
  EXPECT_TRUE(c->says("these credentials may not do that")) << c->messages();
  EXPECT_EQ(c->status().dump().find(stranger.s3.secret_key), std::string::npos);
  Machine::Options missing = s3;
  missing.url = "s3://nobucket";
  const auto d = machine("d", missing);
  EXPECT_TRUE(d->says("there is no such bucket")) << d->messages();
  d->compute(1);
}

// Loads may take far longer than a test in these two: what ends them is that nothing more comes.
TEST_F(RemoteNodesTest, WhatANodeThatStopsDoesNotBringIsReadFromTheStore) {
  const testing::RedisServer redis;
  testing::Wire wire("");
  Machine::Options in_cluster;
  in_cluster.redis = &redis;
  in_cluster.load_timeout = 3600 * kSecond;
  Machine::Options stopping = in_cluster;
  stopping.behind = &wire;
  const auto a = machine("a", stopping);
  const auto b = machine("b", in_cluster);
  a->compute(1);
  a->wait_until_stored(kBlocks);
  ASSERT_TRUE(b->loads_all(1));
  a->compute(2);
  a->wait_until_stored(2 * kBlocks);
  b->wait_for_scans();
  ASSERT_TRUE(eventually([&] { return b->status().at("cluster").at("directory").at("blocks") == 2 * kBlocks; }));
  wire.swallow(true);
  EXPECT_EQ(b->load(2), kBlocks);
  EXPECT_EQ(b->status().at("transfers").at("from_remote").at("blocks"), 2 * kBlocks);
}

TEST_F(RemoteNodesTest, ALoadEndsWhenTheStoreStops) {
  const testing::S3Server server;
  Machine::Options s3;
  s3.url = testing::S3Server::kUrl;
  s3.s3 = server.user();
  const auto a = machine("a", s3);
  a->compute(1);
  a->wait_until_stored(kBlocks);
  a->compute(2);
  a->wait_until_stored(2 * kBlocks);
  const std::string address = s3.s3.endpoint.substr(s3.s3.endpoint.find("//") + 2);
  testing::Wire wire(address);
  s3.s3.endpoint = "http://" + wire.address();
  s3.load_timeout = 3600 * kSecond;
  s3.scan_every = 3600 * kSecond;
  const auto b = machine("b", s3);
  ASSERT_TRUE(b->loads_all(1));
  wire.swallow(true);
  EXPECT_EQ(b->load(2), 0U);
  EXPECT_EQ(b->remote().at("read").at("given_up"), 1);
  EXPECT_EQ(b->load(1), kBlocks) << "its own";
  wire.swallow(false);
  EXPECT_TRUE(b->loads_all(2));
}

}  // namespace
}  // namespace flexkv
