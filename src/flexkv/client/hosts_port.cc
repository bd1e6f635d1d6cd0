// The nodes of an engine's machines as one.
#include <algorithm>
#include <map>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/client/node_port.h"

namespace flexkv::client {
namespace {

using proto::Reason;

bool answered(const proto::LookupReply& reply) {
  return reply.reason != Reason::kNoNode && reply.reason != Reason::kNotReady &&
         reply.reason != Reason::kTooManySequences && reply.reason != Reason::kUnknownSequence;
}

class HostsPort final : public NodePort {
 public:
  explicit HostsPort(std::vector<std::unique_ptr<HostPort>> hosts) : hosts_(std::move(hosts)) {
    FLEXKV_ASSERT(!hosts_.empty());
  }

  std::uint64_t generation() override {
    std::vector<std::uint64_t> now;
    for (const auto& host : hosts_) now.push_back(host->generation());
    if (now == joined_) return generation_;
    // One has forgotten what this engine had under way. So do the others, or they would take the next for its rest.
    for (std::size_t i = 0; i < joined_.size(); ++i) {
      if (now[i] == joined_[i]) hosts_[i]->hang_up();
    }
    joined_.clear();
    jobs_.clear();
    for (std::size_t i = 0; i < hosts_.size(); ++i) now[i] = hosts_[i]->generation();
    if (std::ranges::find(now, 0U) != now.end()) return 0;
    joined_ = std::move(now);
    return ++generation_;
  }

  // All keys are made with the first one's: none of the others tells blocks of this engine from others' by its own.
  const std::array<std::uint8_t, 32>& key_secret() override { return hosts_.front()->key_secret(); }
  Nanos reuse_time() const override { return hosts_.front()->reuse_time(); }

  proto::LookupReply lookup(proto::LookupRequest request) override {
    const Nanos deadline = monotonic_now() + kLookupPatience;
    if (!request.alone) return all_have(request, deadline);
    // The last block that one has another one may lack: then they are asked for those before it.
    while (true) {
      const proto::LookupReply found = all_have(request, deadline);
      if (!answered(found) || found.matched_blocks == 0 || same_) return found;
      request.keys.resize(found.matched_blocks);
    }
  }

  bool post(const proto::FromClient& message) override {
    if (std::holds_alternative<proto::DescribeRequest>(message)) return hosts_.front()->post(message);
    const auto* transfer = std::get_if<proto::TransferRequest>(&message);
    if (transfer != nullptr && transfer->armed) return false;
    std::size_t told = 0;
    for (const auto& host : hosts_) told += host->post(message);
    if (told == hosts_.size()) {
      if (transfer != nullptr) jobs_.emplace(transfer->job, Job(hosts_.size()));
      return true;
    }
    if (transfer != nullptr && told > 0) {
      for (const auto& host : hosts_) (void)host->post(proto::CancelRequest{transfer->job});
    }
    return false;
  }

  void hang_up() override {
    for (const auto& host : hosts_) host->hang_up();
    jobs_.clear();
  }

  std::vector<proto::JobResult> take_ended_jobs() override {
    for (std::size_t i = 0; i < hosts_.size(); ++i) {
      for (const proto::JobResult& part : hosts_[i]->take_ended_jobs()) add(i, part);
    }
    return std::exchange(ended_, {});
  }

  std::vector<events::Change> take_changes() override { return hosts_.front()->take_changes(); }

  bool wait_ended_jobs(Nanos timeout) override {
    const Nanos deadline = monotonic_now() + timeout;
    while (true) {
      auto ended = take_ended_jobs();
      ended_.insert(ended_.end(), ended.begin(), ended.end());
      if (!ended_.empty()) return true;
      if (jobs_.empty() || generation() == 0) return false;
      // Any that owes a part of a job: it has not ended without it.
      const auto& owed = jobs_.begin()->second.owed;
      const auto host = static_cast<std::size_t>(std::ranges::find(owed, true) - owed.begin());
      if (!hosts_[host]->wait_ended_jobs(std::max<Nanos>(deadline - monotonic_now(), 0))) return false;
    }
  }

  bool served(Nanos timeout) override {
    return std::ranges::all_of(hosts_, [&](const auto& host) { return host->served(timeout); });
  }

 private:
  struct Job {
    explicit Job(std::size_t hosts) : owed(hosts, true), missing(hosts) {}

    std::vector<bool> owed;  // by host: it has not said how its part ended
    std::size_t missing;     // of them
    proto::JobResult result{0, proto::JobStatus::kDone, Reason::kNone, ~0U};
  };

  // What all of them have, each asked at once. `same_`: all said the same.
  proto::LookupReply all_have(const proto::LookupRequest& request, Nanos deadline) {
    for (const auto& host : hosts_) {
      if (!host->ask(request)) return kNoAnswer;
    }
    proto::LookupReply least;
    std::vector<proto::LookupReply> replies;
    for (const auto& host : hosts_) {
      const proto::LookupReply reply = host->answer(deadline);
      if (!answered(reply)) return {0, 0, reply.reason, 0, 0};
      if (replies.empty() || reply.matched_blocks < least.matched_blocks) least = reply;
      replies.push_back(reply);
    }
    same_ = true;
    for (const proto::LookupReply& reply : replies) {
      same_ = same_ && reply.matched_blocks == least.matched_blocks;
      least.host_blocks = std::min(least.host_blocks, reply.host_blocks);
      if (reply.host_blocks >= least.matched_blocks) continue;  // from drives comes only what another one lacks
      least.disk_blocks = std::max(least.disk_blocks, std::min(reply.disk_blocks, least.matched_blocks));
    }
    least.host_blocks = std::min(least.host_blocks, least.matched_blocks);
    if (least.host_blocks == least.matched_blocks) least.disk_blocks = 0;
    least.described_blocks = replies.front().described_blocks;
    return least;
  }

  void add(std::size_t host, const proto::JobResult& part) {
    const auto found = jobs_.find(part.job);
    if (found == jobs_.end() || !found->second.owed[host]) return;
    Job& job = found->second;
    job.owed[host] = false;
    job.result.job = part.job;
    job.result.status = std::max(job.result.status, part.status == proto::JobStatus::kDone ? proto::JobStatus::kDone
                                                                                           : proto::JobStatus::kFailed);
    job.result.good_blocks = std::min(job.result.good_blocks, part.good_blocks);
    if (job.result.reason == Reason::kNone || part.status != proto::JobStatus::kDone) job.result.reason = part.reason;
    if (--job.missing > 0) return;
    ended_.push_back(job.result);
    jobs_.erase(found);
  }

  const std::vector<std::unique_ptr<HostPort>> hosts_;
  std::vector<std::uint64_t> joined_;  // generations of all at which they are one node; empty: they are not
  std::uint64_t generation_ = 0;
  std::map<proto::JobId, Job> jobs_;
  std::vector<proto::JobResult> ended_;
  bool same_ = false;
};

}  // namespace

std::unique_ptr<NodePort> join_ports(std::vector<std::unique_ptr<HostPort>> hosts) {
  return std::make_unique<HostsPort>(std::move(hosts));
}

}  // namespace flexkv::client
