#include "flexkv/testing/sim_plan.h"

namespace flexkv::testing {

SimPlan::SimPlan(SimLoop& loop) {
  const auto one_of = [&](std::initializer_list<std::uint32_t> values) {
    return *(values.begin() + loop.below(values.size()));
  };
  const auto fault = [&](unsigned most) {
    return loop.chance(500) ? 0U : static_cast<unsigned>(loop.between(1, most));
  };
  const auto millis = [&](std::uint64_t low, std::uint64_t high) {
    return static_cast<Nanos>(loop.between(low, high)) * kMillisecond;
  };

  const std::uint32_t kind_count = one_of({1, 1, 2, 3});
  std::uint64_t slot_pages_max = 1;
  for (std::uint32_t i = 0; i < kind_count; ++i) {
    Kind kind;
    kind.model = static_cast<std::uint32_t>(loop.below(2));
    kind.ranks = one_of({1, 1, 2, 2, 3, 4});
    kind.shards = loop.chance(500) ? kind.ranks : static_cast<std::uint32_t>(loop.between(1, kind.ranks));
    kind.neighbours = loop.chance(500);
    kind.layers = static_cast<std::uint32_t>(loop.between(1, 3));
    kind.layer_bytes = one_of({16, 24, 64});
    if (loop.chance(100)) kind.layer_bytes = 4096;
    slot_pages_max = std::max(slot_pages_max, kind.shards * ((kind.shard_bytes() + 4095) / 4096));
    kinds.push_back(kind);
  }
  const std::uint32_t engine_count = one_of({1, 2, 2, 3, 4});
  for (std::uint32_t i = 0; i < engine_count; ++i) {
    engine_kinds.push_back(static_cast<std::uint32_t>(loop.below(kind_count)));
    ++kinds[engine_kinds.back()].engines;
  }

  node.pool_bytes = 4096 * slot_pages_max * loop.between(6, loop.chance(500) ? 24 : 120);
  constexpr index::PolicyKind kPolicies[] = {
      index::PolicyKind::kAdaptive, index::PolicyKind::kLru,  index::PolicyKind::kHitReward,
      index::PolicyKind::kLfu,      index::PolicyKind::kSlru, index::PolicyKind::kFifo,
      index::PolicyKind::kFilo,     index::PolicyKind::kMru,  index::PolicyKind::kS3Fifo};
  node.policy.kind = kPolicies[loop.below(std::size(kPolicies))];
  node.policy.hit_reward = millis(1, 50);
  if (loop.chance(300)) {
    node.evict_start_threshold = 0.8;
    node.evict_ratio = 0.2;
  }
  load_timeout = millis(3, 30);
  save_timeout = millis(3, 60);
  node.load_timeout = loop.chance(500) ? load_timeout : millis(3, 30);
  node.save_timeout = loop.chance(500) ? save_timeout : millis(3, 60);
  node.lease_time = loop.chance(300) ? loop.delay(kMillisecond) : millis(1, 100);
  if (loop.chance(200)) node.sequence_keys_max = loop.between(8, 100);
  if (loop.chance(200)) node.jobs_max = static_cast<std::uint32_t>(loop.between(1, 6));
  duration = millis(60, 250);

  device_blocks = static_cast<std::uint32_t>(loop.between(20, 60));
  running_max = static_cast<std::uint32_t>(loop.between(2, 6));
  prompt_blocks_max = static_cast<std::uint32_t>(loop.between(4, 16));
  prefill_tokens_max = static_cast<std::uint32_t>(loop.between(3, 40));
  sync_blocks_max = one_of({0, 2, 100});
  steps_in_flight = one_of({1, 2, 2});
  documents = static_cast<std::uint32_t>(loop.between(1, 6));
  branch_permille = static_cast<unsigned>(loop.between(10, 200));
  embedded_port = loop.chance(400);
  reuse_time = loop.chance(300) ? 3600 * kSecond : 0;
  forward_time = loop.delay(500 * kMicrosecond) + kMicrosecond;

  message_delay = loop.chance(300) ? 0 : loop.delay(loop.chance(300) ? 5 * kMillisecond : 200 * kMicrosecond);
  piece_time = loop.delay(100 * kMicrosecond) + 1;
  stall_time = millis(1, 80);
  chunk_pieces = static_cast<std::uint32_t>(loop.between(1, 12));

  ring_full = fault(50);
  lookup_timeout = fault(100);
  copy_fails = fault(100);
  copy_stalls = fault(50);
  wrong_sums = fault(30);
  cancel_job = fault(200);
  abort_request = fault(20);
  agent_loses_node = fault(20);
  client_loses_node = fault(20);
  rank_dies = fault(10);
  engine_dies = fault(10);
  node_dies = fault(15);
  node_pauses = fault(20);
  node_drains = fault(5);
  reset = fault(30);
  new_weights = fault(30);

  prefetch = loop.chance(500) ? 0 : 500;
  remote = loop.chance(300);
  if (remote) {
    remote_time = loop.delay(kMillisecond);
    borrows = static_cast<unsigned>(loop.between(100, 1000));
    remote_fails = fault(100);
    remote_stalls = fault(30);
    remote_stale = fault(100);
    stores = loop.chance(600);
    store_off = fault(100);
  }

  if (loop.chance(500)) return;
  drives = one_of({1, 1, 2, 3});
  drive_slots = static_cast<std::uint32_t>(loop.between(2, loop.chance(500) ? 20 : 200));
  disk_depth = static_cast<std::uint32_t>(loop.between(1, 40));
  disk_time = loop.delay(kMillisecond);
  open_time = loop.delay(5 * kMillisecond);
  node.disk_admission = loop.chance(500);
  disk_fails = fault(100);
  disk_stalls = fault(30);
  disk_bad_slot = fault(50);
  disk_flips = fault(20);
  disk_budget = fault(50);
  disk_pressure = static_cast<double>(fault(1000)) / 1000;
  disk_rots = fault(100);
  scrub = fault(50);
}

}  // namespace flexkv::testing
