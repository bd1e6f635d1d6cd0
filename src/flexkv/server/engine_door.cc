#include "flexkv/server/engine_door.h"

#include <pthread.h>
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/net/frame_stream.h"
#include "flexkv/net/secret.h"
#include "flexkv/net/tcp.h"
#include "flexkv/proto/host_frames.h"
#include "flexkv/server/node_server.h"

namespace flexkv::server {
namespace {

using proto::HostFrame;
using State = net::FrameStream::State;

constexpr std::size_t kVisitorsMax = 1024;
constexpr Nanos kGreetingTime = 5 * kSecond;  // for the handshake and the hello
constexpr Nanos kAcceptPause = 1 * kSecond;   // after visitors could not be accepted, for want of descriptors
constexpr std::size_t kBudget = 1U << 20;     // received from one before others have their turn
constexpr std::uint32_t kHelloBytesMax = 16U << 10;

}  // namespace

// A scheduler, from its connection to its end.
class EngineDoor::Visitor final : public net::FrameSink {
 public:
  Visitor(net::TlsStream tls, NodeServer& node, int results_fd, Nanos now)
      : stream(std::move(tls)), greet_by(now + kGreetingTime), node_(node), results_fd_(results_fd) {}
  ~Visitor() override {
    if (engine_ != 0) node_.detach_client(engine_);
  }

  bool greeted() const { return engine_ != 0; }

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override {
    const auto kind = static_cast<HostFrame>(head.kind);
    const bool first = kind == HostFrame::kHello || kind == HostFrame::kReset;
    if (refused_ || reset_ || (greeted() ? kind != HostFrame::kMessage : !first)) {
      return Error{ErrorCode::kPeer, "a frame of kind " + std::to_string(head.kind) + " that has no place there"};
    }
    if (!greeted() && head.bytes > kHelloBytesMax) return Error{ErrorCode::kPeer, "its hello is too long"};
    body_.resize(head.bytes);
    return std::span(body_);
  }

  Status on_frame(const net::FrameHead& head) override {
    if (static_cast<HostFrame>(head.kind) == HostFrame::kReset) return reset(head.id);
    return greeted() ? apply() : greet(head.id);
  }

  // Of the jobs that have ended. False: it does not read them, and would wait for what it was told.
  bool tell_results() {
    if (!greeted()) return true;
    for (const proto::JobResult& result : node_.take_ended_jobs(engine_)) {
      if (!reply(result)) return false;
    }
    return true;
  }

  net::FrameStream stream;
  const Nanos greet_by;
  std::uint32_t events = 0;

 private:
  bool reply(const proto::ToClient& message) {
    const auto body = proto::encode(message);
    return stream.send(static_cast<std::uint32_t>(HostFrame::kReply), 0, {body});
  }

  static Error other_version(std::uint64_t version) {
    return {ErrorCode::kUnsupported, "the engine's machine speaks version " + std::to_string(version) +
                                         " of the protocol, this node " + std::to_string(proto::kHostVersion) +
                                         ": install the same FlexKV on both"};
  }

  // For `flexkv reset` on the machine of an engine's scheduler.
  Status reset(std::uint64_t version) {
    if (version != proto::kHostVersion) return refuse(other_version(version));
    reset_ = true;
    log_info("reset from " + stream.peer() + ": all blocks are forgotten");
    node_.reset_all();
    FLEXKV_ASSERT(stream.send(static_cast<std::uint32_t>(HostFrame::kResetDone), 0, {}));
    return {};
  }

  Status greet(std::uint64_t version) {
    if (version != proto::kHostVersion) return refuse(other_version(version));
    const auto hello = proto::decode_client_hello(body_);
    if (!hello) return hello.error();
    const auto engine = node_.attach_client(hello.value(), results_fd_);
    if (!engine) return refuse(engine.error());
    engine_ = engine.value();
    log_info("engine " + hello.value().engine_id + " attached from " + stream.peer() + " (" + hello.value().model +
             ")");
    // Without this node's secret, which keys of such engines do not depend on.
    const auto welcome = proto::encode(proto::Welcome{});
    FLEXKV_ASSERT(stream.send(static_cast<std::uint32_t>(HostFrame::kWelcome), 0, {welcome}));
    return {};
  }

  // It closes the connection once it has read why.
  Status refuse(const Error& why) {
    log_warning("engine at " + stream.peer() + " refused: " + why.message);
    refused_ = true;
    FLEXKV_ASSERT(
        stream.send(static_cast<std::uint32_t>(HostFrame::kRefused), 0, {std::as_bytes(std::span(why.message))}));
    return {};
  }

  Status apply() {
    const auto message = proto::decode_from_client(body_);
    if (!message) return message.error();
    if (const auto* lookup = std::get_if<proto::LookupRequest>(&message.value())) {
      const auto found = node_.lookup(engine_, *lookup);
      const proto::LookupReply answer{lookup->request,   found.matched_blocks, found.reason,
                                      found.disk_blocks, found.host_blocks,    found.described_blocks};
      if (!reply(answer)) return Error{ErrorCode::kPeer, "it asks, and does not take the answers"};
      return {};
    }
    if (std::holds_alternative<proto::ChangesRequest>(message.value())) {
      return Error{ErrorCode::kPeer, "it asks for changes, which are told on the first machine only"};
    }
    (void)node_.post(engine_, message.value());
    return {};
  }

  NodeServer& node_;
  const int results_fd_;
  node::EngineHandle engine_ = 0;  // once greeted
  bool refused_ = false;
  bool reset_ = false;  // that was all it came for
  std::vector<std::byte> body_;
};

Result<std::unique_ptr<EngineDoor>> EngineDoor::open(const EngineDoorOptions& options, NodeServer& node) {
  auto secret = net::Secret::from_file(options.secret_file);
  if (!secret) return secret.error();
  auto tls = net::TlsContext::create(secret.value(), proto::kHostPurpose + options.cluster);
  if (!tls) return tls.error();
  std::unique_ptr<EngineDoor> door(new EngineDoor(std::move(tls).value(), node));
  if (Status started = door->start(options.listen); !started) return started.error();
  return door;
}

EngineDoor::EngineDoor(net::TlsContext tls, NodeServer& node) : tls_(std::move(tls)), node_(node) {}

EngineDoor::~EngineDoor() {
  if (!thread_.joinable()) return;
  stop_ = true;
  ipc::ring_eventfd(wake_.get());
  thread_.join();
}

Status EngineDoor::start(const std::string& listen) {
  auto wake = ipc::make_eventfd();
  if (!wake) return wake.error();
  wake_ = std::move(wake).value();
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return errno_error("epoll_create1", errno);
  auto listener = net::listen_tcp(listen);
  if (!listener) return listener.error();
  listener_ = std::move(listener).value();
  auto address = net::local_address(listener_);
  if (!address) return address.error();
  address_ = std::move(address).value();
  for (const int fd : {wake_.get(), listener_.get()}) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) return errno_error("epoll_ctl", errno);
  }
  thread_ = start_thread([this] { run(); });
  return {};
}

void EngineDoor::run() {
  pthread_setname_np(pthread_self(), "flexkv-door");
  std::array<epoll_event, 64> events;
  std::vector<int> due;
  while (true) {
    const int timeout = due.empty() ? wait_milliseconds(monotonic_now()) : 0;
    const int ready = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout);
    FLEXKV_ASSERT(ready >= 0 || errno == EINTR);
    if (stop_) break;
    const Nanos now = monotonic_now();
    for (const epoll_event& event : std::span(events).first(static_cast<std::size_t>(std::max(ready, 0)))) {
      if (event.data.fd == listener_.get()) {
        accept_visitors(now);
      } else if (event.data.fd == wake_.get()) {
        ipc::drain_eventfd(wake_.get());
        for (const auto& [fd, visitor] : visitors_) due.push_back(fd);
      } else {
        due.push_back(event.data.fd);
      }
    }
    for (const auto& [fd, visitor] : visitors_) {
      if (!visitor->greeted() && visitor->greet_by <= now) due.push_back(fd);
    }
    if (accept_at_ != 0 && accept_at_ <= now) {
      accept_at_ = 0;
      watch_listener(true);
    }
    std::vector<int> again;
    std::ranges::sort(due);
    due.erase(std::unique(due.begin(), due.end()), due.end());
    for (const int fd : due) {
      const auto found = visitors_.find(fd);
      if (found == visitors_.end()) continue;
      if (!pump(*found->second, now)) {
        show_out(fd);
      } else if (found->second->stream.more()) {
        again.push_back(fd);
      }
    }
    due = std::move(again);
  }
  visitors_.clear();
}

// False: its time here is over.
bool EngineDoor::pump(Visitor& visitor, Nanos now) {
  if (!visitor.tell_results()) {
    log_warning("engine at " + visitor.stream.peer() + ": it does not read what it is told");
    return false;
  }
  const State state = visitor.stream.pump(visitor, kBudget);
  if (state == State::kFailed) log_warning("engine at " + visitor.stream.why());
  if (state == State::kFailed || state == State::kClosed) return false;
  if (!visitor.greeted() && visitor.greet_by <= now) return false;
  if (const std::uint32_t wanted = visitor.stream.events(); wanted != visitor.events) {
    epoll_event event{.events = wanted, .data = {.fd = visitor.stream.fd()}};
    FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, visitor.stream.fd(), &event) == 0);
    visitor.events = wanted;
  }
  return true;
}

void EngineDoor::show_out(int fd) {
  const auto gone = visitors_.extract(fd);
  gone.mapped()->stream.close();
  if (gone.mapped()->greeted()) log_info("engine at " + gone.mapped()->stream.peer() + " detached");
}

void EngineDoor::accept_visitors(Nanos now) {
  while (true) {
    auto accepted = net::accept_tcp(listener_);
    if (!accepted) {
      log_warning("an engine's connection, and others until there is room: " + accepted.error().message);
      accept_at_ = now + kAcceptPause;  // who waits makes the listener readable all the time
      watch_listener(false);
      return;
    }
    if (!accepted.value().valid()) return;
    if (visitors_.size() >= kVisitorsMax) continue;  // closed at once
    std::string peer = net::peer_address(accepted.value());
    auto tls =
        net::TlsStream::create(tls_, std::move(accepted).value(), net::TlsStream::Role::kServer, std::move(peer));
    if (!tls) continue;
    auto visitor = std::make_unique<Visitor>(std::move(tls).value(), node_, wake_.get(), now);
    visitor->events = visitor->stream.events();
    const int fd = visitor->stream.fd();
    epoll_event event{.events = visitor->events, .data = {.fd = fd}};
    FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
    visitors_.emplace(fd, std::move(visitor));
  }
}

void EngineDoor::watch_listener(bool wanted) {
  epoll_event event{.events = wanted ? EPOLLIN : 0U, .data = {.fd = listener_.get()}};
  FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, listener_.get(), &event) == 0);
}

int EngineDoor::wait_milliseconds(Nanos now) const {
  std::optional<Nanos> next;
  if (accept_at_ != 0) next = accept_at_;
  for (const auto& [fd, visitor] : visitors_) {
    if (!visitor->greeted()) next = std::min(next.value_or(visitor->greet_by), visitor->greet_by);
  }
  if (!next) return -1;
  return static_cast<int>((std::clamp<Nanos>(*next - now, 0, 3600 * kSecond) + kMillisecond - 1) / kMillisecond);
}

}  // namespace flexkv::server
