// For tests: an engine with its device memory, an agent per rank and a client, all real, on host memory.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "flexkv/agent/rank_agent.h"
#include "flexkv/base/prng.h"
#include "flexkv/client/client.h"
#include "flexkv/device/host_device.h"
#include "flexkv/server/node_server.h"

namespace flexkv::testing {

constexpr std::uint32_t kBlockBytes = 4096;
constexpr std::uint32_t kLayers = 4;
constexpr std::uint32_t kLayerBytes = kBlockBytes / kLayers;
constexpr std::uint32_t kDeviceBlocks = 64;
constexpr std::uint32_t kBlocks = 24;

// Attaches to the node named "node" in `dir`.
class Engine {
 public:
  // Ranks whose numbers are equal modulo `shards` hold the same bytes; 0: none do. `device`: of all ranks.
  Engine(const std::string& dir, const std::string& id, std::uint32_t ranks, std::uint32_t shards = 0,
         const std::shared_ptr<device::Device>& device = device::open_host_device().value())
      : id_(id), ranks_(ranks), shards_(shards > 0 ? shards : ranks) {
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      memory_.push_back(std::make_unique<std::vector<std::byte>>(std::size_t{kDeviceBlocks} * kBlockBytes));
      // As layers side by side within each block.
      std::vector<layout::TensorDesc> tensors(kLayers);
      for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
        tensors[layer].name = "layer";
        tensors[layer].address = reinterpret_cast<std::uint64_t>(memory_.back()->data()) + layer * kLayerBytes;
        tensors[layer].shape = {kDeviceBlocks, kLayerBytes};
        tensors[layer].stride = {kBlockBytes, 1};
      }
      auto layout = layout::BlockLayout::derive(tensors, kDeviceBlocks);
      EXPECT_TRUE(layout.ok());
      EXPECT_EQ(layout.value().parts().size(), kLayers);
      agent::RankAgentOptions options;
      options.runtime_dir = dir;
      options.node_name = "node";
      options.engine_id = id;
      options.rank = rank;
      options.rank_count = ranks;
      if (shards > 0) options.shard = shard_of(rank);
      auto agent = agent::RankAgent::start(options, device, std::move(layout).value());
      EXPECT_TRUE(agent.ok());
      agents_.push_back(std::move(agent).value());
    }
  }

  proto::ClientHello hello() const {
    proto::ClientHello hello;
    hello.engine_id = id_;
    hello.rank_count = ranks_;
    hello.model = "model";
    return hello;
  }
  void embed(server::NodeServer& node) {
    client_ = std::make_unique<client::Client>(client::open_embedded_port(node, hello()).value(), hello());
  }
  void connect(const std::string& dir) {
    client_ = std::make_unique<client::Client>(client::open_remote_port(dir, "node", hello()).value(), hello());
  }
  void disconnect() { client_.reset(); }
  client::Client& client() { return *client_; }
  agent::RankAgent& agent(std::uint32_t rank) { return *agents_[rank]; }

  // The first byte of the first block's layers, by layer and rank, when they were held no longer.
  std::vector<std::byte> take_seen() { return std::exchange(seen_, {}); }

  void fill(std::uint32_t device_block, std::uint64_t content) {
    for (std::uint32_t rank = 0; rank < ranks_; ++rank) {
      std::memset(at(rank, device_block), static_cast<int>(Prng::mix(content * 31 + shard_of(rank)) & 0xFF),
                  kBlockBytes);
    }
  }
  std::byte first_byte(std::uint32_t rank, std::uint32_t block) { return at(rank, block)[0]; }
  bool holds(std::uint32_t device_block, std::uint64_t content) {
    for (std::uint32_t rank = 0; rank < ranks_; ++rank) {
      const auto expected = static_cast<std::byte>(Prng::mix(content * 31 + shard_of(rank)) & 0xFF);
      for (std::uint32_t i = 0; i < kBlockBytes; ++i) {
        if (at(rank, device_block)[i] != expected) return false;
      }
    }
    return true;
  }

  // Saves blocks [0, kBlocks) of the prompt from device blocks of the same numbers; true if all ranks were told.
  bool save(const std::vector<std::array<std::byte, 32>>& hashes) {
    const auto views = spans(hashes);
    const auto sequence = client_->open_sequence();
    std::vector<std::uint32_t> device_blocks(hashes.size());
    for (std::uint32_t i = 0; i < hashes.size(); ++i) device_blocks[i] = i;
    const auto job = client_->save(sequence, 0, views, 0, device_blocks);
    if (job == 0) return false;
    for (auto& agent : agents_) agent->arm_saves({&job, 1}, 0);
    for (auto& agent : agents_) agent->fence({&job, 1}, 10 * kSecond);
    client_->close_sequence(sequence);
    return true;
  }

  // Blocks found and loaded into device blocks [32, ...); 0 if none is kept or the load failed.
  // In parts: what is held until a part has arrived has to see it.
  std::uint32_t load(const std::vector<std::array<std::byte, 32>>& hashes, bool in_parts = false) {
    const auto views = spans(hashes);
    const auto sequence = client_->open_sequence();
    const auto found = client_->lookup(sequence, 0, views).matched_blocks;
    bool failed = found == 0;
    if (!failed) {
      std::vector<std::uint32_t> device_blocks(found);
      for (std::uint32_t i = 0; i < found; ++i) device_blocks[i] = 32 + i;
      const auto job = client_->load(sequence, 0, device_blocks);
      for (auto& agent : agents_) {
        in_parts ? agent->arm_loads_in_parts({&job, 1}, 0) : agent->arm_loads({&job, 1}, 0);
      }
      for (std::uint32_t part = 0; in_parts && part < kLayers; ++part) {
        for (std::uint32_t rank = 0; rank < ranks_; ++rank) {
          agents_[rank]->hold_engine({&job, 1}, part + 1, 0);
          seen_.push_back(at(rank, 32)[part * kLayerBytes]);
        }
      }
      for (auto& agent : agents_) failed |= !agent->wait_loads({&job, 1}).empty();
    }
    client_->close_sequence(sequence);
    return failed ? 0 : found;
  }

 private:
  std::uint32_t shard_of(std::uint32_t rank) const { return rank % shards_; }
  std::byte* at(std::uint32_t rank, std::uint32_t block) {
    return memory_[rank]->data() + std::size_t{block} * kBlockBytes;
  }
  static std::vector<std::span<const std::byte>> spans(const std::vector<std::array<std::byte, 32>>& hashes) {
    return {hashes.begin(), hashes.end()};
  }

  const std::string id_;
  const std::uint32_t ranks_;
  const std::uint32_t shards_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> memory_;
  std::vector<std::unique_ptr<agent::RankAgent>> agents_;
  std::unique_ptr<client::Client> client_;
  std::vector<std::byte> seen_;
};

inline std::vector<std::array<std::byte, 32>> prompt(std::uint64_t seed, std::uint32_t blocks = kBlocks) {
  std::vector<std::array<std::byte, 32>> hashes(blocks);
  Prng prng(seed);
  for (auto& hash : hashes) {
    for (std::size_t i = 0; i < hash.size(); i += 8) {
      const auto word = prng.next();
      std::memcpy(hash.data() + i, &word, 8);
    }
  }
  return hashes;
}

template <typename Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 12'000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

}  // namespace flexkv::testing
