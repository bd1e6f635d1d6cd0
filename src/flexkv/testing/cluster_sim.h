// A cluster on the virtual clock that serves a trace: docs/operations/scale.md says what is real in it and what is
// modelled. Everything but the times of lookups follows from the seed. Owned by one thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "flexkv/testing/cluster_node.h"
#include "flexkv/testing/sim_loop.h"
#include "flexkv/testing/sim_meta.h"

namespace flexkv::testing {

enum class ClusterRouter : std::uint8_t {
  kRoundRobin,
  kPrefix,  // prompts that begin with the same 1,024 tokens go to one node
};

struct ClusterShape {
  std::uint32_t nodes = 8;
  std::uint32_t replicas =
      8;  // nodes with a replica of their own; others look up in that of an observer without blocks
  std::uint32_t blocks = 1'000'000;  // of each node's memory
  std::uint32_t block_tokens = 16;   // divides 512
  ClusterRouter router = ClusterRouter::kRoundRobin;
  std::uint64_t seed = 1;
};

// Of a prompt made of blocks of 512 tokens; equal numbers are equal beginnings.
struct TracedPrompt {
  Nanos at = 0;
  std::uint32_t tokens = 0;
  std::vector<std::uint32_t> blocks;
};

// What the cluster is asked: the trace once for each node, each time with contents of its own, so that the load of a
// node does not depend on their number. Requests that the trace gives one time are spread until its next one.
class ClusterLoad {
 public:
  // The trace is in the order of its times.
  ClusterLoad(const std::vector<TracedPrompt>& trace, std::uint32_t copies, std::uint64_t seed);

  struct Request {
    Nanos at = 0;
    std::uint32_t copy = 0;
    std::uint32_t number = 0;  // in the trace
  };
  const std::vector<Request>& requests() const { return requests_; }
  std::vector<key::BlockKey> keys(const Request& request, std::uint32_t block_tokens) const;
  std::uint32_t node_for(ClusterRouter router, std::size_t request, std::uint32_t nodes) const;

 private:
  const std::vector<TracedPrompt>& trace_;
  std::vector<Request> requests_;
};

// The load on nodes without a directory: on one with the memory of all it is the shared cache that a cluster can
// come near to, on all of them what they find without each other.
ServedBlocks serve_apart(const ClusterLoad& load, const ClusterShape& shape, std::uint32_t nodes);

struct ClusterFigures {
  Nanos joined = 0;  // until all knew all others
  Nanos served = 0;  // how long the load took
  ServedBlocks blocks;
  std::array<std::uint64_t, proto::kReasonCount> unimported{};  // of the blocks that other nodes were asked for
  std::uint64_t busiest_node = 0;                               // blocks asked of it
  std::uint64_t changes = 0;                                    // of all nodes, while the load was served
  std::uint64_t batches = 0;
  DirectoryTraffic all;       // of all nodes, in that time, as far as they follow
  DirectoryTraffic follower;  // of one that follows, on average
  std::uint32_t followers = 0;
  std::uint64_t store_bytes = 0;               // values in Redis, then
  cluster::Replica::Stats replica;             // of the first that follows
  std::vector<Nanos> lookups;                  // of those, by this machine's clock
  std::optional<Nanos> converged;              // since the last change, until all replicas were equal to all indexes
  std::optional<Nanos> death_seen;             // until nobody found the dead node any more
  std::optional<Nanos> emptied_and_converged;  // since Redis came back empty, after 5 s in which nodes changed
  std::uint64_t trace_hash = 0;
};

class ClusterSim {
 public:
  // `load` outlives it.
  ClusterSim(const ClusterShape& shape, const ClusterLoad& load);
  ~ClusterSim();

  // Each once, in this order.
  void join();
  void serve();
  void kill_one();  // REQUIRES: two nodes or more
  void empty_store();
  const ClusterFigures& figures();

  void wait(Nanos time);
  bool agree();  // whether each replica is what the indexes of the live nodes are
  DirectoryTraffic traffic() const;
  std::uint64_t batches() const;

 private:
  bool may_agree() const;
  // Polls; nullopt: not within kPatience.
  template <typename Condition>
  std::optional<Nanos> time_until(Condition condition);
  void arrive(std::size_t request);
  void serve_one(const ClusterLoad::Request& request, std::uint32_t node);
  void transfer(ClusterNode& reader, const peer::ReadRequest& request);
  ClusterNode* find(const std::string& incarnation);
  Nanos last_change() const;
  std::vector<const SimDirectory*> followers() const;

  const ClusterShape shape_;
  const ClusterLoad& load_;
  SimLoop loop_;
  SimMeta store_;
  std::span<std::byte> pool_;
  std::unique_ptr<SimDirectory> observer_;
  std::vector<std::unique_ptr<ClusterNode>> nodes_;
  std::vector<std::uint64_t> asked_;  // blocks, by node
  node::LoanId last_loan_ = 0;
  Nanos begun_ = 0;  // the load
  std::size_t left_ = 0;
  ClusterFigures figures_;
};

}  // namespace flexkv::testing
