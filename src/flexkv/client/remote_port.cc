// A port to a node behind a link that comes and goes.
#include <pthread.h>
#include <sys/poll.h>

#include <atomic>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/mutex.h"
#include "flexkv/base/thread.h"
#include "flexkv/client/node_link.h"
#include "flexkv/ipc/ring.h"

namespace flexkv::client {
namespace {

// Ranks whose node is gone end what they do after a chunk, and nobody tells us when: milliseconds.
constexpr Nanos kQuietTime = kSecond;
// After an answer that did not come in time the node is not asked again for so long.
constexpr Nanos kMuteTime = kSecond;

class RemotePort final : public HostPort {
 public:
  RemotePort(std::unique_ptr<Dialer> dialer, Fd stop)
      : dialer_(std::move(dialer)), node_(dialer_->node()), stop_(std::move(stop)) {
    connector_ = start_thread([this] { connect_loop(); });
  }

  ~RemotePort() override {
    ipc::ring_eventfd(stop_.get());
    connector_.join();
  }

  std::uint64_t generation() override {
    take_connection();
    return link_ ? generation_ : 0;
  }
  const std::array<std::uint8_t, 32>& key_secret() override { return key_secret_; }
  Nanos reuse_time() const override { return kSecond; }

  std::vector<proto::JobResult> take_ended_jobs() override {
    take_connection();
    if (link_) (void)drain(0);
    end_orphans();
    return std::exchange(ended_, {});
  }

  std::vector<events::Change> take_changes() override {
    take_connection();
    if (link_) (void)drain(0);
    if (link_ && !changes_asked_) changes_asked_ = send(proto::ChangesRequest{});
    return std::exchange(changes_, {});
  }

  proto::LookupReply lookup(proto::LookupRequest request) override {
    const Nanos deadline = monotonic_now() + kLookupPatience;
    if (!ask(std::move(request))) return kNoAnswer;
    return answer(deadline);
  }

  bool ask(proto::LookupRequest request) override {
    if (!link_ || monotonic_now() < mute_until_) return false;
    request.request = ++last_request_;
    return send(std::move(request));
  }

  proto::LookupReply answer(Nanos deadline) override {
    while (link_) {
      if (const auto reply = drain(last_request_)) {
        if (reply->reason == proto::Reason::kUnknownSequence) ++generation_;
        return *reply;
      }
      if (!link_) break;
      if (!sleep_until(deadline)) {
        mute_until_ = monotonic_now() + kMuteTime;
        log_warning("node " + node_ + " did not answer a lookup in time: not asking again for a second");
        return kNoAnswer;
      }
    }
    return kNoAnswer;
  }

  bool wait_ended_jobs(Nanos timeout) override {
    const Nanos deadline = monotonic_now() + timeout;
    while (true) {
      take_connection();
      if (link_) (void)drain(0);
      end_orphans();
      if (!ended_.empty()) return true;
      const bool nothing_can_come = !link_ && orphans_.empty();
      if (nothing_can_come || monotonic_now() >= deadline) return false;
      const Nanos until = orphans_.empty() ? deadline : std::min(deadline, orphans_quiet_at_);
      if (link_) {
        (void)sleep_until(until);
      } else {
        const Nanos left = std::max<Nanos>(until - monotonic_now(), 0);
        const timespec rest{left / kSecond, left % kSecond};
        (void)::ppoll(nullptr, 0, &rest, nullptr);
      }
    }
  }

  // A daemon answers what is asked, and says nothing by itself.
  bool served(Nanos) override {
    const auto reply = lookup({0, 0, 0, {}});
    return reply.reason != proto::Reason::kNoNode && reply.reason != proto::Reason::kNotReady;
  }

  bool post(const proto::FromClient& message) override {
    if (!link_) return false;
    (void)drain(0);
    if (!link_) return false;
    // Of a job that started at once nobody relies on it before the job has ended. To hang up instead would have it said
    // to have ended while a node that stalls lets its ranks go on.
    const auto* cancel = std::get_if<proto::CancelRequest>(&message);
    if (cancel != nullptr && unarmed_.contains(cancel->job)) {
      (void)send(message);
      return true;
    }
    if (!send(message)) return false;
    const auto* transfer = std::get_if<proto::TransferRequest>(&message);
    if (transfer != nullptr && transfer->armed) unarmed_.insert(transfer->job);
    return true;
  }

  void hang_up() override {
    if (link_) lose();
  }

 private:
  // Sleeps until the node may have said something, or is gone. False: it is late. REQUIRES: link_
  bool sleep_until(Nanos deadline) {
    const bool in_time = link_->sleep_until(deadline);
    if (link_->gone()) lose();
    return in_time;
  }

  bool send(const proto::FromClient& message) {
    if (link_->send(message)) return true;
    if (link_->gone()) lose();
    return false;
  }

  // Takes in everything that has arrived; returns the reply to `request` if it is among it.
  std::optional<proto::LookupReply> drain(std::uint64_t request) {
    std::optional<proto::LookupReply> wanted;
    proto::ToClient message;
    NodeLink::Take taken = NodeLink::Take::kNothing;
    while ((taken = link_->take(message)) == NodeLink::Take::kMessage) {
      if (const auto* reply = std::get_if<proto::LookupReply>(&message)) {
        if (reply->request == request) wanted = *reply;
      } else if (const auto* changes = std::get_if<proto::ChangesReply>(&message)) {
        changes_.insert(changes_.end(), changes->changes.begin(), changes->changes.end());
        changes_asked_ = false;
      } else {
        const auto& result = std::get<proto::JobResult>(message);
        if (result.reason == proto::Reason::kUnknownSequence) ++generation_;
        unarmed_.erase(result.job);
        ended_.push_back(result);
      }
    }
    if (taken == NodeLink::Take::kBroken) lose();
    return wanted;
  }

  // Ends the connection; the connector sees it and looks for the next one.
  void lose() {
    link_->end();
    end_connection();
  }

  void end_connection() {
    link_.reset();
    changes_.clear();
    changes_asked_ = false;
    if (unarmed_.empty()) return;
    orphans_.insert(orphans_.end(), unarmed_.begin(), unarmed_.end());
    unarmed_.clear();
    orphans_quiet_at_ = monotonic_now() + kQuietTime;
  }

  void end_orphans() {
    if (orphans_.empty() || monotonic_now() < orphans_quiet_at_) return;
    for (const auto job : orphans_) ended_.push_back({job, proto::JobStatus::kFailed, proto::Reason::kNoNode});
    orphans_.clear();
  }

  void take_connection() {
    if (!news_.load(std::memory_order_acquire)) return;
    MutexLock lock(mutex_);
    news_.store(false, std::memory_order_relaxed);
    end_connection();
    if (fresh_) {
      link_ = std::move(fresh_->link);
      key_secret_ = fresh_->key_secret;
      fresh_.reset();
      mute_until_ = 0;
      ++generation_;
    }
  }

  void connect_loop() {
    pthread_setname_np(pthread_self(), "flexkv-client");
    std::string said;
    while (true) {
      auto dialed = dialer_->dial(stop_.get());
      if (!dialed) {
        if (dialed.error().code == ErrorCode::kCanceled) return;
        if (said != dialed.error().message) {
          said = dialed.error().message;
          log_warning("not attached to node " + node_ + ": " + said);
        }
        // Refused by a live node, or out of resources: asking again at once would be answered alike.
        pollfd stop{stop_.get(), POLLIN, 0};
        if (::poll(&stop, 1, 1000) > 0) return;
        continue;
      }
      said.clear();
      log_info("attached to node " + node_);
      {
        MutexLock lock(mutex_);
        fresh_.emplace(std::move(dialed).value());
        news_.store(true, std::memory_order_release);
      }
      if (!dialer_->carry(stop_.get())) return;
      log_warning("node " + node_ + " is gone; serving without it until it comes back");
      MutexLock lock(mutex_);
      fresh_.reset();
      news_.store(true, std::memory_order_release);
    }
  }

  const std::unique_ptr<Dialer> dialer_;  // the connector's
  const std::string node_;                // for messages
  Fd stop_;

  // The calling thread's.
  std::unique_ptr<NodeLink> link_;
  std::array<std::uint8_t, 32> key_secret_{};
  std::uint64_t generation_ = 0;
  std::uint64_t last_request_ = 0;
  Nanos mute_until_ = 0;
  std::vector<proto::JobResult> ended_;
  std::vector<events::Change> changes_;
  bool changes_asked_ = false;                // the node has not answered yet
  std::unordered_set<proto::JobId> unarmed_;  // run at once, and have not ended: no rank reports them to the engine
  std::vector<proto::JobId> orphans_;         // such jobs of a connection that is gone
  Nanos orphans_quiet_at_ = 0;

  // Handed over by the connector.
  std::atomic<bool> news_{false};  // set after, read before what mutex_ guards
  Mutex mutex_;
  std::optional<Dialer::Dialed> fresh_ FLEXKV_GUARDED_BY(mutex_);

  std::thread connector_;
};

}  // namespace

Result<std::unique_ptr<HostPort>> open_dialed_port(std::unique_ptr<Dialer> dialer) {
  auto stop = ipc::make_eventfd();
  if (!stop) return stop.error();
  return std::unique_ptr<HostPort>(std::make_unique<RemotePort>(std::move(dialer), std::move(stop).value()));
}

Result<std::unique_ptr<NodePort>> open_remote_port(const std::string& runtime_dir, const std::string& node_name,
                                                   const proto::ClientHello& hello) {
  auto port = open_unix_port(runtime_dir, node_name, hello);
  if (!port) return port.error();
  return std::unique_ptr<NodePort>(std::move(port).value());
}

}  // namespace flexkv::client
