// The transfers of one rank as pure logic: what the node commands, what the engine's worker arms, what the lanes do.
//
// A job runs once it is both commanded (the node has told which host blocks) and armed (the engine has reached the
// point from which its device blocks may be read or written). The two arrive in either order, over different ways. The
// node may command it in pieces, in order: each is copied as it comes, and the job ends with the last. A load that ends
// before it is complete keeps its beginning: the leading blocks that were copied whole are good.
// INVARIANT: a job is reported to the node, and a load to the worker, exactly once, and only when no lane can touch its
// memory any more. Thread-compatible: RankAgent guards it with one mutex.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "flexkv/agent/leading_blocks.h"
#include "flexkv/base/time.h"
#include "flexkv/device/device.h"
#include "flexkv/proto/messages.h"

namespace flexkv::agent {

using proto::JobId;
using proto::JobStatus;

// A load that the worker waits for has ended on this rank.
struct LoadResult {
  JobId job = 0;
  bool ok = false;                // all blocks are there
  std::uint32_t good_blocks = 0;  // leading ones that are; those behind them may hold anything
};

class RankJobs {
 public:
  // Jobs given up before they were both commanded and armed are remembered, the newest this many, so that the half
  // that comes later fails at once. A half that comes after even that waits for its deadline.
  static constexpr std::size_t kGivenUpMax = 4096;

  // From the node. Without one, and before the first, every job that is armed fails at once.
  void node_found();
  void command(proto::CopyCommand command, Nanos deadline);
  void cancel(JobId job);
  // The node is gone: all that was not started has failed; what runs ends as canceled. Nothing is reported to it.
  void node_lost();

  // From the engine's worker. `is_load`: the worker will ask for the result. event, gate: may be null; the gate is
  // opened when the job ends.
  void arm(JobId job, bool is_load, std::shared_ptr<device::EngineEvent> event, Nanos deadline,
           std::shared_ptr<device::Gate> gate = nullptr);

  // For the lanes: a piece of the oldest job of that direction that may run; stays "running" until finished().
  struct Work {
    JobId job = 0;
    std::shared_ptr<const proto::CopyCommand> command;
    std::shared_ptr<device::EngineEvent> event;
    std::shared_ptr<device::Gate> gate;
  };
  std::optional<Work> next(device::Direction direction);
  bool canceled(JobId job) const;  // asked by a lane between chunks
  // `copied`: of the piece's blocks, in order, how many were copied whole; all if it is kDone. `sums`: of a save, as in
  // proto::JobReport.
  void finished(const Work& work, JobStatus status, std::size_t copied, std::vector<std::uint64_t> sums = {});

  std::optional<Nanos> next_deadline() const;
  void on_time(Nanos now);

  // True while the job may still touch device memory (running), or is going to.
  bool pending(JobId job) const { return jobs_.contains(job); }
  bool running(JobId job) const;

  // Whether next() has something to tell.
  bool ready(device::Direction direction) const { return !ready_[static_cast<int>(direction)].empty(); }
  // Whether jobs have ended since the last call: pending() may have changed.
  bool take_ended() { return std::exchange(ended_, false); }

  // What has accumulated for the node and for the worker.
  std::vector<proto::JobReport> take_reports();
  std::vector<LoadResult> take_loads();
  // Of the given loads, those that are not complete, or were never armed; takes the results of all of them. REQUIRES:
  // none is pending.
  std::vector<LoadResult> take_failed(std::span<const JobId> jobs);
  std::size_t job_count() const { return jobs_.size(); }

 private:
  struct Job {
    std::deque<std::shared_ptr<const proto::CopyCommand>> pieces;  // to be copied
    std::uint32_t pieces_seen = 0;
    bool complete = false;  // the last piece has come
    bool queued = false;    // in ready_
    std::shared_ptr<device::EngineEvent> event;
    std::shared_ptr<device::Gate> gate;
    bool armed = false;
    bool is_load = false;  // the worker waits for it
    bool running = false;
    bool canceled = false;
    bool node_knows = true;  // false once the node that commanded it is gone
    Nanos deadline = 0;
    LeadingBlocks copied;          // of a load
    std::uint32_t job_blocks = 0;  // of a load, in all pieces
  };

  void start_if_ready(JobId id, Job& job);
  void give_up(JobId id);
  void end(JobId id, JobStatus status, std::vector<std::uint64_t> sums = {});
  void remember_given_up(JobId id);

  std::unordered_map<JobId, Job> jobs_;
  bool node_up_ = false;
  bool ended_ = false;
  std::deque<JobId> ready_[2];  // by direction, oldest first
  std::set<std::pair<Nanos, JobId>> deadlines_;
  std::deque<JobId> given_up_order_;
  std::unordered_set<JobId> given_up_;
  std::vector<proto::JobReport> reports_;
  std::vector<LoadResult> loads_;
};

}  // namespace flexkv::agent
