// One rank's process: the real agent::RankJobs, copy lanes that move real bytes piece by piece at virtual times, the
// device memory, and what the engine's worker does there in each step (as in integration/vllm/worker.py).
// Owned by one thread; held by shared_ptr because events of the loop refer to it. stop() ends it.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "flexkv/agent/rank_jobs.h"
#include "flexkv/testing/sim_node.h"

namespace flexkv::testing {

class SimWorld;

struct LoadOrder {
  proto::JobId job = 0;
  std::uint64_t request = 0;
  bool sync = false;
  std::vector<std::uint32_t> blocks;  // on the device
  std::vector<std::uint64_t> tags;    // what must be in them afterwards
};

// What the scheduler side tells the workers, once per step.
struct StepOrders {
  std::uint64_t number = 0;
  std::vector<std::shared_ptr<const LoadOrder>> loads;
  std::vector<proto::JobId> saves;
};

// What a worker says at the end of a step.
struct StepReport {
  std::vector<agent::LoadResult> ended_loads;  // the asynchronous ones
  std::set<std::uint32_t> bad_blocks;          // of synchronous ones that are not complete
};

class SimRank : public std::enable_shared_from_this<SimRank> {
 public:
  struct Callbacks {
    std::function<void(std::uint64_t step)> ready_for_forward;
    std::function<void(std::uint64_t step, StepReport)> step_done;
  };
  SimRank(SimWorld& world, const SimPlan::Kind& kind, proto::AgentHello hello, Callbacks callbacks);

  void start() { connect_after(0); }
  // The process dies.
  void stop();
  void lose_node();
  bool stopped() const { return stopped_; }

  void begin_step(std::shared_ptr<const StepOrders> orders);
  void forward_done();
  std::span<std::byte> device_block(std::uint32_t block);
  bool idle() const { return jobs_.job_count() == 0 && armed_at_.empty() && loading_.empty() && steps_.empty(); }

 private:
  struct Lane {
    std::optional<agent::RankJobs::Work> work;
    std::vector<device::BlockCopy> blocks;  // of the work
    std::vector<std::uint64_t> sums;        // of a save
    std::shared_ptr<AgentLink> link;
    std::size_t piece = 0;
    std::size_t bad_piece = 0;  // fails or stalls there
    bool fails = false;
    bool stalls = false;
    bool broken = false;
    bool canceled = false;
  };

  void connect_after(Nanos delay);
  void connect();
  void receive(const proto::ToAgent& message);
  void after_change();
  void schedule_deadline();
  void pump(device::Direction direction);
  void copy_piece(device::Direction direction);
  void lane_done(device::Direction direction);
  void close_when_quiet();

  void start_loads();
  void wait_for(std::vector<proto::JobId> jobs, std::function<void()> then);
  void check_waiters();
  void end_load(const LoadOrder& order, const agent::LoadResult& result);
  // Runs later, unless the process is stopped by then.
  void later(Nanos delay, std::function<void(SimRank&)> action);

  SimWorld& world_;
  SimLoop& loop_;
  const SimPlan& plan_;
  const std::uint32_t rank_;
  const std::uint32_t shard_;
  const bool shard_is_shared_;
  const std::uint64_t shard_bytes_;
  const proto::AgentHello hello_;
  const Callbacks callbacks_;
  Bytes device_;
  agent::RankJobs jobs_;
  std::array<Lane, 2> lanes_;
  std::shared_ptr<AgentLink> link_;
  std::shared_ptr<AgentLink> leaving_;  // lost, but lanes may still be busy with its pool
  std::uint64_t link_epoch_ = 0;
  Nanos deadline_timer_;
  bool stopped_ = false;
  bool changing_ = false;

  // The worker.
  std::deque<std::shared_ptr<const StepOrders>> steps_;  // the first one runs
  bool step_running_ = false;
  std::vector<proto::JobId> waited_;
  std::function<void()> then_;
  std::map<proto::JobId, std::shared_ptr<const LoadOrder>> loading_;
  std::map<proto::JobId, Nanos> armed_at_;
  StepReport report_;
  std::uint64_t distrust_until_ = 0;
};

}  // namespace flexkv::testing
