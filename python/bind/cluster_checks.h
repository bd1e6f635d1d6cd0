// What `flexkv doctor --cluster` asks the core about a cluster and a remote tier: each function does what a node does.
#pragma once

#include <nanobind/nanobind.h>

namespace flexkv::bind {

void bind_cluster_checks(nanobind::module_& m);

}  // namespace flexkv::bind
