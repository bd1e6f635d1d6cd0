#include "flexkv/testing/sim_world.h"

#include <algorithm>

namespace flexkv::testing {
namespace {

void add_all(auto& sums, const auto& values) {
  for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += values[i];
}

}  // namespace

void SimTotals::add(const SimTotals& other) {
  requests += other.requests;
  loads += other.loads;
  loads_ok += other.loads_ok;
  loads_in_part += other.loads_in_part;
  blocks_hit += other.blocks_hit;
  blocks_loaded += other.blocks_loaded;
  blocks_loaded_alike += other.blocks_loaded_alike;
  blocks_saved += other.blocks_saved;
  blocks_evicted += other.blocks_evicted;
  blocks_fetched += other.blocks_fetched;
  blocks_prefetched += other.blocks_prefetched;
  blocks_written += other.blocks_written;
  blocks_recovered += other.blocks_recovered;
  blocks_scrubbed += other.blocks_scrubbed;
  bad_blocks_scrubbed += other.bad_blocks_scrubbed;
  blocks_imported += other.blocks_imported;
  blocks_lent += other.blocks_lent;
  blocks_stored += other.blocks_stored;
  blocks_offered += other.blocks_offered;
  blocks_checked += other.blocks_checked;
  blocks_damaged += other.blocks_damaged;
  nodes += other.nodes;
  engines += other.engines;
  add_all(failed_loads, other.failed_loads);
  add_all(unsaved_blocks, other.unsaved_blocks);
  add_all(missed_blocks, other.missed_blocks);
  add_all(unfetched_blocks, other.unfetched_blocks);
  add_all(unwritten_blocks, other.unwritten_blocks);
  add_all(unimported_blocks, other.unimported_blocks);
  add_all(unstored_blocks, other.unstored_blocks);
}

SimWorld::SimWorld(std::uint64_t seed, bool verbose) : loop_(seed, verbose), plan_(loop_) { start_engines(); }

SimWorld::SimWorld(SimPlan plan) : loop_(1, false), plan_(std::move(plan)) { start_engines(); }

void SimWorld::start_engines() {
  start_node();
  engines_.resize(plan_.engine_kinds.size());
  for (std::size_t i = 0; i < engines_.size(); ++i) start_engine(i);
}

SimWorld::~SimWorld() {
  for (const auto& engine : engines_) engine->die();
  node_.reset();
}

void SimWorld::start_node() {
  loop_.note("node: starts", ++epoch_);
  ++totals_.nodes;
  node_ = std::make_unique<SimNode>(loop_, plan_, store_, elsewhere_, epoch_);
}

void SimWorld::stop_node() {
  loop_.note("node: dies", epoch_);
  const auto& stats = node_->core().stats();
  totals_.blocks_saved += stats.blocks_saved;
  totals_.blocks_evicted += stats.blocks_evicted;
  totals_.blocks_fetched += stats.from_disk.blocks;
  totals_.blocks_prefetched += stats.blocks_prefetched;
  totals_.blocks_written += stats.to_disk.blocks;
  totals_.blocks_recovered += stats.disk_blocks_recovered;
  if (const node::ScrubStatus* scrub = node_->core().scrub()) {
    for (const auto& drive : scrub->drives) {
      totals_.blocks_scrubbed += drive.checked_blocks;
      totals_.bad_blocks_scrubbed += drive.damaged_blocks;
    }
  }
  totals_.blocks_imported += stats.from_remote.blocks;
  totals_.blocks_lent += stats.blocks_lent;
  totals_.blocks_stored += stats.to_store.blocks;
  add_all(totals_.unstored_blocks, stats.unstored_blocks);
  totals_.blocks_checked += stats.blocks_checked;
  totals_.blocks_damaged += stats.blocks_damaged;
  add_all(totals_.unimported_blocks, stats.unimported_blocks);
  add_all(totals_.unfetched_blocks, stats.unfetched_blocks);
  add_all(totals_.unwritten_blocks, stats.unwritten_blocks);
  add_all(totals_.failed_loads, stats.failed_loads);
  add_all(totals_.unsaved_blocks, stats.unsaved_blocks);
  add_all(totals_.missed_blocks, stats.missed_blocks);
  node_.reset();
}

void SimWorld::start_engine(std::size_t index) {
  ++totals_.engines;
  engines_[index] = std::make_shared<SimEngine>(*this, plan_.engine_kinds[index], next_engine_++);
  engines_[index]->start();
}

Nanos SimWorld::transfer_time_max() const {
  const Nanos pieces = 2 * plan_.device_blocks;
  return std::max(plan_.load_timeout, plan_.save_timeout) + plan_.stall_time + pieces * plan_.piece_time +
         2 * kMillisecond;
}

void SimWorld::strike() {
  if (node_ == nullptr) {
    if (loop_.chance(200)) start_node();
  } else if (loop_.chance(node_->core().draining() ? 100 : plan_.node_dies)) {
    stop_node();
  } else if (!node_->paused() && !node_->core().draining() && loop_.chance(plan_.node_drains)) {
    node_->drain(loop_.now() + loop_.delay(kSecond));
  } else if (loop_.chance(plan_.node_pauses)) {
    const Nanos pause = loop_.delay(loop_.chance(200) ? 2 * plan_.save_timeout : 5 * kMillisecond);
    loop_.note("node: pauses", static_cast<std::uint64_t>(pause));
    node_->pause(loop_.now() + pause);
  }
  if (node_ != nullptr && node_->disk() != nullptr && loop_.chance(plan_.disk_flips)) {
    node_->disk()->flip(static_cast<unsigned>(loop_.below(plan_.drives)));
  }
  if (node_ != nullptr && node_->disk() != nullptr) {
    if (loop_.chance(plan_.disk_rots)) node_->disk()->rot();
    // Up to 100 blocks of 4 KiB in a tick.
    if (!node_->paused() && loop_.chance(plan_.scrub))
      node_->scrub(loop_.chance(200) ? 0 : loop_.between(1, 400) << 20);
  }
  if (node_ != nullptr && node_->remote() != nullptr && !node_->paused() && loop_.chance(plan_.borrows)) {
    node_->remote()->borrow();
  }
  SimEngine& engine = *engines_[loop_.below(engines_.size())];
  if (!engine.dead()) {
    if (loop_.chance(plan_.agent_loses_node)) engine.lose_agent_connection(loop_.below(4));
    if (loop_.chance(plan_.client_loses_node)) engine.lose_client_connection();
    if (loop_.chance(plan_.reset)) engine.reset_cache();
    if (loop_.chance(plan_.new_weights)) engine.change_weights();
    if (loop_.chance(plan_.rank_dies)) engine.kill_rank(loop_.below(4));
    if (loop_.chance(plan_.engine_dies)) engine.die();
  }
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    if (engines_[i]->dead() && loop_.chance(300)) start_engine(i);
  }
}

void SimWorld::pass(Nanos time) {
  const Nanos end = loop_.now() + time;
  while (loop_.step(end)) {
  }
}

std::uint64_t SimWorld::run() {
  for (Nanos tick = kFaultTick; tick < plan_.duration; tick += kFaultTick) {
    pass(kFaultTick);
    strike();
  }
  drain();
  check_nothing_left();
  return loop_.hash();
}

bool SimWorld::quiet() const {
  const auto disk = node_->core().disk_queues();
  return !node_->paused() && node_->core().jobs_in_flight() == 0 && disk.fetches == 0 && disk.writes == 0 &&
         node_->core().store_queue() == 0 && (node_->remote() == nullptr || node_->remote()->idle()) &&
         std::all_of(engines_.begin(), engines_.end(), [](const auto& engine) { return engine->idle(); });
}

void SimWorld::settle(Nanos patience) {
  const Nanos end = loop_.now() + patience;
  do {
    SIM_CHECK(loop_.now() < end);
    pass(kFaultTick);
  } while (!quiet());
}

void SimWorld::restart_node() {
  stop_node();
  start_node();
}

// No more faults of the large kind and no new requests: everything comes to its end, in bounded time.
void SimWorld::drain() {
  loop_.note("world: drains");
  if (node_ == nullptr) start_node();
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    if (engines_[i]->dead()) start_engine(i);
    engines_[i]->drain();
  }
  const Nanos end = loop_.now() + 20 * kSecond;
  while (!quiet()) {
    SIM_CHECK(loop_.now() < end);  // NEVER HANGING
    pass(kFaultTick);
    // A rank that was killed last takes its engine along only now.
    for (std::size_t i = 0; i < engines_.size(); ++i) {
      if (!engines_[i]->dead()) continue;
      start_engine(i);
      engines_[i]->drain();
    }
  }
  pass(20 * kMillisecond);
  if (node_->disk() != nullptr) scrub_twice();
  node_->drain(loop_.now() + 20 * kSecond);
  const Nanos late = loop_.now() + 20 * kSecond;
  for (; !node_->core().undone().none() || !quiet(); pass(kFaultTick)) SIM_CHECK(loop_.now() < late);
  totals_.blocks_offered += node_->core().undone().offered;
}

// What the first one leaves is good.
void SimWorld::scrub_twice() {
  SimDisk& disk = *node_->disk();
  disk.calm();
  node_->scrub(0);
  const auto recovers = [](const node::Node::SpaceInfo& space) { return space.recovering; };
  for (const bool again : {false, true}) {
    const Nanos end = loop_.now() + 20 * kSecond;
    const auto wait = [&](auto until) {
      for (; !until(); pass(kFaultTick)) SIM_CHECK(loop_.now() < end);
    };
    wait([&] { return disk.idle() && std::ranges::none_of(node_->core().spaces(), recovers); });
    const std::uint64_t bad = disk.bad_found();
    node_->scrub(1ULL << 40);
    const node::ScrubStatus& status = *node_->core().scrub();
    wait([&] { return status.state == node::ScrubStatus::State::kDone; });
    std::uint64_t checked = 0;
    std::uint64_t found = 0;
    for (const auto& drive : status.drives) {
      checked += drive.checked_blocks;
      found += drive.damaged_blocks;
      SIM_CHECK(drive.unchecked_blocks == 0 && drive.unreadable_blocks == 0);
    }
    SIM_CHECK(checked == status.blocks);
    SIM_CHECK(found == disk.bad_found() - bad);
    SIM_CHECK(!again || found == 0);
  }
}

void SimWorld::check_nothing_left() {
  node::Node& core = node_->core();
  core.check_invariants();
  SIM_CHECK(core.jobs_in_flight() == 0);
  SIM_CHECK(!core.next_deadline().has_value());
  for (const auto& engine : core.engines()) SIM_CHECK(engine.sequences == 0);
  std::uint32_t used = 0;
  for (const auto& space : core.spaces()) {
    SIM_CHECK(space.reserved == 0);
    used += space.used;
  }
  SIM_CHECK(used == core.blocks_in_use());
  // Blocks that a forgotten pin holds would outlive the reset.
  core.reset_all(1, loop_.now());
  core.check_invariants();
  SIM_CHECK(core.blocks_in_use() == 0);
  for (const auto& engine : engines_) engine->die();
  pass(20 * kMillisecond);
  SIM_CHECK(core.engines().empty());
  core.reset_all(1, loop_.now());
  SIM_CHECK(core.spaces().empty());
  SIM_CHECK(core.free_pool_bytes() == plan_.node.pool_bytes);
  stop_node();
}

}  // namespace flexkv::testing
