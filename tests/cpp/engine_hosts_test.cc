// One engine whose ranks are on several machines, each with a node of its own: real nodes, agents, client and TLS in
// one process, over wires that fail.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "flexkv/base/prng.h"
#include "flexkv/client/client.h"
#include "flexkv/client/reset_host.h"
#include "flexkv/device/host_device.h"
#include "flexkv/net/frame_stream.h"
#include "flexkv/net/secret.h"
#include "flexkv/net/tcp.h"
#include "flexkv/proto/host_frames.h"
#include "real_machine.h"
#include "seeds.h"
#include "wire.h"

namespace flexkv {
namespace {

using client::Client;
using testing::eventually;
using testing::kBlocks;
using testing::kSecret;
using testing::prompt;
using testing::Wire;

// A machine: its node, and the rank of the engine that it has.
class Machine : public testing::RealMachine {
 public:
  Machine(const std::string& root, const std::string& name, const std::string& secret, std::uint64_t pool_bytes)
      : RealMachine(root, name, pool_bytes, 0) {
    options_.node.load_timeout = options_.node.save_timeout = 2 * kSecond;
    options_.door = server::EngineDoorOptions{"127.0.0.1:0", secret, "default"};
    start();
    engine_ = std::make_unique<testing::Engine>(dir_, "engine", 1);
  }
  const std::string& directory() const { return dir_; }
  testing::Engine& ranks() { return *engine_; }
  std::uint64_t used_bytes() const { return status().at("pool").at("used_bytes").get<std::uint64_t>(); }
  std::uint64_t jobs() const { return status().at("queues").at("jobs_in_flight").get<std::uint64_t>(); }
  bool has_scheduler() const {
    const auto engines = status().at("engines");
    return !engines.empty() && engines[0].at("state") == "ready";
  }
};

class EngineHosts : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
    secret_ = testing::write_secret(dir_ + "/secret");
  }
  void TearDown() override {
    client_.reset();
    machines_.clear();
    std::filesystem::remove_all(dir_);
  }

  void start(std::uint64_t pool_bytes = 1U << 20) {
    for (const char* name : {"a", "b"}) {
      machines_.push_back(std::make_unique<Machine>(dir_, name, secret_, pool_bytes));
    }
    wire_ = std::make_unique<Wire>(machines_[1]->node().door_address());
    connect(kSecret);
  }
  void connect(const std::string& secret) {
    client_.reset();
    std::vector<std::unique_ptr<client::HostPort>> hosts;
    hosts.push_back(client::open_unix_port(machines_[0]->directory(), "node", hello(0)).value());
    auto tls =
        net::TlsContext::create(net::Secret::from_text(secret).value(), std::string(proto::kHostPurpose) + "default");
    hosts.push_back(client::open_tls_port(std::move(tls).value(), wire_->address(), hello(1)).value());
    client_ = std::make_unique<Client>(client::join_ports(std::move(hosts)), hello(0), client::random_first_job());
  }
  static proto::ClientHello hello(std::uint8_t host) {
    proto::ClientHello hello;
    hello.engine_id = "engine";
    hello.model = "model";
    hello.fingerprint[0] = std::byte{host};
    return hello;
  }
  // The nodes' names for the blocks stay; each comes back with nothing.
  void restart(std::size_t machine) {
    machines_[machine]->stop();
    machines_[machine]->start();
    wire_->lead_to(machines_[1]->node().door_address());
  }

  // What a rank's block of a prompt holds is another one's on the other machine.
  void fill(std::uint32_t device_block, std::uint64_t content) {
    for (std::size_t i = 0; i < machines_.size(); ++i) machines_[i]->ranks().fill(device_block, content * 2 + i);
  }
  bool holds(std::uint32_t device_block, std::uint64_t content) {
    bool all = true;
    for (std::size_t i = 0; i < machines_.size(); ++i) {
      all = all && machines_[i]->ranks().holds(device_block, content * 2 + i);
    }
    return all;
  }

  // Orders the save of a prompt that device blocks [0, kBlocks) hold. 0: refused.
  client::JobId begin_save(std::uint64_t seed, bool armed = true) {
    const auto hashes = prompt(seed);
    const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
    std::vector<std::uint32_t> device_blocks(kBlocks);
    for (std::uint32_t block = 0; block < kBlocks; ++block) fill(device_blocks[block] = block, seed * 1000 + block);
    const auto sequence = client_->open_sequence();
    const auto job = client_->save(sequence, client_->known_hashes(sequence), views, 0, device_blocks);
    client_->close_sequence(sequence);
    if (job != 0 && armed) arm_save(job);
    return job;
  }
  void arm_save(client::JobId job) {
    for (const auto& machine : machines_) machine->ranks().agent(0).arm_saves({&job, 1}, 0);
  }
  // True: it was kept by all.
  bool end_save(client::JobId job) {
    const auto generation = client_->generation();
    while (client_->wait_ended_jobs(10 * kSecond)) {
      for (const auto& result : client_->take_ended_jobs()) {
        if (result.job == job) return result.status == proto::JobStatus::kDone;
      }
    }
    EXPECT_TRUE(generation == 0 || client_->generation() != generation) << "a save did not end";
    return false;
  }
  std::uint32_t look_up(std::uint64_t seed) {
    const auto hashes = prompt(seed);
    const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
    const auto sequence = client_->open_sequence();
    const auto found = client_->lookup(sequence, 0, views).matched_blocks;
    client_->close_sequence(sequence);
    return found;
  }
  // How many blocks were loaded, and are right; 0 if the load failed on one of the machines.
  std::uint32_t load(
      std::uint64_t seed, const std::function<void()>& before = [] {}) {
    const auto hashes = prompt(seed);
    const std::vector<std::span<const std::byte>> views(hashes.begin(), hashes.end());
    for (std::uint32_t block = 0; block < kBlocks; ++block) fill(32 + block, 77);
    const auto sequence = client_->open_sequence();
    std::uint32_t found = client_->lookup(sequence, 0, views).matched_blocks;
    if (found > 0) {
      before();
      std::vector<std::uint32_t> device_blocks(found);
      for (std::uint32_t i = 0; i < found; ++i) device_blocks[i] = 32 + i;
      const auto job = client_->load(sequence, 0, device_blocks);
      for (const auto& machine : machines_) machine->ranks().agent(0).arm_loads({&job, 1}, 0);
      bool failed = false;
      for (const auto& machine : machines_) failed |= !machine->ranks().agent(0).wait_loads({&job, 1}).empty();
      if (failed) found = 0;
    }
    client_->close_sequence(sequence);
    for (std::uint32_t block = 0; block < found; ++block) {
      EXPECT_TRUE(holds(32 + block, seed * 1000 + block)) << "block " << block << " of prompt " << seed;
    }
    return found;
  }
  bool keeps(std::uint64_t seed) {
    return eventually([&] {
      const auto job = begin_save(seed);
      return job != 0 && end_save(job) && load(seed) == kBlocks;
    });
  }

  std::string dir_;
  std::string secret_;
  std::vector<std::unique_ptr<Machine>> machines_;
  std::unique_ptr<Wire> wire_;  // to the second machine
  std::unique_ptr<Client> client_;
};

TEST_F(EngineHosts, EachMachineKeepsThePartOfItsRanks) {
  start();
  ASSERT_TRUE(keeps(1));
  EXPECT_EQ(machines_[0]->used_bytes(), kBlocks * testing::kBlockBytes);
  EXPECT_EQ(machines_[1]->used_bytes(), kBlocks * testing::kBlockBytes);
}

TEST_F(EngineHosts, WhatOneOfThemHasLostIsNotFoundUntilItIsSavedAgain) {
  start();
  ASSERT_TRUE(keeps(1));
  machines_[1]->node().reset_all();
  EXPECT_TRUE(eventually([&] { return look_up(1) == 0; }));
  EXPECT_GT(machines_[0]->used_bytes(), 0U);
  EXPECT_TRUE(keeps(1));
}

TEST_F(EngineHosts, AResetReachesAll) {
  start();
  ASSERT_TRUE(keeps(1));
  client_->reset();
  EXPECT_TRUE(eventually([&] {
    (void)client_->take_ended_jobs();
    return machines_[0]->used_bytes() == 0 && machines_[1]->used_bytes() == 0;
  }));
  EXPECT_EQ(look_up(1), 0U);
  EXPECT_TRUE(keeps(1));
}

TEST_F(EngineHosts, AMachineThatIsGoneMeansMissesUntilItIsBack) {
  start();
  for (std::size_t machine : {1U, 0U}) {
    ASSERT_TRUE(keeps(1));
    machines_[machine]->stop();
    EXPECT_EQ(load(1), 0U);
    EXPECT_TRUE(eventually([&] { return client_->generation() == 0; }));
    EXPECT_EQ(begin_save(2), 0U);
    machines_[machine]->start();
    wire_->lead_to(machines_[1]->node().door_address());
    EXPECT_TRUE(keeps(2)) << machine;
    EXPECT_EQ(load(1), 0U) << "the other one's part alone is nothing";
  }
}

TEST_F(EngineHosts, OneThatGoesBetweenLookupAndLoadFailsTheLoad) {
  start();
  ASSERT_TRUE(keeps(1));
  EXPECT_EQ(load(1, [&] { machines_[1]->stop(); }), 0U);
  machines_[1]->start();
  wire_->lead_to(machines_[1]->node().door_address());
  ASSERT_TRUE(keeps(1));
  // The node is there, and the order does not reach it: its rank waits until its deadline.
  EXPECT_EQ(load(1, [&] { wire_->swallow(true); }), 0U);
  wire_->swallow(false);
  EXPECT_TRUE(keeps(2));
}

TEST_F(EngineHosts, OneThatIsSlowMeansAMiss) {
  start();
  ASSERT_TRUE(keeps(1));
  wire_->swallow(true);
  EXPECT_EQ(look_up(1), 0U);
  wire_->swallow(false);
  EXPECT_TRUE(eventually([&] { return load(1) == kBlocks; }));
}

// The rank on the other machine copies what the engine has overwritten, and its report is there before the word that
// the save was called off.
TEST_F(EngineHosts, NothingIsKeptOfASaveThatWasCancelledHoweverLateThatIsHeard) {
  start();
  ASSERT_TRUE(keeps(1));
  for (std::uint64_t seed = 10; seed < 15; ++seed) {
    const auto job = begin_save(seed, false);
    ASSERT_NE(job, 0U);
    ASSERT_TRUE(eventually([&] { return machines_[0]->jobs() == 1 && machines_[1]->jobs() == 1; }));
    wire_->delay(50 * kMillisecond, 0);
    client_->cancel(job);
    for (std::uint32_t block = 0; block < kBlocks; ++block) fill(block, 99);
    arm_save(job);
    ASSERT_TRUE(eventually([&] { return machines_[0]->jobs() == 0 && machines_[1]->jobs() == 0; }));
    wire_->delay(0, 0);
    // The first machine gets its part now: the second one must not have kept another's for it.
    EXPECT_TRUE(keeps(seed));
  }
}

TEST_F(EngineHosts, WhoDoesNotKnowTheSecretIsNotServed) {
  start();
  ASSERT_TRUE(keeps(1));
  connect("another secret of the tests' own, also long enough");
  EXPECT_FALSE(eventually([&] { return client_->ready() || !machines_[0]->has_scheduler(); }) && client_->ready());
  connect(kSecret);
  EXPECT_TRUE(eventually([&] { return load(1) == kBlocks; }));
}

// A scheduler by hand: what it is answered, or the end of the connection.
class RawVisitor final : public net::FrameSink {
 public:
  explicit RawVisitor(const std::string& address) {
    auto tls =
        net::TlsContext::create(net::Secret::from_text(kSecret).value(), std::string(proto::kHostPurpose) + "default");
    auto socket = net::connect_tcp(address);
    stream_.emplace(
        net::TlsStream::create(tls.value(), std::move(socket).value(), net::TlsStream::Role::kClient, "node").value());
  }
  void say(proto::HostFrame kind, std::uint64_t id, const std::vector<std::byte>& body) {
    ASSERT_TRUE(stream_->send(static_cast<std::uint32_t>(kind), id, {body}));
  }
  // The kind of the next frame; 0: the node has ended the connection.
  std::uint32_t next() {
    kind_ = 0;
    (void)eventually([&] {
      const auto state = stream_->pump(*this, 1U << 20);
      return kind_ != 0 || state == net::FrameStream::State::kClosed || state == net::FrameStream::State::kFailed;
    });
    return kind_;
  }
  std::string text() const { return {reinterpret_cast<const char*>(body_.data()), body_.size()}; }

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override {
    body_.resize(head.bytes);
    return std::span(body_);
  }
  Status on_frame(const net::FrameHead& head) override {
    kind_ = head.kind;
    return {};
  }

 private:
  std::optional<net::FrameStream> stream_;
  std::vector<std::byte> body_;
  std::uint32_t kind_ = 0;
};

TEST_F(EngineHosts, WhoBreaksTheProtocolLosesThatConnectionOnly) {
  using proto::HostFrame;
  start();
  ASSERT_TRUE(keeps(1));
  const std::string door = machines_[1]->node().door_address();
  auto other = hello(1);
  other.engine_id = "other";
  const auto kRefused = static_cast<std::uint32_t>(HostFrame::kRefused);
  const auto kWelcome = static_cast<std::uint32_t>(HostFrame::kWelcome);
  RawVisitor old(door);
  old.say(HostFrame::kHello, proto::kHostVersion + 1, proto::encode(other));
  EXPECT_EQ(old.next(), kRefused);
  EXPECT_NE(old.text().find("install the same FlexKV"), std::string::npos) << old.text();
  RawVisitor second(door);
  second.say(HostFrame::kHello, proto::kHostVersion, proto::encode(hello(1)));
  EXPECT_EQ(second.next(), kRefused);
  EXPECT_NE(second.text().find("has a scheduler attached already"), std::string::npos) << second.text();
  const std::vector<std::byte> garbage(64, std::byte{0xAB});
  RawVisitor rude(door);
  rude.say(HostFrame::kMessage, 0, proto::encode(proto::FromClient{proto::ResetRequest{}}));
  EXPECT_EQ(rude.next(), 0U);
  RawVisitor broken(door);
  broken.say(HostFrame::kHello, proto::kHostVersion, garbage);
  EXPECT_EQ(broken.next(), 0U);
  RawVisitor turning(door);
  turning.say(HostFrame::kHello, proto::kHostVersion, proto::encode(other));
  EXPECT_EQ(turning.next(), kWelcome);
  turning.say(HostFrame::kMessage, 0, garbage);
  EXPECT_EQ(turning.next(), 0U);
  EXPECT_TRUE(eventually([&] { return machines_[1]->status().at("engines").size() == 1; })) << "and is detached";
  EXPECT_EQ(load(1), kBlocks);
}

TEST_F(EngineHosts, ANodeIsResetFromAnotherMachineByWhoKnowsTheSecret) {
  start();
  ASSERT_TRUE(keeps(1));
  const auto tls = [](const std::string& secret) {
    return net::TlsContext::create(net::Secret::from_text(secret).value(), std::string(proto::kHostPurpose) + "default")
        .value();
  };
  const std::string door = machines_[1]->node().door_address();
  const auto resets = [&] { return machines_[1]->status().at("node").at("resets").get<int>(); };
  EXPECT_FALSE(client::reset_host(tls("another secret of the tests' own, also long enough"), door, 60 * kSecond).ok());
  EXPECT_EQ(resets(), 0);
  const auto done = client::reset_host(tls(kSecret), door, 60 * kSecond);
  ASSERT_TRUE(done.ok()) << done.error().message;
  EXPECT_EQ(resets(), 1) << "before it says so";
  EXPECT_EQ(look_up(1), 0U);
  EXPECT_TRUE(keeps(2)) << "the engine goes on";
  wire_->swallow(true);
  const auto late = client::reset_host(tls(kSecret), wire_->address(), 200 * kMillisecond);
  ASSERT_FALSE(late.ok());
  EXPECT_NE(late.error().message.find("in time"), std::string::npos) << late.error().message;
  wire_->swallow(false);
}

TEST_F(EngineHosts, ServesOnlyWhatIsRightThroughRandomFaults) {
  start(3 * kBlocks * testing::kBlockBytes);
  ASSERT_TRUE(keeps(1));
  std::uint32_t loads = 0;
  const std::uint64_t first = testing::number_from("FLEXKV_FIRST_SEED", 1);
  // They take seconds each, not the milliseconds of simulations, for which the sanitizers' builds ask for hundreds.
  const std::uint64_t seeds = std::min<std::uint64_t>(testing::number_from("FLEXKV_SEEDS", 6), 20);
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Prng prng(seed);
    for (int step = 0; step < 60 && !HasFailure(); ++step) {
      const std::uint64_t which = 1 + prng.below(6);
      switch (prng.below(16)) {
        case 0:
          wire_->cut();
          break;
        case 1:
          wire_->delay(static_cast<Nanos>(prng.below(30)) * kMillisecond,
                       static_cast<Nanos>(prng.below(10)) * kMillisecond);
          break;
        case 2:
          wire_->swallow(prng.chance(50));
          break;
        case 3:
          if (prng.chance(20)) restart(prng.below(2));
          break;
        case 4:
          if (prng.chance(30)) client_->reset();
          break;
        case 5:
          if (prng.chance(30)) machines_[prng.below(2)]->node().reset_all();
          break;
        case 6:
        case 7:
        case 8: {
          const auto job = begin_save(which);
          if (job != 0 && prng.chance(50)) (void)client_->wait_ended_jobs(20 * kMillisecond);
          (void)client_->take_ended_jobs();
          client_->cancel(job);
          break;
        }
        case 9:
          wire_->swallow(false);
          wire_->delay(0, 0);
          ASSERT_TRUE(keeps(which)) << "it does not recover";
          break;
        default:
          loads += load(which, [&] {
                     if (prng.chance(20)) wire_->cut();
                   }) > 0;
      }
    }
  }
  EXPECT_GT(loads, 0U);
}

}  // namespace
}  // namespace flexkv
