// One node of a simulated cluster: the real node::Node with host memory only, an engine of one rank that computes and
// copies in no time, and the real choice of a peer over the real replica. No bytes of blocks exist.
//
// A request is looked up when it arrives, loaded as far as blocks of other nodes are in it, then saved. Owned by the
// simulation's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "flexkv/agent/leading_blocks.h"
#include "flexkv/node/node.h"
#include "flexkv/server/remote_reads.h"
#include "flexkv/testing/sim_directory.h"

namespace flexkv::testing {

// Blocks, counted when a request's load has ended.
struct ServedBlocks {
  std::uint64_t requests = 0;
  std::uint64_t asked = 0;
  std::uint64_t own = 0;          // found in the node's own memory
  std::uint64_t remote = 0;       // read from another node
  std::uint64_t undelivered = 0;  // found at others, and did not come

  std::uint64_t hits() const { return own + remote; }
  ServedBlocks& operator+=(const ServedBlocks& other);
};

// A node and its engine. Alone if `remote` is null.
class SimCache : private node::Outbox {
 public:
  SimCache(std::uint64_t blocks, std::uint64_t slot_bytes, node::RemotePort* remote);

  void serve(std::vector<key::BlockKey> keys, Nanos now);
  // What rank and engine do with what the node has told them. To be called after each call of the node.
  void settle(Nanos now);
  node::Node& node() { return *node_; }
  const ServedBlocks& served() const { return served_; }
  std::size_t under_way() const { return requests_.size(); }
  // The answer to Node::lend, which comes at once as there are no drives.
  node::Loan take_loan();

 private:
  struct Request {
    std::uint32_t blocks = 0;
    std::uint32_t matched = 0;
    std::uint32_t remote = 0;
  };
  bool send(node::AgentHandle agent, const proto::ToAgent& message) override;
  void send(node::EngineHandle engine, const proto::JobResult& result) override;
  void lent(node::Loan loan) override { loan_ = std::move(loan); }
  void save(std::uint64_t id, Nanos now);
  void job_ended(const proto::JobResult& result, Nanos now);

  std::unique_ptr<node::Node> node_;
  node::EngineHandle engine_ = 0;
  node::AgentHandle agent_ = 0;
  std::uint64_t last_id_ = 0;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::unordered_map<proto::JobId, agent::LeadingBlocks> copying_;
  std::vector<proto::JobReport> reports_;
  std::vector<proto::JobResult> results_;
  std::optional<node::Loan> loan_;
  ServedBlocks served_;
};

class ClusterNode : private node::RemotePort {
 public:
  using Read = std::function<void(ClusterNode& reader, const peer::ReadRequest& request)>;
  struct Config {
    cluster::DirectoryOptions directory;
    std::uint64_t blocks = 0;
    std::uint64_t slot_bytes = 0;
    std::span<std::byte> pool;  // never touched; all nodes may give the same
    const cluster::Replica* lookups =
        nullptr;  // where this node looks for others' blocks; null: it follows them itself
  };
  // `read` carries requests out between nodes, and calls read_ended() later on.
  ClusterNode(SimLoop& loop, SimMeta& store, const Config& config, Read read);
  ~ClusterNode() override { *alive_ = false; }

  void serve(std::vector<key::BlockKey> keys);
  // `blocks` have come, then the read has ended.
  void read_ended(peer::RequestId id, std::uint32_t blocks, peer::Outcome outcome);
  // For another node's read; end_loan() has to follow.
  node::Loan lend(node::LoanId id, const peer::ReadRequest& request);
  void end_loan(node::LoanId id);
  // Passes what has changed to the directory, and time to the node.
  void pass_time();

  SimDirectory& directory() { return directory_; }
  const SimDirectory& directory() const { return directory_; }
  const node::SpaceName& space_name() const { return space_name_; }
  const ServedBlocks& served() const { return cache_->served(); }
  const node::NodeStats& stats() const { return cache_->node().stats(); }
  std::size_t under_way() const { return cache_->under_way(); }
  // Tags of all that is in host memory, in any order.
  std::vector<cluster::Tag> content();
  std::vector<Nanos>& lookup_times() { return lookup_times_; }  // of this machine's clock

  Nanos sends_until = 0;  // its link
  Nanos receives_until = 0;

 private:
  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber) override {}
  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now) override;
  void read(node::RemoteRead read) override;
  void reset(node::ResetId) override {}
  void cancel(node::RemoteOp op) override { reads_.cancel(op); }
  void settle();

  SimLoop& loop_;
  SimDirectory directory_;
  server::RemoteReads reads_;
  std::unique_ptr<SimCache> cache_;
  cluster::SpaceIndex space_ = 0;
  node::SpaceName space_name_{};
  events::Subscription subscription_;
  std::vector<events::Change> changes_;  // scratch
  std::vector<Nanos> lookup_times_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace flexkv::testing
