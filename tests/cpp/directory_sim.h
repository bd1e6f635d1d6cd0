// A cluster of nodes whose indexes change at random, and the store between them, in one thread on a virtual clock: the
// real Directory, Publisher, Follower and Replica. Everything follows from the seed.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "flexkv/cluster/directory.h"
#include "flexkv/testing/sim_loop.h"
#include "flexkv/testing/sim_meta.h"

namespace flexkv::testing {

constexpr std::size_t kSimSpaces = 2;

struct DirectorySimTotals {
  std::uint64_t changes = 0;
  std::uint64_t batches = 0;  // followed
  std::uint64_t snapshots = 0;
  std::uint64_t gaps = 0;
  std::uint64_t refused = 0;
  std::uint64_t resets = 0;
  std::uint64_t nodes = 0;
  std::uint64_t blocks_at_end = 0;
  Nanos slowest = 0;  // convergence
};

class DirectorySim {
 public:
  DirectorySim(std::uint64_t seed, bool verbose);
  ~DirectorySim();

  // Faults for some minutes, then none; then all must agree within kConvergence. Returns the hash of what happened.
  std::uint64_t run(DirectorySimTotals& totals);

 private:
  struct Node;
  using Content = std::map<cluster::Tag, cluster::Tiers>;

  void add_node();
  void remove_node(std::size_t at);
  void pump(Node& node);
  void use_outliving(Node& node);
  void change_some(Node& node);
  void change(Node& node, cluster::Change change);
  void restart_feed(Node& node);
  void cause_fault();
  void heal();
  void count(const Node& node);
  bool agree();
  bool knows(const Node& reader, const Node& other);

  SimLoop loop_;
  SimMeta store_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<cluster::Incarnation> gone_;
  cluster::PublisherLimits limits_;
  cluster::Incarnation next_incarnation_ = 1;
  struct Drive {  // of a node that has ended; the next one begins with it
    cluster::Epoch epoch;
    Nanos holds_since = 0;
    Nanos knows = 0;
  };
  std::vector<Drive> drives_;
  // Of what outlives all nodes, and is found by the epoch: how old the oldest is that was stored in each.
  std::map<std::pair<std::uint64_t, cluster::ResetId>, Nanos> outliving_;
  std::map<cluster::ResetId, Nanos> asked_resets_;
  cluster::ResetId last_reset_ = 0;
  bool quiet_ = false;
  DirectorySimTotals totals_;
};

}  // namespace flexkv::testing
