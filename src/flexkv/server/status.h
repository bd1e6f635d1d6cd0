// The node's state as JSON, for `flexkv status` and the metrics. See docs/reference/status.md. Thread-compatible.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "flexkv/node/node.h"
#include "flexkv/server/cluster_bridge.h"
#include "flexkv/server/disk_bridge.h"
#include "flexkv/server/remote_bridge.h"

namespace flexkv::server {

struct DrainStatus {
  enum class State : std::uint8_t { kDraining, kDrained, kLate };  // late: its time is over, and something is left
  State state = State::kDraining;
  Nanos lasts = 0;  // since it began
  node::Node::Undone undone;
};

struct NodeIdentity {
  std::string name;
  std::string mode;
  Nanos now = 0;
  Nanos uptime = 0;
  std::string page_kind;
  std::uint64_t pool_bytes = 0;
  std::size_t peers = 0;
  std::optional<DrainStatus> drain;   // none: it serves
  node::ResetId last_reset = 0;       // that this node was asked for; 0: none
  std::string door_address;           // where engines of other machines attach; empty: they cannot
  std::vector<std::string> messages;  // what is not as it was asked for
};

// `disk`: null without an SSD tier. `cluster`: null for a node that is alone. `remote`: null without a remote tier.
std::string render_status(const NodeIdentity& identity, const node::Node& node, const DiskBridge::Status* disk,
                          const ClusterBridge::Status* cluster, const RemoteBridge::Status* remote);

}  // namespace flexkv::server
