#include "flexkv/agent/rank_jobs.h"

#include <algorithm>

namespace flexkv::agent {

void RankJobs::command(proto::CopyCommand command, Nanos deadline) {
  const JobId id = command.job;
  if (given_up_.contains(id)) {
    if (command.piece == 0) reports_.push_back({id, JobStatus::kCanceled, 0});
    return;
  }
  if (command.piece > 0 && !jobs_.contains(id)) return;  // the rest of a job that has ended
  Job& job = jobs_[id];
  if (command.piece != job.pieces_seen || job.complete) return;  // said twice: the first one counts
  ++job.pieces_seen;
  job.complete = command.last;
  job.job_blocks = command.job_blocks;
  job.armed = job.armed || command.armed;
  if (job.deadline == 0) {
    job.deadline = deadline;
    deadlines_.emplace(deadline, id);
  }
  job.pieces.push_back(std::make_shared<const proto::CopyCommand>(std::move(command)));
  start_if_ready(id, job);
}

void RankJobs::arm(JobId id, bool is_load, std::shared_ptr<device::EngineEvent> event, Nanos deadline,
                   std::shared_ptr<device::Gate> gate) {
  if (!node_up_ || given_up_.contains(id)) {
    // A node that counts us as attached already may have commanded it: it should not wait for its deadline either.
    if (!node_up_) remember_given_up(id);
    if (is_load) loads_.push_back({id, false, 0});
    if (gate != nullptr) gate->open();
    return;
  }
  Job& job = jobs_[id];
  job.gate = std::move(gate);
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
  if (job.pieces.empty() || !job.armed || job.running || job.queued || job.canceled) return;
  job.queued = true;
  ready_[static_cast<int>(job.pieces.front()->direction)].push_back(id);
}

std::optional<RankJobs::Work> RankJobs::next(device::Direction direction) {
  auto& queue = ready_[static_cast<int>(direction)];
  while (!queue.empty()) {
    const JobId id = queue.front();
    queue.pop_front();
    const auto found = jobs_.find(id);
    if (found == jobs_.end()) continue;  // given up while it waited
    Job& job = found->second;
    job.queued = false;
    job.running = true;
    auto piece = std::move(job.pieces.front());
    job.pieces.pop_front();
    return Work{id, std::move(piece), job.event, job.gate};
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

void RankJobs::finished(const Work& work, JobStatus status, std::size_t copied, std::vector<std::uint64_t> sums) {
  const auto found = jobs_.find(work.job);
  if (found == jobs_.end()) return;
  Job& job = found->second;
  for (proto::BlockSpan span : work.command->spans) {
    span.count = static_cast<std::uint32_t>(std::min<std::size_t>(span.count, copied));
    if (span.count == 0) break;
    job.copied.add(span);
    copied -= span.count;
  }
  const bool all_copied = job.complete && job.pieces.empty();
  if (status != JobStatus::kDone || all_copied) {
    end(work.job, status, std::move(sums));
  } else if (job.canceled) {
    end(work.job, JobStatus::kCanceled);
  } else {
    job.running = false;
    start_if_ready(work.job, job);
  }
}

void RankJobs::end(JobId id, JobStatus status, std::vector<std::uint64_t> sums) {
  ended_ = true;
  auto node = jobs_.extract(id);
  Job& job = node.mapped();
  deadlines_.erase({job.deadline, id});
  const std::uint32_t good = job.copied.count();
  if (job.pieces_seen > 0 && job.node_knows) reports_.push_back({id, status, good, std::move(sums)});
  if (job.is_load) loads_.push_back({id, good > 0 && good == job.job_blocks, good});
  if (job.gate != nullptr) job.gate->open();
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
  if (job.pieces_seen == 0 || !job.armed) remember_given_up(id);
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

std::vector<LoadResult> RankJobs::take_failed(std::span<const JobId> jobs) {
  std::vector<LoadResult> failed;
  for (const JobId job : jobs) failed.push_back({job, false, 0});
  std::erase_if(loads_, [&](const LoadResult& load) {
    const auto asked = std::ranges::find(failed, load.job, &LoadResult::job);
    if (asked == failed.end()) return false;
    *asked = load;
    return true;
  });
  std::erase_if(failed, [](const LoadResult& load) { return load.ok; });
  return failed;
}

}  // namespace flexkv::agent
