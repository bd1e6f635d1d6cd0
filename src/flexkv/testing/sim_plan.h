// What a world looks like and which faults strike it. Drawn from a seed (swarm testing: each fault is off in about half
// of the worlds, so that the others are not always drowned by it), or written down by a test. Plain values.
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/node/node.h"
#include "flexkv/testing/sim_loop.h"

namespace flexkv::testing {

struct SimPlan {
  SimPlan() = default;
  explicit SimPlan(SimLoop& loop);

  // Engines of the same kind share blocks; so do those of kinds that differ only in which ranks hold which shard.
  struct Kind {
    std::uint32_t model = 0;
    std::uint32_t ranks = 1;
    std::uint32_t shards = 1;  // of them distinct
    bool neighbours = true;    // which ranks hold a shard alike: those side by side, or every shards-th
    std::uint32_t layers = 1;
    std::uint32_t layer_bytes = 16;
    std::uint32_t engines = 0;
    std::uint64_t shard_bytes() const { return std::uint64_t{layers} * layer_bytes; }
    std::uint32_t shard_of(std::uint32_t rank) const { return neighbours ? rank * shards / ranks : rank % shards; }
    bool shared(std::uint32_t shard) const {
      std::uint32_t holders = 0;
      for (std::uint32_t rank = 0; rank < ranks; ++rank) holders += shard_of(rank) == shard;
      return holders > 1;
    }
  };
  std::vector<Kind> kinds;
  std::vector<std::uint32_t> engine_kinds;  // per engine
  node::NodeOptions node;
  Nanos duration = 0;
  Nanos load_timeout = 0;
  Nanos save_timeout = 0;

  // engines
  std::uint32_t device_blocks = 0;
  std::uint32_t running_max = 0;
  std::uint32_t prompt_blocks_max = 0;
  std::uint32_t prefill_tokens_max = 0;  // per step
  std::uint32_t sync_blocks_max = 0;     // longer loads are asynchronous
  std::uint32_t steps_in_flight = 1;
  std::uint32_t documents = 1;
  unsigned branch_permille = 0;
  bool embedded_port = false;
  Nanos reuse_time = 0;
  Nanos forward_time = 0;
  plan::PrefillTime prefill;      // known: forwards take that, and the node is told of them
  bool loads = true;              // false: all prompts are computed
  bool prefetch_at_once = false;  // when a request comes
  unsigned arrivals = 400;        // of requests that nobody submits, per mille of the ticks

  // drives: none in half of the worlds
  std::uint32_t drives = 0;
  std::uint32_t drive_slots = 0;
  std::uint32_t disk_depth = 0;
  Nanos disk_time = 0;
  std::vector<Nanos>
      block_times;  // of each drive: blocks one after the other, reads first; empty: disk_time, by chance
  double disk_pressure = 0;
  Nanos open_time = 0;
  unsigned prefetch = 0;  // per mille of the requests

  // beyond the machine
  bool remote = false;
  Nanos remote_time = 0;  // of a block
  bool stores = false;    // blocks are written there, too
  unsigned borrows = 0;   // per mille of the ticks of the fault clock

  // time
  Nanos message_delay = 0;
  Nanos piece_time = 0;  // of half a block
  Nanos stall_time = 0;
  std::uint32_t chunk_pieces = 1;

  // faults, per mille of the occasions
  unsigned ring_full = 0;
  unsigned lookup_timeout = 0;
  unsigned copy_fails = 0;
  unsigned copy_stalls = 0;
  unsigned wrong_sums = 0;
  unsigned cancel_job = 0;
  unsigned abort_request = 0;
  unsigned disk_fails = 0;
  unsigned disk_stalls = 0;
  unsigned disk_bad_slot = 0;
  unsigned disk_budget = 0;
  unsigned remote_fails = 0;
  unsigned remote_stalls = 0;
  unsigned remote_stale = 0;
  unsigned store_off = 0;
  // faults, per mille of the ticks of the fault clock (kFaultTick)
  unsigned agent_loses_node = 0;
  unsigned client_loses_node = 0;
  unsigned rank_dies = 0;
  unsigned engine_dies = 0;
  unsigned node_dies = 0;
  unsigned node_pauses = 0;
  unsigned node_drains = 0;
  unsigned reset = 0;
  unsigned new_weights = 0;
  unsigned disk_flips = 0;
  unsigned disk_rots = 0;
  unsigned scrub = 0;  // begins, and ends, before its time
};

constexpr Nanos kFaultTick = kMillisecond;
constexpr std::uint32_t kBlockTokens = 4;

}  // namespace flexkv::testing
