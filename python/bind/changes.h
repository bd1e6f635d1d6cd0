// Changes of what a node keeps, as Python gets them, and what engines call their blocks.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexkv/events/change.h"
#include "flexkv/proto/changes.h"
#include "flexkv/server/node_server.h"

namespace flexkv::bind {

// [("added" | "removed" | "cleared", tier, hash, hash of the block before or b"", tokens, details)]: of `removed` only
// the tier and the hash count, of `cleared` nothing else.
nanobind::list change_list(std::vector<events::Change> changes);

// In as many requests as messages take. `hashes`: of the whole chain; the blocks are [first, first + their number), and
// `details` are of each of them or of all. ValueError: the numbers do not fit together.
std::vector<proto::DescribeRequest> describe_requests(std::uint32_t first,
                                                      std::span<const std::span<const std::byte>> hashes,
                                                      const std::vector<std::uint32_t>& tokens,
                                                      const std::vector<nanobind::bytes>& details);

// Adds the class Changes to the module.
void bind_changes(nanobind::module_& m);
// What bind_changes() adds.
nanobind::object follow_node(std::shared_ptr<server::NodeServer> node);

}  // namespace flexkv::bind
