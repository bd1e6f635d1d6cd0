// A node with engines whose agents are in the hands of the test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <set>

#include "flexkv/base/prng.h"
#include "flexkv/node/node.h"

namespace flexkv::node {

using Keys = std::vector<key::BlockKey>;

// Blocks [0, count) of prompt number `prompt`; prompts share their first `shared` blocks.
inline Keys keys_of(std::uint64_t prompt, std::uint64_t count, std::uint64_t shared = 0) {
  Keys keys;
  for (std::uint64_t i = 0; i < count; ++i) keys.push_back({i + 1, Prng::mix((i < shared ? 0 : prompt) * 1000 + i)});
  return keys;
}

class NodeTest : public ::testing::Test, public Outbox {
 protected:
  static constexpr std::uint64_t kPage = kExtentAlignment;

  void start(NodeOptions options) { node = std::make_unique<Node>(options, *this, drives, beyond, storage); }
  void start(std::uint64_t slots, std::uint32_t ranks = 1) {
    NodeOptions options;
    options.pool_bytes = slots * ranks * kPage;
    start(options);
  }
  void TearDown() override {
    if (node != nullptr) node->check_invariants();
  }

  static proto::ClientHello client_hello(const std::string& id, std::uint32_t ranks = 1, std::uint8_t model = 1) {
    proto::ClientHello hello;
    hello.engine_id = id;
    hello.rank_count = ranks;
    hello.fingerprint[0] = std::byte{model};
    hello.block_tokens = 16;
    return hello;
  }
  static proto::AgentHello agent_hello(const std::string& id, std::uint32_t rank = 0, std::uint32_t ranks = 1) {
    proto::AgentHello hello;
    hello.engine_id = id;
    hello.rank = rank;
    hello.rank_count = ranks;
    hello.shard_bytes = 1000;
    return hello;
  }
  EngineHandle engine(const std::string& id, std::uint32_t ranks = 1, std::uint8_t model = 1) {
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      agents.push_back(node->attach_agent(agent_hello(id, rank, ranks)).value());
    }
    return node->attach_client(client_hello(id, ranks, model)).value();
  }

  Node::Lookup lookup(EngineHandle handle, SequenceId sequence, const Keys& keys) {
    return node->lookup(handle, sequence, 0, keys, now);
  }
  Reason save(EngineHandle handle, SequenceId sequence, JobId job, const Keys& keys, std::uint32_t first = 0,
              bool on_commit = false) {
    proto::TransferRequest request{true, false, sequence, job, 0, keys, first, {}, on_commit};
    request.device_blocks.resize(keys.size() - first);
    std::iota(request.device_blocks.begin(), request.device_blocks.end(), 100 + first);
    const Reason reason = node->save(handle, request, now);
    node->check_invariants();
    return reason;
  }
  Reason load(EngineHandle handle, SequenceId sequence, JobId job, const Keys& keys, std::uint32_t first = 0) {
    proto::TransferRequest request{false, false, sequence, job, 0, keys, first, {}};
    request.device_blocks.resize(keys.size() - first);
    const Reason reason = node->load(handle, request, now);
    node->check_invariants();
    return reason;
  }
  // `good`: leading blocks of a load; not given: all that the rank was told to copy if it is done, else none.
  void report(AgentHandle agent, JobId job, JobStatus status = JobStatus::kDone,
              std::optional<std::uint32_t> good = std::nullopt) {
    const std::uint32_t told = status == JobStatus::kDone ? leading_blocks_told(agent, job) : 0;
    node->on_report(agent, {job, status, good.value_or(told)}, now);
    node->check_invariants();
  }
  // Saves all and has every rank report.
  void keep(EngineHandle handle, SequenceId sequence, JobId job, const Keys& keys) {
    ASSERT_EQ(save(handle, sequence, job, keys), Reason::kNone);
    for (const AgentHandle agent : agents) report(agent, job);
  }
  // How the job ended; nothing if it has not.
  std::optional<proto::JobResult> result(JobId job) const {
    const auto found = std::find_if(results.begin(), results.end(), [&](const auto& r) { return r.job == job; });
    return found == results.end() ? std::nullopt : std::optional(*found);
  }
  Reason failure(JobId job) const {
    const auto found = result(job);
    EXPECT_TRUE(found && found->status == JobStatus::kFailed) << "job " << job;
    return found ? found->reason : Reason::kNone;
  }
  bool done(JobId job) const {
    const auto found = result(job);
    return found && found->status == JobStatus::kDone;
  }
  template <typename T>
  std::vector<T> sent(AgentHandle agent, JobId job) const {
    std::vector<T> found;
    for (const auto& [to, message] : messages) {
      const auto* wanted = std::get_if<T>(&message);
      if (to == agent && wanted != nullptr && wanted->job == job) found.push_back(*wanted);
    }
    return found;
  }

  std::uint32_t leading_blocks_told(AgentHandle agent, JobId job) const {
    std::set<std::uint32_t> told;
    for (const auto& piece : sent<proto::CopyCommand>(agent, job)) {
      for (const auto& [first, count] : piece.spans) {
        for (std::uint32_t at = first; at < first + count; ++at) told.insert(at);
      }
    }
    std::uint32_t leading = 0;
    while (told.contains(leading)) ++leading;
    return leading;
  }

  bool send(AgentHandle agent, const proto::ToAgent& message) override {
    if (agent == deaf) return false;
    messages.emplace_back(agent, message);
    return true;
  }
  void send(EngineHandle, const proto::JobResult& outcome) override { results.push_back(outcome); }

  DiskPort* drives = nullptr;
  RemotePort* beyond = nullptr;
  StorePort* storage = nullptr;
  std::unique_ptr<Node> node;
  std::vector<AgentHandle> agents;
  std::vector<std::pair<AgentHandle, proto::ToAgent>> messages;
  std::vector<proto::JobResult> results;
  AgentHandle deaf = 0;
  Nanos now = kSecond;
};

}  // namespace flexkv::node
