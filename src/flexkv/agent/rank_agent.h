// Lives in the process that owns device memory (one per rank) and copies blocks between it and the node's host pool.
//
// Threads: one control lane (connects, receives commands, watches deadlines) and one lane per direction (copies).
// Every method below is thread-safe and may be called from an engine's worker thread; only those that say so wait.
// It starts before the node or after it, survives the node's death, and reattaches when a node comes back.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "flexkv/agent/rank_jobs.h"
#include "flexkv/base/fd.h"
#include "flexkv/device/device.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/layout/block_layout.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::agent {

struct RankAgentOptions {
  std::string runtime_dir;  // private directory, as ipc::runtime_dir() gives it
  std::string node_name;
  std::string engine_id;
  std::uint32_t rank = 0;
  std::uint32_t rank_count = 1;        // 0: as many as the engine's scheduler says
  std::optional<std::uint32_t> shard;  // as in proto::AgentHello
  Nanos load_timeout = 10 * kSecond;
  Nanos save_timeout = 30 * kSecond;
};

class RankAgent {
 public:
  // The device memory that `layout` describes must stay valid until the agent is destroyed or paused.
  static Result<std::unique_ptr<RankAgent>> start(RankAgentOptions options, std::shared_ptr<device::Device> device,
                                                  layout::BlockLayout layout);
  // Ends all threads; on return nothing touches device memory any more.
  ~RankAgent();

  // Lets jobs run once `engine_stream` has reached this point (host device: at once).
  void arm_loads(std::span<const JobId> jobs, std::uintptr_t engine_stream);
  // The same for loads that the engine follows part by part with hold_engine(): before what it computes next, instead
  // of waiting here until all has arrived. To be ended by wait_loads() like others.
  void arm_loads_in_parts(std::span<const JobId> jobs, std::uintptr_t engine_stream);
  // What is given to the engine's stream from now on starts once the first `parts` parts (of layout.parts()) of these
  // loads have arrived, or the loads have failed. Waits only where the device has no gates (host memory: until then).
  void hold_engine(std::span<const JobId> jobs, std::uint32_t parts, std::uintptr_t engine_stream);
  void arm_saves(std::span<const JobId> jobs, std::uintptr_t engine_stream);

  // Loads that have ended since the last call, each once. Never waits.
  std::vector<LoadResult> take_loads();
  // Waits until the given armed loads have ended (at the latest at their deadline) and returns those that are not
  // complete.
  std::vector<LoadResult> wait_loads(std::span<const JobId> jobs);
  // Waits until none of the jobs can touch device memory: for `patience` they may complete, then they are canceled.
  void fence(std::span<const JobId> jobs, Nanos patience);

  // Gives jobs up; those that run end after their current chunk.
  void cancel(std::span<const JobId> jobs);

  // Waits until the node has us; false: it has not within the timeout.
  bool wait_attached(Nanos timeout);

  struct Counters {
    bool attached = false;
    bool pool_registered = false;  // the device copies at full speed
    std::uint64_t attach_count = 0;
    std::uint64_t loaded_blocks = 0;
    std::uint64_t saved_blocks = 0;
    std::uint64_t failed_jobs = 0;
    std::string refusal;  // what the node said when it refused us; empty when it did not
  };
  Counters counters() const;

 private:
  // One connection to a node: its pool as mapped here, and the streams between it and the device.
  struct Session {
    memory::HostRegion pool;
    std::shared_ptr<device::Device> device;
    std::unique_ptr<device::CopyStream> streams[2];
    std::jthread pinning;
    ~Session();
  };

  RankAgent(RankAgentOptions options, std::shared_ptr<device::Device> device, layout::BlockLayout layout);

  void control_loop();
  Result<ipc::Connection> connect();
  Status open_session(const proto::Welcome& welcome, Fd pool);
  void serve(ipc::Channel& channel);
  void close_session();
  void lane_loop(device::Direction direction);
  struct Outcome {
    JobStatus status = JobStatus::kDone;
    std::size_t copied = 0;  // see RankJobs::finished
    std::vector<std::uint64_t> sums = {};
  };
  Outcome run(const RankJobs::Work& work, Session& session);
  void arm(std::span<const JobId> jobs, bool loads, std::uintptr_t engine_stream, bool in_parts);
  // `submitted`: how many blocks.
  Status submit(const RankJobs::Work& work, device::CopyStream& stream, std::size_t part, bool& canceled,
                std::size_t& submitted);
  Status sum(const RankJobs::Work& work, device::CopyStream& stream, std::vector<std::uint64_t>& sums);
  void wake_all();
  // Holds the mutex, for changing the jobs. At its end hands reports to the node and, once the mutex is free, wakes
  // those whom the change concerns: each wake-up costs a switch of threads, twice that if the mutex is still taken.
  class Change {
   public:
    explicit Change(RankAgent& agent) : agent_(agent), lock_(agent.mutex_) {}
    ~Change();
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;

   private:
    RankAgent& agent_;
    std::unique_lock<std::mutex> lock_;
  };
  void send_reports();  // mutex_ is held

  const RankAgentOptions options_;
  const std::shared_ptr<device::Device> device_;
  const layout::BlockLayout layout_;
  Fd stop_;     // readable once stopping
  Fd control_;  // rung when a deadline came nearer

  mutable std::mutex mutex_;
  std::condition_variable work_[2];  // a lane each: a job may run, or stopping
  std::condition_variable done_;     // waiters: a job has ended, or the node has us
  bool stopping_ = false;
  RankJobs jobs_;
  std::unordered_map<JobId, std::shared_ptr<device::Gate>> gates_;  // of loads armed in parts and not waited for yet
  ipc::Channel* channel_ = nullptr;  // owned by control_loop's frame; null while detached
  std::unique_ptr<Session> session_;
  Nanos control_wakeup_ = 0;
  Counters counters_;

  std::uint32_t saves_until_sum_ = 0;  // blocks; the save lane's

  std::thread control_thread_;
  std::thread lanes_[2];
};

}  // namespace flexkv::agent
