// For tests of nodes of one cluster in one process: real nodes, engines, TCP and redis-server.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <memory>
#include <string>

#include "flexkv/device/host_device.h"
#include "real_machine.h"
#include "redis_server.h"
#include "wire.h"

namespace flexkv::testing {

class ClusterMachine : public RealMachine {
 public:
  struct Options {
    std::string secret = kSecret;
    std::uint64_t pool_bytes = 1U << 20;
    std::uint64_t disk_bytes = 0;
    std::shared_ptr<device::Device> device = device::open_host_device().value();
    std::string nixl_library{};
    std::vector<std::string> mooncake_helper{};
    Nanos lease_time = node::NodeOptions().lease_time;
    Nanos load_timeout = node::NodeOptions().load_timeout;
    Wire* behind = nullptr;  // others reach it through this wire
  };

  ClusterMachine(const std::string& root, const std::string& name, const meta::RedisOptions& redis,
                 const Options& options)
      : RealMachine(root, name, options.pool_bytes, options.disk_bytes) {
    auto& cluster = join(name, write_secret(dir_ + "/secret", options.secret), redis);
    cluster.share_drives = true;
    cluster.nixl_library = options.nixl_library;
    cluster.mooncake_helper = options.mooncake_helper;
    options_.node.lease_time = options.lease_time;
    options_.node.load_timeout = options.load_timeout;
    if (options.behind != nullptr) cluster.told_address = options.behind->address();
    start();
    if (options.behind != nullptr) options.behind->lead_to(status().at("cluster").at("address"));
    attach_engine(options.device);
  }

  Engine& engine() { return *engine_; }
  std::uint64_t epoch() const {
    const auto directory = status().at("cluster").at("directory");
    return directory.at("joined") ? directory.at("epoch").get<std::uint64_t>() : 0;
  }
  bool has_recorded_resets() const { return std::filesystem::exists(dir_ + "/ssd/node.resets"); }
  void add_drive() { options_.disk.directories.push_back(dir_ + "/ssd-new"); }  // from the next start on
  void wait_until_written() {
    ASSERT_TRUE(eventually([&] { return status().at("queues").at("disk_writes") == 0; }));
  }
};

class ClusterTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    dir_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::unique_ptr<ClusterMachine> machine(const std::string& name, const ClusterMachine::Options& options = {}) {
    return std::make_unique<ClusterMachine>(dir_, name, redis_.over_tcp(), options);
  }

  RedisServer redis_;
  std::string dir_;
};

}  // namespace flexkv::testing
