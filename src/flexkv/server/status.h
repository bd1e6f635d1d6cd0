// The node's state as JSON, for `flexkv status` and the metrics. See docs/reference/status.md. Thread-compatible.
#pragma once

#include <string>

#include "flexkv/node/node.h"

namespace flexkv::server {

struct NodeIdentity {
  std::string name;
  std::string mode;
  std::uint64_t epoch = 0;
  Nanos uptime = 0;
  std::string page_kind;
  std::uint64_t pool_bytes = 0;
  std::size_t peers = 0;
};

std::string render_status(const NodeIdentity& identity, const node::Node& node);

}  // namespace flexkv::server
