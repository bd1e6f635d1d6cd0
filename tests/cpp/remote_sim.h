// The remote tier's engine in a simulated world, from a seed: nodes that share one bucket, over stores that are slow,
// fail, hang, tear, lose, swap and change what they keep or send, on a virtual clock.
//
// Checked: what a node is told of is what somebody wrote under that key; every request ends once, by its deadline; no
// store touches memory of a request that has ended (it is freed then: an address sanitizer's business); once the faults
// are over, what is written is read by all.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "flexkv/base/prng.h"
#include "flexkv/remote/engine.h"

namespace flexkv::testing {

using Bucket = std::map<std::string, std::vector<std::byte>>;

struct RemoteSimTotals {
  std::uint64_t blocks_read = 0;
  std::uint64_t blocks_written = 0;
  std::array<std::uint64_t, remote::kOutcomeCount> reads{};
  std::array<std::uint64_t, remote::kOutcomeCount> writes{};
  std::array<std::uint64_t, remote::kFaultCount> faults{};
  std::uint64_t switched_off = 0;
};

class RemoteSim {
 public:
  RemoteSim(std::uint64_t seed, RemoteSimTotals& totals);
  ~RemoteSim();
  void run();

 private:
  class SimStore;
  class Node;

  void run_until(Nanos end, bool with_requests);
  void damage();
  void check_convergence();

  Prng prng_;
  RemoteSimTotals& totals_;
  Nanos now_ = 1;
  unsigned fault_percent_ = 0;
  Bucket bucket_;
  std::vector<std::unique_ptr<Node>> nodes_;
};

}  // namespace flexkv::testing
