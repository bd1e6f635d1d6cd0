// A node in the simulated world: the real node::Node, its connections, its pool's bytes, and a shadow of who may touch
// which part of the pool, against which every command of the node is checked. Owned by one thread.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "flexkv/node/node.h"
#include "flexkv/testing/sim_disk.h"
#include "flexkv/testing/sim_pipe.h"
#include "flexkv/testing/sim_plan.h"
#include "flexkv/testing/sim_remote.h"

namespace flexkv::testing {

using Bytes = std::vector<std::byte>;

// A rank's connection. Each end keeps it; `live` are the copies that the rank has been told and has not ended.
struct AgentLink {
  node::AgentHandle handle = 0;
  std::shared_ptr<SimPipe> to_agent;
  std::shared_ptr<SimPipe> to_node;
  std::function<void(const proto::ToAgent&)> deliver;  // the rank's end
  std::function<void()> lost;                          // the rank hears that the node is gone
  std::shared_ptr<Bytes> pool;
  std::uint64_t shard_bytes = 0;
  struct Live {
    bool delivered = false;
    bool writes_host = false;
    std::vector<std::uint64_t> pages;
  };
  std::map<proto::JobId, Live> live;
};

struct ClientLink {
  node::EngineHandle handle = 0;
  bool hung_up = false;  // the client's end is closed; what it sent before may still be on its way
  std::shared_ptr<SimPipe> to_node;
  std::shared_ptr<SimPipe> to_client;
  std::function<void(const proto::JobResult&)> deliver;
  std::function<void()> lost;
};

class SimNode final : private node::Outbox {
 public:
  SimNode(SimLoop& loop, const SimPlan& plan, SimStore& store, SimElsewhere& elsewhere, std::uint64_t epoch);
  // The node dies: whoever is connected hears it a little later.
  ~SimNode() override;

  node::Node& core() { return node_; }
  SimDisk* disk() { return disk_.get(); }        // null: no drives
  SimRemote* remote() { return remote_.get(); }  // null: nothing beyond the machine
  const std::array<std::uint8_t, 32>& key_secret() const { return key_secret_; }
  bool paused() const { return *paused_until_ > loop_.now(); }
  void pause(Nanos until) { *paused_until_ = until; }

  // Null when the node refuses.
  std::shared_ptr<AgentLink> attach_agent(const proto::AgentHello& hello);
  std::shared_ptr<ClientLink> attach_client(const proto::ClientHello& hello);
  // The node's end notices that the other is gone.
  void drop(const std::shared_ptr<AgentLink>& link);
  void drop(const std::shared_ptr<ClientLink>& link);

  proto::LookupReply lookup(node::EngineHandle engine, const proto::LookupRequest& request);
  proto::Reason apply(node::EngineHandle engine, const proto::FromClient& message);
  void report(node::AgentHandle agent, const proto::JobReport& report);
  // The rank cannot touch the pool for this job any more.
  void release(AgentLink& link, proto::JobId job) { link.live.erase(job); }
  // Begins a scrub, or ends it (0).
  void scrub(std::uint64_t bytes_per_second);
  void drain(Nanos until);
  void after_call();

 private:
  bool send(node::AgentHandle agent, const proto::ToAgent& message) override;
  void send(node::EngineHandle engine, const proto::JobResult& result) override;
  void lent(node::Loan loan) override { remote_->lent(loan); }
  SimDisk::Callbacks disk_callbacks();
  SimRemote::Callbacks remote_callbacks();
  AgentLink::Live claimed(bool writes_host, std::uint64_t offset, std::uint64_t bytes);
  void check_and_claim(AgentLink& link, const proto::CopyCommand& command);
  void check_free(const AgentLink::Live& live);

  SimLoop& loop_;
  const SimPlan& plan_;
  const std::shared_ptr<Nanos> paused_until_ = std::make_shared<Nanos>(0);
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::array<std::uint8_t, 32> key_secret_{};
  std::shared_ptr<Bytes> pool_;
  std::map<node::AgentHandle, std::shared_ptr<AgentLink>> agents_;
  std::map<node::EngineHandle, std::shared_ptr<ClientLink>> clients_;
  // Cut off from the node, but its lanes may still be busy with the pool.
  std::vector<std::shared_ptr<AgentLink>> all_links_;
  std::map<node::DiskOp, AgentLink::Live> disk_live_;
  std::map<std::uint64_t, AgentLink::Live> remote_live_;
  std::uint64_t next_claim_ = 1;
  Nanos timer_ = 0;
  const std::unique_ptr<SimDisk> disk_;
  const std::unique_ptr<SimRemote> remote_;
  node::Node node_;
};

}  // namespace flexkv::testing
