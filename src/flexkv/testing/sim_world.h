// A whole machine in one thread: a node, several engines with their ranks and schedulers, and faults by plan. Runs a
// seed to its end and checks what must always hold: right bytes only, no two users of one place in the pool, every load
// ends in time, nothing is left over. A violation prints the latest events and aborts. Owned by one thread.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "flexkv/testing/sim_engine.h"
#include "flexkv/testing/sim_plan.h"

namespace flexkv::testing {

struct SimTotals {
  std::uint64_t requests = 0;
  std::uint64_t loads = 0;
  std::uint64_t loads_ok = 0;
  std::uint64_t loads_in_part = 0;  // of which a beginning was good
  std::uint64_t blocks_hit = 0;
  std::uint64_t blocks_loaded = 0;        // per rank
  std::uint64_t blocks_loaded_alike = 0;  // of them, by ranks whose shard others hold, too
  std::uint64_t blocks_saved = 0;
  std::uint64_t blocks_evicted = 0;
  std::uint64_t blocks_fetched = 0;  // from drives
  std::uint64_t blocks_prefetched = 0;
  std::uint64_t blocks_written = 0;  // to drives
  std::uint64_t blocks_recovered = 0;
  std::uint64_t blocks_scrubbed = 0;
  std::uint64_t bad_blocks_scrubbed = 0;
  std::uint64_t blocks_imported = 0;  // from beyond the machine
  std::uint64_t blocks_lent = 0;
  std::uint64_t blocks_stored = 0;   // beyond the machine
  std::uint64_t blocks_offered = 0;  // of them, or given up, by nodes that drained at the end
  std::uint64_t blocks_checked = 0;
  std::uint64_t blocks_damaged = 0;
  std::uint64_t nodes = 0;
  std::uint64_t engines = 0;
  std::array<std::uint64_t, proto::kReasonCount> failed_loads{};
  std::array<std::uint64_t, proto::kReasonCount> unsaved_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> missed_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unfetched_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unwritten_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unimported_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unstored_blocks{};
  void add(const SimTotals& other);
};

class SimWorld {
 public:
  SimWorld(std::uint64_t seed, bool verbose);
  // Nothing happens in this one but what the caller does.
  explicit SimWorld(SimPlan plan);
  ~SimWorld();
  // Runs the world to its end; the hash of all that happened.
  std::uint64_t run();

  // ---- by script
  void pass(Nanos time);
  // Lets pass what it takes until nothing is under way.
  void settle(Nanos patience);
  // What is on drives stays.
  void restart_node();
  SimEngine& engine(std::size_t index) { return *engines_[index]; }
  SimPlan& script() { return plan_; }

  SimLoop& loop() { return loop_; }
  const SimPlan& plan() const { return plan_; }
  SimNode* node() { return node_.get(); }
  std::uint64_t epoch() const { return epoch_; }
  SimTotals& totals() { return totals_; }
  std::uint64_t new_weights() { return ++last_weights_; }  // any model's; 0: as stored
  // No transfer may take longer from when it was allowed to run.
  Nanos transfer_time_max() const;

 private:
  void start_node();
  void stop_node();
  void start_engines();
  bool quiet() const;
  void start_engine(std::size_t index);
  void strike();
  void drain();
  void scrub_twice();
  void check_nothing_left();

  SimLoop loop_;
  SimPlan plan_;
  SimTotals totals_;
  SimStore store_;
  SimElsewhere elsewhere_;
  std::unique_ptr<SimNode> node_;
  std::uint64_t epoch_ = 0;
  std::uint64_t last_weights_ = 0;
  std::vector<std::shared_ptr<SimEngine>> engines_;
  std::uint64_t next_engine_ = 1;
};

}  // namespace flexkv::testing
