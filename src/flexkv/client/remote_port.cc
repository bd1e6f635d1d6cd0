#include <pthread.h>
#include <sys/poll.h>
#include <sys/socket.h>

#include <limits>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/mutex.h"
#include "flexkv/base/thread.h"
#include "flexkv/client/node_port.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/wait.h"

namespace flexkv::client {
namespace {

constexpr Nanos kHandshakeTimeout = 10 * kSecond;
constexpr Nanos kForever = std::numeric_limits<Nanos>::max() / 4;
// Ranks whose node is gone end what they do after a chunk, and nobody tells us when: milliseconds.
constexpr Nanos kQuietTime = kSecond;
// After an answer that did not come in time the node is not asked again for so long.
constexpr Nanos kMuteTime = kSecond;

class RemotePort final : public NodePort {
 public:
  RemotePort(std::string runtime_dir, std::string node_name, const proto::ClientHello& hello, Fd stop)
      : runtime_dir_(std::move(runtime_dir)), node_name_(std::move(node_name)), hello_(hello), stop_(std::move(stop)) {
    connector_ = start_thread([this] { connect_loop(); });
  }

  ~RemotePort() override {
    ipc::ring_eventfd(stop_.get());
    connector_.join();
  }

  std::uint64_t generation() override {
    take_connection();
    return channel_ ? generation_ : 0;
  }
  const std::array<std::uint8_t, 32>& key_secret() override { return key_secret_; }
  Nanos reuse_time() const override { return kSecond; }

  std::vector<proto::JobResult> take_ended_jobs() override {
    take_connection();
    if (channel_) (void)drain(0);
    end_orphans();
    return std::exchange(ended_, {});
  }

  std::vector<events::Change> take_changes() override {
    take_connection();
    if (channel_) (void)drain(0);
    if (channel_ && !changes_asked_) changes_asked_ = send(proto::ChangesRequest{});
    return std::exchange(changes_, {});
  }

  proto::LookupReply lookup(proto::LookupRequest request) override {
    const proto::LookupReply nothing{0, 0, proto::Reason::kNoNode, 0, 0};
    const Nanos begin = monotonic_now();
    if (!channel_ || begin < mute_until_) return nothing;
    request.request = ++last_request_;
    if (!send(std::move(request))) return nothing;
    const Nanos deadline = begin + kLookupPatience;
    while (channel_) {
      if (const auto reply = drain(last_request_)) {
        if (reply->reason == proto::Reason::kUnknownSequence) ++generation_;
        return *reply;
      }
      if (!channel_) break;
      if (!sleep_until(deadline)) {
        mute_until_ = monotonic_now() + kMuteTime;
        log_warning("node '" + node_name_ + "' did not answer a lookup in time: not asking again for a second");
        return nothing;
      }
    }
    return nothing;
  }

  bool wait_ended_jobs(Nanos timeout) override {
    const Nanos deadline = monotonic_now() + timeout;
    while (true) {
      take_connection();
      if (channel_) (void)drain(0);
      end_orphans();
      if (!ended_.empty()) return true;
      const bool nothing_can_come = !channel_ && orphans_.empty();
      if (nothing_can_come || monotonic_now() >= deadline) return false;
      const Nanos until = orphans_.empty() ? deadline : std::min(deadline, orphans_quiet_at_);
      if (channel_) {
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
    if (!channel_) return false;
    (void)drain(0);
    if (!channel_) return false;
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
    if (channel_) lose();
  }

 private:
  // Sleeps until the node may have said something, or is gone. False: it is late. REQUIRES: channel_
  bool sleep_until(Nanos deadline) {
    if (!channel_->arm_sleep()) return true;
    const Nanos left = deadline - monotonic_now();
    if (left <= 0) {
      channel_->disarm();
      return false;
    }
    pollfd fds[] = {{channel_->wake_fd(), POLLIN, 0}, {channel_->socket_fd(), POLLIN, 0}};
    const timespec timeout{left / kSecond, left % kSecond};
    (void)::ppoll(fds, 2, &timeout, nullptr);
    channel_->disarm();
    if (fds[1].revents != 0 && channel_->peer_gone()) lose();
    return true;
  }

  bool send(const proto::FromClient& message) {
    const auto bytes = proto::encode(message);
    if (bytes.size() <= channel_->max_record() && channel_->send(bytes)) return true;
    if (channel_->broken()) lose();
    return false;
  }

  // Takes in everything that has arrived; returns the reply to `request` if it is among it.
  std::optional<proto::LookupReply> drain(std::uint64_t request) {
    std::optional<proto::LookupReply> wanted;
    ipc::PopResult popped = ipc::PopResult::kEmpty;
    while ((popped = channel_->pop(record_)) == ipc::PopResult::kRecord) {
      const auto message = proto::decode_to_client(record_);
      if (!message) {
        log_error("node '" + node_name_ + "': " + message.error().message);
        lose();
        return std::nullopt;
      }
      if (const auto* reply = std::get_if<proto::LookupReply>(&message.value())) {
        if (reply->request == request) wanted = *reply;
      } else if (const auto* changes = std::get_if<proto::ChangesReply>(&message.value())) {
        changes_.insert(changes_.end(), changes->changes.begin(), changes->changes.end());
        changes_asked_ = false;
      } else {
        const auto& result = std::get<proto::JobResult>(message.value());
        if (result.reason == proto::Reason::kUnknownSequence) ++generation_;
        unarmed_.erase(result.job);
        ended_.push_back(result);
      }
    }
    if (popped == ipc::PopResult::kCorrupt) lose();
    return wanted;
  }

  // Ends the connection; the connector sees it and looks for the next one.
  void lose() {
    ::shutdown(channel_->socket_fd(), SHUT_RDWR);
    end_connection();
  }

  void end_connection() {
    channel_.reset();
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
      channel_ = std::make_unique<ipc::Channel>(std::move(*fresh_));
      fresh_.reset();
      key_secret_ = fresh_secret_;
      mute_until_ = 0;
      ++generation_;
    }
  }

  Result<Fd> connect_once() {
    auto socket = ipc::wait_for_socket(runtime_dir_, node_name_, stop_.get(), kForever);
    if (!socket) return socket.error();
    ipc::Hello frame;
    frame.role = static_cast<std::uint32_t>(proto::Role::kClient);
    frame.payload = proto::encode(hello_);
    auto connected = ipc::Channel::connect(std::move(socket).value(), frame, kHandshakeTimeout);
    if (!connected) return connected.error();
    const auto welcome = proto::decode_welcome(connected.value().payload);
    if (!welcome) return welcome.error();
    Fd watched(::dup(connected.value().channel.socket_fd()));
    if (!watched.valid()) return errno_error("dup", errno);
    MutexLock lock(mutex_);
    fresh_.emplace(std::move(connected.value().channel));
    fresh_secret_ = welcome.value().key_secret;
    news_.store(true, std::memory_order_release);
    return watched;
  }

  void connect_loop() {
    pthread_setname_np(pthread_self(), "flexkv-client");
    std::string said;
    while (true) {
      auto connected = connect_once();
      if (!connected) {
        if (connected.error().code == ErrorCode::kCanceled) return;
        if (said != connected.error().message) {
          said = connected.error().message;
          log_warning("not attached to node '" + node_name_ + "': " + said);
        }
        // Refused by a live node, or out of resources: asking again at once would be answered alike.
        pollfd stop{stop_.get(), POLLIN, 0};
        if (::poll(&stop, 1, 1000) > 0) return;
        continue;
      }
      said.clear();
      log_info("attached to node '" + node_name_ + "'");
      // Only the end of the connection is of interest here; the scheduler's thread reads what comes.
      pollfd fds[] = {{connected.value().get(), POLLRDHUP, 0}, {stop_.get(), POLLIN, 0}};
      while (fds[0].revents == 0 && fds[1].revents == 0) (void)::poll(fds, 2, -1);
      if (fds[1].revents != 0) return;
      log_warning("node '" + node_name_ + "' is gone; serving without it until it comes back");
      MutexLock lock(mutex_);
      fresh_.reset();
      news_.store(true, std::memory_order_release);
    }
  }

  const std::string runtime_dir_;
  const std::string node_name_;
  const proto::ClientHello hello_;
  Fd stop_;

  // The calling thread's.
  std::unique_ptr<ipc::Channel> channel_;
  std::array<std::uint8_t, 32> key_secret_{};
  std::uint64_t generation_ = 0;
  std::uint64_t last_request_ = 0;
  Nanos mute_until_ = 0;
  std::vector<std::byte> record_;
  std::vector<proto::JobResult> ended_;
  std::vector<events::Change> changes_;
  bool changes_asked_ = false;                // the node has not answered yet
  std::unordered_set<proto::JobId> unarmed_;  // run at once, and have not ended: no rank reports them to the engine
  std::vector<proto::JobId> orphans_;         // such jobs of a connection that is gone
  Nanos orphans_quiet_at_ = 0;

  // Handed over by the connector.
  std::atomic<bool> news_{false};  // set after, read before what mutex_ guards
  Mutex mutex_;
  std::optional<ipc::Channel> fresh_ FLEXKV_GUARDED_BY(mutex_);
  std::array<std::uint8_t, 32> fresh_secret_ FLEXKV_GUARDED_BY(mutex_){};

  std::thread connector_;
};

}  // namespace

Result<std::unique_ptr<NodePort>> open_remote_port(const std::string& runtime_dir, const std::string& node_name,
                                                   const proto::ClientHello& hello) {
  auto stop = ipc::make_eventfd();
  if (!stop) return stop.error();
  return std::unique_ptr<NodePort>(
      std::make_unique<RemotePort>(runtime_dir, node_name, hello, std::move(stop).value()));
}

}  // namespace flexkv::client
