// The real node, agents and clients, with their threads, sockets and rings, on host memory: what the simulation leaves
// out. Small enough to run under the thread sanitizer.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/agent/rank_agent.h"
#include "flexkv/base/prng.h"
#include "flexkv/client/client.h"
#include "flexkv/device/host_device.h"
#include "flexkv/disk/check.h"
#include "flexkv/server/node_server.h"
#include "real_engine.h"

namespace flexkv {
namespace {

using testing::Engine;
using testing::eventually;
using testing::kBlockBytes;
using testing::kBlocks;
using testing::kDeviceBlocks;
using testing::kLayers;
using testing::prompt;

class RealThreads : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::shared_ptr<server::NodeServer> start_node(std::uint64_t pool_bytes = 1U << 20, std::uint64_t disk_bytes = 0,
                                                 const admission::Endurance& endurance = {}) const {
    server::NodeServerOptions options;
    options.node.pool_bytes = pool_bytes;
    options.huge_pages = false;
    options.runtime_dir = dir_;
    options.name = "node";
    options.mode = "test";
    options.node.disk_admission = false;  // all that is saved is expected there
    if (disk_bytes > 0) options.disk.directories = {dir_ + "/ssd-a", dir_ + "/ssd-b"};
    options.disk.bytes = disk_bytes;
    options.disk.endurance = endurance;
    auto started = server::NodeServer::start(options);
    EXPECT_TRUE(started.ok()) << (started.ok() ? "" : started.error().message);
    return std::move(started).value();
  }

  std::string dir_;
};

// Blocks [0, kBlocks) from device blocks of the same numbers, or to [32, ...): nobody arms them. How the job ended.
proto::JobResult run_at_once(client::Client& client, bool save, const std::vector<std::array<std::byte, 32>>& hashes) {
  const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
  std::vector<std::uint32_t> device_blocks(hashes.size());
  for (std::uint32_t i = 0; i < hashes.size(); ++i) device_blocks[i] = save ? i : 32 + i;
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, views);
  const auto job = save ? client.save(sequence, kBlocks, {}, 0, device_blocks, client::Client::Start::kAtOnce)
                        : client.load(sequence, 0, device_blocks, client::Client::Start::kAtOnce);
  client.close_sequence(sequence);
  EXPECT_NE(job, 0U);
  while (client.wait_ended_jobs(10 * kSecond)) {
    for (const auto& result : client.take_ended_jobs()) {
      if (result.job == job) return result;
    }
  }
  ADD_FAILURE() << "a job did not end";
  return {};
}

void save_and_load(Engine& engine, std::uint64_t seed) {
  const auto hashes = prompt(seed);
  for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(block, seed * 1000 + block);
  for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(32 + block, 77);
  // Until all ranks are attached the node refuses, and a save that was posted to it is lost.
  ASSERT_TRUE(eventually([&] { return engine.save(hashes) && engine.load(hashes) == kBlocks; }));
  for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(engine.holds(32 + block, seed * 1000 + block));
}

TEST_F(RealThreads, EmbeddedNodeServesTwoRanks) {
  Engine engine(dir_, "engine", 2);  // before there is a node
  const auto node = start_node();
  engine.embed(*node);
  save_and_load(engine, 1);
  save_and_load(engine, 2);
  engine.disconnect();
}

// Ranks that wait for nothing once woke themselves up without end.
TEST_F(RealThreads, AnIdleEngineTakesNoProcessor) {
  const auto processor_time = [] {
    timespec time{};
    ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return time.tv_sec * kSecond + time.tv_nsec;
  };
  const auto node = start_node();
  Engine engine(dir_, "engine", 2);
  engine.embed(*node);
  save_and_load(engine, 1);
  constexpr Nanos kIdle = 500 * kMillisecond;
  EXPECT_TRUE(eventually([&] {
    const Nanos before = processor_time();
    std::this_thread::sleep_for(std::chrono::nanoseconds(kIdle));
    return processor_time() - before < kIdle / 5;
  }));
  engine.disconnect();
}

TEST_F(RealThreads, LayersAreThereWhenTheEngineIsHeldForThemNoLonger) {
  const auto node = start_node();
  Engine engine(dir_, "engine", 2);
  engine.embed(*node);
  save_and_load(engine, 1);
  const auto hashes = prompt(1);
  for (std::uint32_t round = 0; round < 50; ++round) {
    for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(32 + block, 77 + round);
    ASSERT_EQ(engine.load(hashes, true), kBlocks);
    engine.fill(31, 1000);  // as block 0 of the prompt
    std::uint32_t rank = 0;
    for (const std::byte seen : engine.take_seen()) EXPECT_EQ(seen, engine.first_byte(rank++ % 2, 31));
    for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(engine.holds(32 + block, 1000 + block));
  }
  // A load that the node never commands lets the engine go on, too, and is reported as failed.
  const proto::JobId unknown = 12345;
  engine.agent(0).arm_loads_in_parts({&unknown, 1}, 0);
  std::jthread canceling([&] { engine.agent(0).cancel({&unknown, 1}); });
  engine.agent(0).hold_engine({&unknown, 1}, 1, 0);
  EXPECT_EQ(engine.agent(0).wait_loads({&unknown, 1}).size(), 1U);
  engine.disconnect();
}

TEST_F(RealThreads, AClientWaitsForTheEndOfItsJobsOrOfItsNode) {
  auto node = start_node();
  for (const bool embedded : {true, false}) {
    Engine engine(dir_, embedded ? "embedded" : "remote", 1);
    embedded ? engine.embed(*node) : engine.connect(dir_);
    save_and_load(engine, embedded ? 1 : 2);
    // What it ordered so far: a save and a load at least.
    for (std::size_t ended = 0; ended < 2;) {
      (void)engine.client().wait_ended_jobs(60 * kSecond);
      const std::size_t more = engine.client().take_ended_jobs().size();
      ASSERT_GT(more, 0U);
      ended += more;
    }
    if (embedded) {
      engine.disconnect();
    } else {
      std::jthread stopping([&] { node.reset(); });
      while (engine.client().ready()) {
        (void)engine.client().wait_ended_jobs(60 * kSecond);
        (void)engine.client().take_ended_jobs();
      }
    }
  }
}

TEST_F(RealThreads, SecondEngineFindsWhatTheFirstSaved) {
  const auto node = start_node();
  const auto hashes = prompt(5);
  {
    Engine first(dir_, "first", 1);
    first.connect(dir_);
    save_and_load(first, 5);
  }
  Engine second(dir_, "second", 1);
  second.connect(dir_);
  ASSERT_TRUE(eventually([&] { return second.load(hashes) == kBlocks; }));
  for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(second.holds(32 + block, 5000 + block));
}

TEST_F(RealThreads, WhatRanksHoldAlikeIsStoredOnceAndServedToAnyNumberOfThem) {
  const auto node = start_node();
  {
    Engine wide(dir_, "wide", 5, 2);
    wide.connect(dir_);
    const auto copied = [&] {
      std::uint64_t blocks = 0;
      for (std::uint32_t rank = 0; rank < 5; ++rank) blocks += wide.agent(rank).counters().saved_blocks;
      return blocks;
    };
    save_and_load(wide, 5);  // from now on all ranks are there
    const std::uint64_t before = copied();
    save_and_load(wide, 6);
    wide.fill(0, 42);
    const auto short_prompt = prompt(7, 1);  // a single block: most ranks have nothing to copy
    ASSERT_TRUE(wide.save(short_prompt));
    ASSERT_TRUE(eventually([&] { return wide.load(short_prompt) == 1; }));
    EXPECT_TRUE(wide.holds(32, 42));
    EXPECT_EQ(copied() - before, 2 * (kBlocks + 1));
  }
  Engine narrow(dir_, "narrow", 2, 2);
  narrow.connect(dir_);
  ASSERT_TRUE(eventually([&] { return narrow.load(prompt(5)) == kBlocks; }));
  for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(narrow.holds(32 + block, 5000 + block));
  const auto spaces = nlohmann::json::parse(node->status_json())["spaces"];
  ASSERT_EQ(spaces.size(), 1U);
  EXPECT_EQ(spaces[0]["block_bytes"], 2 * kBlockBytes);
  EXPECT_EQ(spaces[0]["slot_bytes"], 2 * kBlockBytes);
}

TEST_F(RealThreads, EngineOutlivesItsNode) {
  auto node = start_node();
  Engine engine(dir_, "engine", 2);
  engine.connect(dir_);
  save_and_load(engine, 1);
  node.reset();
  ASSERT_TRUE(eventually([&] { return !engine.agent(0).counters().attached; }));
  EXPECT_EQ(engine.load(prompt(1)), 0u);
  node = start_node();
  EXPECT_EQ(engine.load(prompt(1)), 0u) << "a new node knows nothing";
  save_and_load(engine, 2);
}

TEST_F(RealThreads, ManyEnginesAtOnceInASmallPool) {
  const auto node = start_node(60 * kBlockBytes);  // less than three prompts
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([this, i] {
      Engine engine(dir_, "engine-" + std::to_string(i), 1);
      engine.connect(dir_);
      for (int round = 0; round < 20; ++round) {
        const auto seed = static_cast<std::uint64_t>((i + round) % 4 + 1);
        const auto hashes = prompt(seed);
        for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(block, seed * 1000 + block);
        (void)engine.save(hashes);
        const std::uint32_t loaded = engine.load(hashes);
        for (std::uint32_t block = 0; block < loaded; ++block) {
          EXPECT_TRUE(engine.holds(32 + block, seed * 1000 + block));
        }
      }
    });
  }
  threads.emplace_back([&] {
    for (int i = 0; i < 50; ++i) EXPECT_FALSE(node->status_json().empty());
  });
  for (auto& thread : threads) thread.join();
}

TEST_F(RealThreads, NodeRestartsUnderLoad) {
  auto node = start_node();
  std::atomic<bool> stop{false};
  std::thread worker([&] {
    Engine engine(dir_, "engine", 1);
    engine.connect(dir_);
    std::uint64_t seed = 1;
    while (!stop) {
      const auto hashes = prompt(seed);
      for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(block, seed * 1000 + block);
      (void)engine.save(hashes);
      const std::uint32_t loaded = engine.load(hashes);
      for (std::uint32_t block = 0; block < loaded; ++block) EXPECT_TRUE(engine.holds(32 + block, seed * 1000 + block));
      ++seed;
    }
  });
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    node.reset();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    node = start_node();
  }
  stop = true;
  worker.join();
}

nlohmann::json status(const server::NodeServer& node) { return nlohmann::json::parse(node.status_json()); }

TEST_F(RealThreads, BlocksThatHostMemoryCannotHoldComeFromDrivesAlsoAfterARestart) {
  constexpr std::uint64_t kPrompts = 12;
  constexpr std::uint64_t kPool = 64 * 2 * kBlockBytes;  // less than three prompts of two ranks
  auto node = start_node(kPool, 64U << 20);
  Engine engine(dir_, "engine", 2);
  engine.connect(dir_);
  for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) {
    save_and_load(engine, seed);
    ASSERT_TRUE(eventually([&] { return status(*node).at("queues").at("disk_writes") == 0; }));
  }
  const auto load_all = [&] {
    for (std::uint64_t seed = 1; seed <= kPrompts; ++seed) {
      for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(32 + block, 77);
      ASSERT_TRUE(eventually([&] { return engine.load(prompt(seed)) == kBlocks; })) << "prompt " << seed;
      for (std::uint32_t block = 0; block < kBlocks; ++block)
        EXPECT_TRUE(engine.holds(32 + block, seed * 1000 + block));
    }
  };
  load_all();
  EXPECT_GE(status(*node).at("transfers").at("from_disk").at("blocks"), (kPrompts - 2) * kBlocks);
  node.reset();
  node = start_node(kPool, 64U << 20);
  load_all();
  const auto after = status(*node);
  EXPECT_EQ(after.at("disk").at("recovered_blocks"), kPrompts * kBlocks);
  EXPECT_GE(after.at("transfers").at("from_disk").at("blocks"), kPrompts * kBlocks);
  engine.client().reset();
  EXPECT_EQ(engine.load(prompt(1)), 0U);
  engine.disconnect();
  engine.connect(dir_);  // a client of the weights as stored: its keys are those from before the reset
  EXPECT_TRUE(eventually([&] { return engine.client().ready(); }));
  EXPECT_EQ(engine.load(prompt(1)), 0U);
  node.reset();
  node = start_node(kPool, 64U << 20);
  ASSERT_TRUE(eventually([&] { return engine.agent(0).counters().attached && engine.agent(1).counters().attached; }));
  ASSERT_TRUE(eventually([&] { return engine.client().ready(); }));
  EXPECT_EQ(engine.load(prompt(1)), 0U) << "a reset counts after a restart, too";
}

TEST_F(RealThreads, WritingEndsWithTheBudgetAlsoOverARestartAndTheStatusTellsIt) {
  constexpr admission::Endurance kEndurance{.dwpd = 1, .capacity_bytes = 24 << 20};
  auto node = start_node(4U << 20, 64U << 20, kEndurance);
  Engine engine(dir_, "engine", 1);
  engine.connect(dir_);
  const auto fill = [&](std::uint64_t first) {
    for (std::uint64_t seed = first; seed < first + 12; ++seed) {
      save_and_load(engine, seed);
      ASSERT_TRUE(eventually([&] { return status(*node).at("queues").at("disk_writes") == 0; }));
    }
  };
  fill(1);
  auto now = status(*node);
  EXPECT_GT(now.at("transfers").at("to_disk").at("blocks"), 2 * kBlocks);
  EXPECT_GT(now.at("transfers").at("to_disk").at("failed_blocks").at("budget"), 2 * kBlocks);
  auto endurance = now.at("disk").at("endurance");
  EXPECT_EQ(endurance.at("daily_bytes"), 24 << 20);
  EXPECT_GT(endurance.at("pressure"), 0.5);
  EXPECT_GT(endurance.at("days_left"), 0);
  EXPECT_LE(endurance.at("written_bytes"), 1 << 20);  // an hour of 24 MiB a day, and what seconds fill in
  EXPECT_EQ(endurance.at("written_bytes"), endurance.at("last_day_bytes"));
  EXPECT_EQ(now.at("disk").at("drives").at(0).at("endurance").at("daily_bytes"), 12 << 20);
  node.reset();
  const std::uint64_t before = endurance.at("written_bytes");
  node = start_node(4U << 20, 64U << 20, kEndurance);
  ASSERT_TRUE(eventually([&] { return engine.agent(0).counters().attached; }));
  fill(100);
  endurance = status(*node).at("disk").at("endurance");
  EXPECT_GE(endurance.at("written_bytes"), before);
  EXPECT_LE(endurance.at("written_bytes"), 1 << 20);
}

TEST_F(RealThreads, ACheckOfTheDrivesFindsEveryBlockAndTheOneThatWasChanged) {
  auto node = start_node(1U << 20, 16U << 20);
  Engine engine(dir_, "engine", 1);
  engine.connect(dir_);
  save_and_load(engine, 1);
  EXPECT_FALSE(disk::check(dir_ + "/ssd-a", 0, [](auto, auto) {}).ok()) << "a node uses it";
  ASSERT_TRUE(eventually([&] { return status(*node).at("queues").at("disk_writes") == 0; }));
  node.reset();
  const auto check = [&] { return disk::check(dir_ + "/ssd-a", 0, [](auto, auto) {}).value(); };
  EXPECT_EQ(check().blocks, kBlocks / 2);
  EXPECT_EQ(check().bad_blocks, 0U);
  EXPECT_TRUE(check().problems.empty());
  for (const auto& file : std::filesystem::directory_iterator(dir_ + "/ssd-a")) {
    if (file.path().extension() != ".blocks") continue;
    std::fstream blocks(file.path(), std::ios::in | std::ios::out | std::ios::binary);
    blocks.seekp(100);
    blocks.put('!');
  }
  EXPECT_EQ(check().blocks, kBlocks / 2);
  EXPECT_EQ(check().bad_blocks, 1U);
  node = start_node(1U << 20, 16U << 20);
  ASSERT_TRUE(eventually([&] { return engine.agent(0).counters().attached; }));
  EXPECT_EQ(engine.load(prompt(1)), 0U) << "its first block is bad";
}

TEST_F(RealThreads, PrefetchBringsBlocksFromDrivesToHostMemory) {
  auto node = start_node(1U << 20, 16U << 20);
  Engine engine(dir_, "engine", 1);
  engine.connect(dir_);
  save_and_load(engine, 1);
  ASSERT_TRUE(eventually([&] { return status(*node).at("queues").at("disk_writes") == 0; }));
  node.reset();
  node = start_node(1U << 20, 16U << 20);
  EXPECT_TRUE(eventually([&] {
    const auto hashes = prompt(1);
    const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
    const auto sequence = engine.client().open_sequence();
    engine.client().prefetch(sequence, 0, views);
    engine.client().close_sequence(sequence);
    return status(*node).at("disk").at("prefetched_blocks") == kBlocks;
  }));
  ASSERT_TRUE(eventually([&] { return engine.load(prompt(1)) == kBlocks; }));
  for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(engine.holds(32 + block, 1000 + block));
  EXPECT_EQ(status(*node).at("transfers").at("from_disk").at("blocks"), kBlocks);
}

TEST_F(RealThreads, ManyEnginesAtOnceInASmallPoolWithDrives) {
  const auto node = start_node(60 * kBlockBytes, 1U << 20);  // the drives hold less than all prompts, too
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([this, i] {
      Engine engine(dir_, "engine-" + std::to_string(i), 1);
      engine.connect(dir_);
      for (int round = 0; round < 60; ++round) {
        const auto seed = static_cast<std::uint64_t>((i + round) % 13 + 1);
        const auto hashes = prompt(seed);
        for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(block, seed * 1000 + block);
        (void)engine.save(hashes);
        const std::uint32_t loaded = engine.load(hashes);
        for (std::uint32_t block = 0; block < loaded; ++block) {
          EXPECT_TRUE(engine.holds(32 + block, seed * 1000 + block));
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

TEST_F(RealThreads, WhatNobodyArmsRunsAtOnceAndItsEndIsToldToWhoWaits) {
  for (const bool embedded : {true, false}) {
    auto node = start_node();
    Engine engine(dir_, "engine", 2);
    embedded ? engine.embed(*node) : engine.connect(dir_);
    ASSERT_TRUE(eventually([&] { return engine.client().served(10 * kSecond); }));
    EXPECT_FALSE(engine.client().wait_ended_jobs(0));
    for (std::uint32_t block = 0; block < kBlocks; ++block) engine.fill(block, block);
    const auto hashes = prompt(1);
    EXPECT_EQ(run_at_once(engine.client(), true, hashes).status, proto::JobStatus::kDone);
    EXPECT_EQ(run_at_once(engine.client(), false, hashes).status, proto::JobStatus::kDone);
    // The end came through shared memory; this is where the thread sanitizer sees that the copies precede it.
    for (std::uint32_t rank = 0; rank < 2; ++rank) (void)engine.agent(rank).counters();
    for (std::uint32_t block = 0; block < kBlocks; ++block) EXPECT_TRUE(engine.holds(32 + block, block)) << block;
    engine.disconnect();
  }
}

TEST_F(RealThreads, WhatStartedAtOnceHasFailedWhenItsNodeIsGone) {
  auto node = start_node();
  // A rank that is told of copies and never carries them out.
  proto::AgentHello hello;
  hello.engine_id = "engine";
  hello.rank_count = 0;
  hello.shard_bytes = kBlockBytes;
  hello.block_count = kDeviceBlocks;
  ipc::Hello frame;
  frame.role = static_cast<std::uint32_t>(proto::Role::kAgent);
  proto::ClientHello client_hello;
  client_hello.engine_id = "engine";
  client::Client client(client::open_remote_port(dir_, "node", client_hello).value(), client_hello);
  ASSERT_TRUE(eventually([&] { return client.ready(); }));
  frame.payload = proto::encode(hello);
  const auto rank = ipc::Channel::connect(node->socket_path(), frame, 10 * kSecond);
  ASSERT_TRUE(rank.ok()) << rank.error().message;
  ASSERT_TRUE(client.served(0));

  const auto hashes = prompt(1);
  const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
  const std::vector<std::uint32_t> device_blocks(kBlocks, 1);
  const auto sequence = client.open_sequence();
  const auto job = client.save(sequence, 0, views, 0, device_blocks, client::Client::Start::kAtOnce);
  ASSERT_NE(job, 0U);
  EXPECT_FALSE(client.wait_ended_jobs(0));
  node.reset();
  ASSERT_TRUE(client.wait_ended_jobs(20 * kSecond));
  const auto ended = client.take_ended_jobs();
  ASSERT_EQ(ended.size(), 1U);
  EXPECT_EQ(ended[0].job, job);
  EXPECT_EQ(ended[0].reason, proto::Reason::kNoNode);
  EXPECT_FALSE(client.wait_ended_jobs(0));
}

}  // namespace
}  // namespace flexkv
