// For tests of several nodes in one process: a node, and an engine that is attached to it as to a daemon, all real.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "flexkv/server/node_server.h"
#include "real_engine.h"

namespace flexkv::testing {

constexpr char kSecret[] = "a secret of the tests' own, long enough";

// As the node wants it: for its owner only.
inline std::string write_secret(const std::string& path, const std::string& secret = kSecret) {
  std::ofstream(path) << secret << '\n';
  std::filesystem::permissions(path, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  return path;
}

// Derived from by who says what the node shares with others.
class RealMachine {
 public:
  void start() {
    auto started = server::NodeServer::start(options_);
    ASSERT_TRUE(started.ok()) << started.error().message;
    node_ = std::move(started).value();
  }
  void stop() { node_.reset(); }

  // Computes the prompt and saves it.
  void compute(std::uint64_t seed) {
    const auto hashes = prompt(seed);
    for (std::uint32_t block = 0; block < kBlocks; ++block) engine_->fill(block, seed * 1000 + block);
    // Until all ranks are attached the node refuses, and a save that was posted to it is lost.
    ASSERT_TRUE(eventually([&] { return engine_->save(hashes) && engine_->load(hashes) == kBlocks; }));
  }
  // How much of it could be loaded; that is right.
  std::uint32_t load(std::uint64_t seed) {
    for (std::uint32_t block = 0; block < kBlocks; ++block) engine_->fill(32 + block, 77);
    const std::uint32_t loaded = engine_->load(prompt(seed));
    for (std::uint32_t block = 0; block < loaded; ++block) {
      EXPECT_TRUE(engine_->holds(32 + block, seed * 1000 + block)) << "block " << block << " of prompt " << seed;
    }
    return loaded;
  }
  bool loads_all(std::uint64_t seed) {
    const bool loaded = eventually([&] { return load(seed) == kBlocks; });
    if (!loaded) ADD_FAILURE() << node_->status_json();  // says why
    return loaded;
  }

  server::NodeServer& node() { return *node_; }
  nlohmann::json status() const { return nlohmann::json::parse(node_->status_json()); }

 protected:
  // In a directory of its own. To be started, and an engine attached.
  RealMachine(const std::string& root, const std::string& name, std::uint64_t pool_bytes, std::uint64_t disk_bytes)
      : dir_(root + "/" + name) {
    std::filesystem::create_directory(dir_);
    std::filesystem::permissions(dir_, std::filesystem::perms::owner_all);
    options_.node.pool_bytes = pool_bytes;
    options_.node.disk_admission = false;
    options_.huge_pages = false;
    options_.runtime_dir = dir_;
    options_.name = "node";
    options_.mode = "test";
    if (disk_bytes > 0) options_.disk.directories = {dir_ + "/ssd"};
    options_.disk.bytes = disk_bytes;
  }
  // To the cluster "test".
  server::ClusterOptions& join(const std::string& name, const std::string& secret_file,
                               const meta::RedisOptions& redis) {
    auto& cluster = options_.cluster.emplace();
    cluster.cluster = "test";
    cluster.node = name;
    cluster.secret_file = secret_file;
    cluster.listen = "127.0.0.1:0";
    cluster.redis = redis;
    cluster.time_to_live = 3 * kSecond;
    return cluster;
  }
  // An engine of the same model comes instead of the one that was there.
  void attach_engine(const std::shared_ptr<device::Device>& device) {
    engine_.reset();
    engine_ = std::make_unique<Engine>(dir_, "engine", 2, 0, device);
    engine_->connect(dir_);
  }

  const std::string dir_;
  server::NodeServerOptions options_;
  std::unique_ptr<server::NodeServer> node_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace flexkv::testing
