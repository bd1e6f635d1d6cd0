#include "flexkv/peer/peer_lane.h"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/net/tcp.h"

namespace flexkv::peer {
namespace {

// Received from one connection before others have their turn.
constexpr std::size_t kBudget = 1U << 20;
constexpr const char* kStopping = "this node stops";

void add_up(ServingStats& sum, const ServingStats& one) {
  sum.requests += one.requests;
  sum.blocks += one.blocks;
  sum.bytes += one.bytes;
  sum.placed_blocks += one.placed_blocks;
}

void add_up(ReadingStats& sum, const ReadingStats& one) {
  sum.requests += one.requests;
  sum.blocks += one.blocks;
  sum.bytes += one.bytes;
  sum.one_sided_blocks += one.one_sided_blocks;
  sum.one_sided_failures += one.one_sided_failures;
  for (std::size_t i = 0; i < sum.ended.size(); ++i) sum.ended[i] += one.ended[i];
}

std::string owner_key(const std::string& node, const std::string& address) { return node + '\n' + address; }

}  // namespace

// Commands for the lane from any thread. Outlives the lane, because a source may answer late.
class PeerLane::Mailbox {
 public:
  explicit Mailbox(Fd wake) : wake_(std::move(wake)) {}

  int fd() const { return wake_.get(); }

  void post(std::function<void()> command) {
    {
      const MutexLock lock(mutex_);
      if (!closed_) {
        commands_.push_back(std::move(command));
        command = nullptr;
        ipc::ring_eventfd(wake_.get());
      }
    }
    // The lane is gone. What such a command does then is right on any thread.
    if (command) command();
  }
  void ask_to_stop() {
    const MutexLock lock(mutex_);
    stop_ = true;
    ipc::ring_eventfd(wake_.get());
  }

  // The lane's. False: it is to stop.
  bool take(std::vector<std::function<void()>>& out) {
    ipc::drain_eventfd(wake_.get());
    const MutexLock lock(mutex_);
    out.swap(commands_);
    return !stop_;
  }
  // From now on commands run where they are posted; those that nobody took are returned.
  std::vector<std::function<void()>> close() {
    const MutexLock lock(mutex_);
    closed_ = true;
    return std::exchange(commands_, {});
  }

 private:
  const Fd wake_;
  Mutex mutex_;
  std::vector<std::function<void()>> commands_ FLEXKV_GUARDED_BY(mutex_);
  bool stop_ FLEXKV_GUARDED_BY(mutex_) = false;
  bool closed_ FLEXKV_GUARDED_BY(mutex_) = false;
};

struct PeerLane::Link {
  explicit Link(net::TlsStream tls) : stream(std::move(tls)) {}

  net::FrameStream stream;
  std::unique_ptr<Serving> serving;  // one of both
  std::unique_ptr<Reading> reading;
  std::string owner;  // key in owners_
  Nanos greet_by = 0;
  std::uint32_t events = 0;
  bool due = true;  // something happened to it, or more goes at once

  void pump(Nanos now);
  bool greeted() const { return serving ? !serving->peer_name().empty() : reading->greeted(); }
  std::optional<Nanos> next_deadline() const {
    const auto next = serving ? serving->next_deadline() : reading->next_deadline();
    if (greeted()) return next;
    return std::min(next.value_or(greet_by), greet_by);
  }
};

PeerLane::PeerLane(PeerOptions options, net::TlsContext tls, BlockSource& source, ReadSink& sink, OneSided* one_sided)
    : options_(std::move(options)), tls_(std::move(tls)), source_(source), sink_(sink), one_sided_(one_sided) {}

Result<std::unique_ptr<PeerLane>> PeerLane::start(PeerOptions options, net::TlsContext tls, BlockSource& source,
                                                  ReadSink& sink, OneSided* one_sided) {
  if (options.node.empty() || options.node.size() > kNodeNameMax) {
    return Error{ErrorCode::kInvalidArgument, "a node's name has 1 to " + std::to_string(kNodeNameMax) + " characters"};
  }
  std::unique_ptr<PeerLane> lane(new PeerLane(std::move(options), std::move(tls), source, sink, one_sided));
  if (const Status opened = lane->open(); !opened.ok()) return opened.error();
  lane->thread_ = start_thread([raw = lane.get()] { raw->run(); });
  return lane;
}

PeerLane::~PeerLane() {
  if (!thread_.joinable()) return;
  mailbox_->ask_to_stop();
  thread_.join();
}

Status PeerLane::open() {
  auto wake = ipc::make_eventfd();
  if (!wake.ok()) return wake.error();
  mailbox_ = std::make_shared<Mailbox>(std::move(wake).value());
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_.valid()) return errno_error("epoll_create1", errno);
  const auto watch = [&](int fd) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  };
  if (!watch(mailbox_->fd())) return errno_error("epoll_ctl", errno);
  if (options_.listen.empty()) return {};
  auto listener = net::listen_tcp(options_.listen);
  if (!listener.ok()) return listener.error();
  listener_ = std::move(listener.value());
  auto address = net::local_address(listener_);
  if (!address.ok()) return address.error();
  address_ = std::move(address.value());
  if (!watch(listener_.get())) return errno_error("epoll_ctl", errno);
  return {};
}

void PeerLane::post(std::function<void()> command) const { mailbox_->post(std::move(command)); }

void PeerLane::read(ReadRequest request) {
  FLEXKV_ASSERT(problem_of(request).empty());
  post([this, request = std::move(request)]() mutable { begin_read(std::move(request)); });
}

void PeerLane::cancel(RequestId id) {
  post([this, id] {
    for (const auto& [fd, link] : links_) {
      if (link->reading) link->reading->end(id, Outcome::kCanceled);
    }
  });
}

void PeerLane::give_up(RequestId id) {
  post([this, id] {
    for (const auto& [fd, link] : links_) {
      if (link->reading) link->reading->give_up(id);
    }
  });
}

PeerStats PeerLane::stats() const {
  const MutexLock lock(mutex_);
  return stats_;
}

void PeerLane::run() {
  std::array<epoll_event, 64> events;
  std::vector<std::function<void()>> commands;
  bool more = false;
  while (true) {
    const int timeout = more ? 0 : wait_milliseconds(monotonic_now());
    const int ready = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout);
    FLEXKV_ASSERT(ready >= 0 || errno == EINTR);
    const bool going_on = mailbox_->take(commands);
    for (auto& command : commands) command();
    if (!commands.empty()) {
      for (const auto& [fd, link] : links_) link->due = true;
    }
    commands.clear();
    if (!going_on) break;
    for (const epoll_event& event : std::span(events).first(static_cast<std::size_t>(std::max(ready, 0)))) {
      if (event.data.fd == listener_.get()) accept_peers();
      if (const auto found = links_.find(event.data.fd); found != links_.end()) found->second->due = true;
    }
    more = pump_due(monotonic_now());
    if (accept_at_ != 0 && accept_at_ <= monotonic_now()) {
      accept_at_ = 0;
      watch_listener(true);
    }
    publish_stats();
  }
  while (!links_.empty()) drop(*links_.begin()->second, kStopping);
  // Reads that were ordered and not begun, and answers of the source, which give their pins back.
  commands = mailbox_->close();
  for (auto& command : commands) command();
  while (!links_.empty()) drop(*links_.begin()->second, kStopping);
  publish_stats();
}

int PeerLane::wait_milliseconds(Nanos now) const {
  std::optional<Nanos> next;
  if (accept_at_ != 0) next = accept_at_;
  for (const auto& [fd, link] : links_) {
    if (const auto one = link->next_deadline()) next = std::min(next.value_or(*one), *one);
  }
  if (!next) return -1;
  const Nanos left = std::clamp<Nanos>(*next - now, 0, 3600 * kSecond);
  return static_cast<int>((left + kMillisecond - 1) / kMillisecond);
}

void PeerLane::accept_peers() {
  while (true) {
    auto accepted = net::accept_tcp(listener_);
    if (!accepted.ok()) {
      // Who waits makes the listener readable all the time.
      if (ended_.accepts_failed++ == 0) {
        log_warning("a peer's connection, and others until there is room: " + accepted.error().message);
      }
      accept_at_ = monotonic_now() + kAcceptPause;
      watch_listener(false);
      return;
    }
    if (!accepted.value().valid()) return;
    const auto readers = std::ranges::count_if(links_, [](const auto& one) { return one.second->serving != nullptr; });
    if (static_cast<std::size_t>(readers) >= options_.readers_max) continue;  // closed at once
    std::string peer = net::peer_address(accepted.value());
    auto tls =
        net::TlsStream::create(tls_, std::move(accepted.value()), net::TlsStream::Role::kServer, std::move(peer));
    if (!tls.ok()) continue;
    auto link = std::make_unique<Link>(std::move(tls.value()));
    link->serving = std::make_unique<Serving>(
        link->stream, source_, options_.node, options_.pinned_bytes_max,
        [mailbox = mailbox_](std::function<void()> command) { mailbox->post(std::move(command)); }, one_sided_);
    add(std::move(link));
  }
}

void PeerLane::watch_listener(bool wanted) {
  epoll_event event{.events = wanted ? EPOLLIN : 0U, .data = {.fd = listener_.get()}};
  FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, listener_.get(), &event) == 0);
}

void PeerLane::add(std::unique_ptr<Link> link) {
  link->greet_by = monotonic_now() + kGreetingTime;
  link->events = link->stream.events();
  const int fd = link->stream.fd();
  epoll_event event{.events = link->events, .data = {.fd = fd}};
  FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
  links_[fd] = std::move(link);
}

void PeerLane::begin_read(ReadRequest request) {
  auto link = link_to(request.node, request.address);
  if (link.ok()) {
    link.value()->reading->start(std::move(request));
    return;
  }
  ++ended_.read.requests;
  ++ended_.read.ended[static_cast<std::size_t>(Outcome::kUnreachable)];
  sink_.on_end(request.id, Outcome::kUnreachable);
}

Result<PeerLane::Link*> PeerLane::link_to(const std::string& node, const std::string& address) {
  const std::string key = owner_key(node, address);
  if (const auto found = owners_.find(key); found != owners_.end()) return links_.at(found->second).get();
  const Nanos now = monotonic_now();
  if (const auto backoff = backoffs_.find(key); backoff != backoffs_.end() && now < backoff->second.until) {
    return Error{ErrorCode::kPeer, "not tried again yet"};
  }
  auto socket = net::connect_tcp(address);
  if (!socket.ok()) return socket.error();
  auto tls =
      net::TlsStream::create(tls_, std::move(socket.value()), net::TlsStream::Role::kClient, node + " at " + address);
  if (!tls.ok()) return tls.error();
  auto link = std::make_unique<Link>(std::move(tls.value()));
  link->owner = key;
  link->reading = std::make_unique<Reading>(
      link->stream, sink_, options_.node, node, one_sided_,
      [mailbox = mailbox_](std::function<void()> command) { mailbox->post(std::move(command)); });
  Link* const raw = link.get();
  owners_[key] = raw->stream.fd();
  add(std::move(link));
  return raw;
}

bool PeerLane::pump_due(Nanos now) {
  std::vector<Link*> due;
  for (const auto& [fd, link] : links_) {
    if (link->due || link->next_deadline().value_or(now + 1) <= now) due.push_back(link.get());
  }
  bool more = false;
  for (Link* const link : due) {
    link->pump(now);
    using State = net::FrameStream::State;
    const State state = link->stream.state();
    if (state == State::kFailed || state == State::kClosed) {
      drop(*link, state == State::kFailed ? link->stream.why() : link->stream.peer() + ": closed the connection");
      continue;
    }
    if (!link->greeted() && link->greet_by <= now) {
      drop(*link, link->stream.peer() + ": no connection within " + std::to_string(kGreetingTime / kSecond) + " s");
      continue;
    }
    if (link->greeted() && link->reading) backoffs_.erase(link->owner);
    more = more || link->due;
    if (const std::uint32_t wanted = link->stream.events(); wanted != link->events) {
      epoll_event event{.events = wanted, .data = {.fd = link->stream.fd()}};
      FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, link->stream.fd(), &event) == 0);
      link->events = wanted;
    }
  }
  return more;
}

void PeerLane::Link::pump(Nanos now) {
  net::FrameSink& sink = serving ? static_cast<net::FrameSink&>(*serving) : *reading;
  if (serving) serving->on_time(now);
  if (reading) reading->on_time(now);
  stream.pump(sink, kBudget);
  if (serving) serving->fill(now);
  if (reading) reading->fill(now);
  if (stream.state() == net::FrameStream::State::kOpen) stream.flush();
  // The socket took all that the stream had room for: nothing would tell that it takes more.
  const bool pending = (serving && serving->pending()) || (reading && reading->pending());
  due = stream.more() || (stream.idle() && pending);
}

void PeerLane::drop(Link& link, const std::string& why) {
  const auto node = links_.extract(link.stream.fd());
  if (link.reading) {
    owners_.erase(link.owner);
    if (!link.greeted()) {
      Backoff& backoff = backoffs_[link.owner];
      backoff.until = monotonic_now() + backoff.next;
      backoff.next = std::min(backoff.next * 2, kRetryMax);
    }
    link.reading->end_all(Outcome::kUnreachable);
    if (one_sided_ != nullptr) one_sided_->forget(link.reading->owner());
    add_up(ended_.read, link.reading->stats());
  } else {
    add_up(ended_.served, link.serving->stats());
  }
  if (why != kStopping) log_info("peer " + why);
  link.stream.close();
}

void PeerLane::publish_stats() {
  PeerStats sum = ended_;
  for (const auto& [fd, link] : links_) {
    if (link->serving) {
      ++sum.readers;
      add_up(sum.served, link->serving->stats());
    } else {
      ++sum.owners;
      add_up(sum.read, link->reading->stats());
    }
  }
  const MutexLock lock(mutex_);
  stats_ = sum;
}

}  // namespace flexkv::peer
