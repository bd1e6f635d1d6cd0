// One node's directory with its two connections to the simulated store, on the virtual clock: the real Directory,
// Publisher, Followers and Replica, and what they send. Owned by the simulation's thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "flexkv/cluster/directory.h"
#include "flexkv/testing/sim_loop.h"
#include "flexkv/testing/sim_meta.h"

namespace flexkv::testing {

// What a request is for.
enum class DirectoryUse : std::uint8_t { kStream, kSnapshot, kRound, kFollow, kLoad };
constexpr std::size_t kDirectoryUses = 5;

struct DirectoryTraffic {
  struct Flow {
    std::uint64_t requests = 0;
    std::uint64_t sent_bytes = 0;  // by the node
    std::uint64_t received_bytes = 0;
  };
  std::array<Flow, kDirectoryUses> by_use{};

  const Flow& of(DirectoryUse use) const { return by_use[static_cast<std::size_t>(use)]; }
  DirectoryTraffic& operator+=(const DirectoryTraffic& other);
  DirectoryTraffic operator-(const DirectoryTraffic& other) const;
};

class SimDirectory {
 public:
  // `follows`: whether it reads what the others tell; if not, its replica stays empty.
  SimDirectory(SimLoop& loop, SimMeta& store, const cluster::DirectoryOptions& options, bool follows);
  ~SimDirectory() { *alive_ = false; }

  cluster::SpaceIndex add_space(const cluster::SpaceId& id);
  void apply(const cluster::Change& change);
  // Asks the store whatever there is to ask. To be called after changes.
  void pump();

  cluster::Incarnation incarnation() const { return incarnation_; }
  const cluster::Replica& replica() const { return replica_; }
  cluster::DirectoryStats stats() const { return directory_.stats(); }
  bool follows() const { return follows_; }
  const DirectoryTraffic& traffic() const { return traffic_; }
  std::uint64_t changes() const { return changes_; }  // blocks that came or went
  Nanos changed_at() const { return changed_at_; }    // the last of them

 private:
  void submit(SimMetaChannel& channel, meta::Request request,
              void (cluster::Directory::*report)(const Result<meta::Answers>&, Nanos));

  SimLoop& loop_;
  const cluster::Incarnation incarnation_;
  const bool follows_;
  cluster::Replica replica_;
  cluster::Directory directory_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  SimMetaChannel orders_;
  SimMetaChannel reads_;
  Nanos wakeup_ = INT64_MAX;
  DirectoryTraffic traffic_;
  std::uint64_t changes_ = 0;
  Nanos changed_at_ = 0;
};

}  // namespace flexkv::testing
