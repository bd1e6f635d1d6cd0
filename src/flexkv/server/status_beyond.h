// Parts of a node's status: what lies beyond its machine. Private to this module.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "flexkv/server/cluster_bridge.h"
#include "flexkv/server/remote_bridge.h"

namespace flexkv::server {

// Both add to `messages` what is not as it should be.
nlohmann::json render_cluster(const ClusterBridge::Status& status, const node::NodeStats& stats,
                              nlohmann::json& messages);
// Without its latencies.
nlohmann::json render_remote(const RemoteBridge::Status& status, nlohmann::json& messages);

}  // namespace flexkv::server
