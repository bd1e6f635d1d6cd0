#include "flexkv/agent/rank_jobs.h"

#include <algorithm>
#include <utility>

namespace flexkv::agent {

void RankJobs::command(proto::CopyCommand command, Nanos deadline) {
  const JobId id = command.job;
  if (given_up_.contains(id)) {
    reports_.push_back({id, JobStatus::kCanceled});
    return;
  }
  Job& job = jobs_[id];
  if (job.command != nullptr) return;  // said twice: the first one counts
  job.armed = job.armed || command.armed;
  if (job.deadline == 0) {
    job.deadline = deadline;
    deadlines_.emplace(deadline, id);
  }
  job.command = std::make_shared<const proto::CopyCommand>(std::move(command));
  start_if_ready(id, job);
}

void RankJobs::arm(JobId id, bool is_load, std::shared_ptr<device::EngineEvent> event, Nanos deadline) {
  if (!node_up_ || given_up_.contains(id)) {
    // A node that counts us as attached already may have commanded it: it should not wait for its deadline either.
    if (!node_up_) remember_given_up(id);
    if (is_load) loads_.push_back({id, false});
    return;
  }
  Job& job = jobs_[id];
  job.armed = true;
  job.is_load = is_load;
  job.event = std::move(event);
  if (job.deadline == 0) {
    job.deadline = deadline;
    deadlines_.emplace(deadline, id);
  }
  start_if_ready(id, job);
}

void RankJobs::start_if_ready(JobId id, Job& job) {
  if (job.command == nullptr || !job.armed || job.running || job.canceled) return;
  ready_[static_cast<int>(job.command->direction)].push_back(id);
}

std::optional<RankJobs::Work> RankJobs::next(device::Direction direction) {
  auto& queue = ready_[static_cast<int>(direction)];
  while (!queue.empty()) {
    const JobId id = queue.front();
    queue.pop_front();
    const auto found = jobs_.find(id);
    if (found == jobs_.end() || found->second.running) continue;  // given up while it waited
    found->second.running = true;
    return Work{id, found->second.command, found->second.event};
  }
  return std::nullopt;
}

bool RankJobs::running(JobId id) const {
  const auto found = jobs_.find(id);
  return found != jobs_.end() && found->second.running;
}

bool RankJobs::canceled(JobId id) const {
  const auto found = jobs_.find(id);
  return found == jobs_.end() || found->second.canceled;
}

void RankJobs::finished(JobId id, JobStatus status) {
  if (jobs_.contains(id)) end(id, status);
}

void RankJobs::end(JobId id, JobStatus status) {
  auto node = jobs_.extract(id);
  Job& job = node.mapped();
  deadlines_.erase({job.deadline, id});
  if (job.command != nullptr && job.node_knows) reports_.push_back({id, status});
  if (job.is_load) loads_.push_back({id, status == JobStatus::kDone});
}

// Ends a job that no lane has begun; one that runs is flagged and ends when its lane has stopped.
void RankJobs::give_up(JobId id) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) {
    remember_given_up(id);
    return;
  }
  Job& job = found->second;
  job.canceled = true;
  if (job.running) {
    deadlines_.erase({job.deadline, id});
    return;
  }
  if (job.command == nullptr || !job.armed) remember_given_up(id);
  end(id, JobStatus::kCanceled);
}

void RankJobs::remember_given_up(JobId id) {
  if (!given_up_.insert(id).second) return;
  given_up_order_.push_back(id);
  if (given_up_order_.size() > kGivenUpMax) {
    given_up_.erase(given_up_order_.front());
    given_up_order_.pop_front();
  }
}

void RankJobs::cancel(JobId id) { give_up(id); }

void RankJobs::node_found() { node_up_ = true; }

void RankJobs::node_lost() {
  std::vector<JobId> ids;
  for (auto& [id, job] : jobs_) {
    job.node_knows = false;
    ids.push_back(id);
  }
  for (const JobId id : ids) give_up(id);
  reports_.clear();
  node_up_ = false;
}

std::optional<Nanos> RankJobs::next_deadline() const {
  if (deadlines_.empty()) return std::nullopt;
  return deadlines_.begin()->first;
}

void RankJobs::on_time(Nanos now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) give_up(deadlines_.begin()->second);
}

std::vector<proto::JobReport> RankJobs::take_reports() { return std::exchange(reports_, {}); }
std::vector<LoadResult> RankJobs::take_loads() { return std::exchange(loads_, {}); }

std::vector<JobId> RankJobs::take_failed(std::span<const JobId> jobs) {
  std::vector<JobId> failed;
  std::erase_if(loads_, [&](const LoadResult& load) {
    if (std::find(jobs.begin(), jobs.end(), load.job) == jobs.end()) return false;
    if (!load.ok) failed.push_back(load.job);
    return true;
  });
  return failed;
}

}  // namespace flexkv::agent
