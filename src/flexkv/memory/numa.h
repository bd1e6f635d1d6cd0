// On which NUMA nodes the host pool should lie: those that GPUs hang on, in turns where there are several
// (docs/decisions/0029).
//
// Linux puts a page on the node of the CPU that asks for it first. So pages come to lie on a node by being asked for on
// its CPUs; memory policies would do as well, but containers forbid them. A node that is full gives way to another, as
// always, and a policy that the user set (numactl) has the last word. Thread-safe.
#pragma once

#include <sched.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace flexkv::memory {

struct NumaNode {
  unsigned number = 0;
  cpu_set_t cpus{};
};

struct NumaPlacement {
  std::vector<NumaNode> nodes;  // in turns; empty: wherever threads happen to run
  std::string text;             // for people; empty: there is nothing to choose
};

// `sysfs`: where it is mounted. CPUs that this thread may not run on count for nothing.
NumaPlacement place_near_gpus(const std::string& sysfs = "/sys");

// Keeps the calling thread on the node whose turn it is, while this lives. Does nothing without nodes, and where the
// thread may not run there.
class NearNode {
 public:
  NearNode(std::span<const NumaNode> nodes, std::size_t turn);
  ~NearNode();
  NearNode(const NearNode&) = delete;
  NearNode& operator=(const NearNode&) = delete;

 private:
  cpu_set_t before_{};
  bool moved_ = false;
};

}  // namespace flexkv::memory
