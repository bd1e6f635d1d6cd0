// The link to a node of another machine.
#include <sys/epoll.h>
#include <sys/poll.h>

#include <deque>
#include <unordered_set>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/mutex.h"
#include "flexkv/client/node_link.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/net/frame_stream.h"
#include "flexkv/net/tcp.h"
#include "flexkv/proto/host_frames.h"

namespace flexkv::client {
namespace {

using proto::HostFrame;

constexpr std::size_t kBudget = 1U << 20;         // received before anything is sent
constexpr std::size_t kUnsentMax = 8U << 20;      // bytes that the caller may be ahead of the connection
constexpr std::size_t kUnreadMax = 1U << 17;      // messages of the node
constexpr std::size_t kHelloBytesMax = 4U << 10;  // of the node's answer

// What the caller and the thread that carries the connection share.
struct Exchange {
  Exchange(Fd to_carrier, Fd to_caller) : carrier(std::move(to_carrier)), caller(std::move(to_caller)) {}

  const Fd carrier;  // wakes it
  const Fd caller;
  Mutex mutex;
  std::deque<std::vector<std::byte>> unsent FLEXKV_GUARDED_BY(mutex);
  std::size_t unsent_bytes FLEXKV_GUARDED_BY(mutex) = 0;
  std::deque<proto::ToClient> unread FLEXKV_GUARDED_BY(mutex);
  // Saves of which the node has not said that they are done, and that nobody has cancelled. A cancel that travels may
  // come after the report of ranks that copied what the engine had overwritten by then; so the node keeps what is
  // committed, and what was cancelled before it was heard to be done never is.
  std::unordered_set<proto::JobId> uncommitted FLEXKV_GUARDED_BY(mutex);
  bool over FLEXKV_GUARDED_BY(mutex) = false;

  void post(std::vector<std::byte> message) FLEXKV_REQUIRES(mutex) {
    unsent_bytes += message.size();
    unsent.push_back(std::move(message));
  }
  void end() {
    MutexLock lock(mutex);
    over = true;
    uncommitted.clear();
    ipc::ring_eventfd(carrier.get());
    ipc::ring_eventfd(caller.get());
  }
};

class TlsLink final : public NodeLink {
 public:
  explicit TlsLink(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}
  ~TlsLink() override { exchange_->end(); }

  bool send(const proto::FromClient& message) override {
    const auto* transfer = std::get_if<proto::TransferRequest>(&message);
    if (transfer == nullptr || !transfer->save) return enqueue(message, {});
    proto::TransferRequest save = *transfer;
    save.on_commit = true;
    return enqueue(save, save.job);
  }

  Take take(proto::ToClient& out) override {
    MutexLock lock(exchange_->mutex);
    if (exchange_->unread.empty()) return exchange_->over ? Take::kBroken : Take::kNothing;
    out = std::move(exchange_->unread.front());
    exchange_->unread.pop_front();
    return Take::kMessage;
  }

  bool sleep_until(Nanos deadline) override {
    const Nanos left = deadline - monotonic_now();
    if (left <= 0) return false;
    pollfd woken{exchange_->caller.get(), POLLIN, 0};
    const timespec timeout{left / kSecond, left % kSecond};
    (void)::ppoll(&woken, 1, &timeout, nullptr);
    ipc::drain_eventfd(exchange_->caller.get());
    return true;
  }

  bool gone() const override {
    MutexLock lock(exchange_->mutex);
    return exchange_->over;
  }
  void end() override { exchange_->end(); }

 private:
  bool enqueue(const proto::FromClient& message, std::optional<proto::JobId> save) {
    auto bytes = proto::encode(message);
    MutexLock lock(exchange_->mutex);
    // Whether the node hears of it or not.
    if (const auto* cancel = std::get_if<proto::CancelRequest>(&message)) exchange_->uncommitted.erase(cancel->job);
    const bool room = bytes.size() <= net::kFrameBytesMax && exchange_->unsent_bytes + bytes.size() <= kUnsentMax;
    if (exchange_->over || !room) return false;
    if (save) exchange_->uncommitted.insert(*save);
    exchange_->post(std::move(bytes));
    ipc::ring_eventfd(exchange_->carrier.get());
    return true;
  }

  const std::shared_ptr<Exchange> exchange_;
};

// The node's frames: the answer to the hello, then replies.
class Replies final : public net::FrameSink {
 public:
  void begin(Exchange& exchange) { exchange_ = &exchange; }
  const std::optional<proto::Welcome>& welcome() const { return welcome_; }

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override {
    const auto kind = static_cast<HostFrame>(head.kind);
    const bool answer = kind == HostFrame::kWelcome || kind == HostFrame::kRefused;
    const bool in_place = exchange_ == nullptr ? answer : kind == HostFrame::kReply;
    if (!in_place || (answer && head.bytes > kHelloBytesMax)) {
      return Error{ErrorCode::kPeer, "a frame of kind " + std::to_string(head.kind) + " that has no place there"};
    }
    body_.resize(head.bytes);
    return std::span(body_);
  }

  Status on_frame(const net::FrameHead& head) override {
    switch (static_cast<HostFrame>(head.kind)) {
      case HostFrame::kRefused:
        return Error{ErrorCode::kUnsupported, std::string(reinterpret_cast<const char*>(body_.data()), body_.size())};
      case HostFrame::kWelcome: {
        if (welcome_) return Error{ErrorCode::kPeer, "it welcomes twice"};
        auto welcome = proto::decode_welcome(body_);
        if (!welcome) return welcome.error();
        welcome_ = welcome.value();
        return {};
      }
      default:
        return take_reply();
    }
  }

 private:
  Status take_reply() {
    auto message = proto::decode_to_client(body_);
    if (!message) return message.error();
    MutexLock lock(exchange_->mutex);
    if (exchange_->unread.size() >= kUnreadMax) return Error{ErrorCode::kPeer, "it says more than it is asked"};
    const auto* result = std::get_if<proto::JobResult>(&message.value());
    if (result != nullptr && exchange_->uncommitted.erase(result->job) > 0 &&
        result->status == proto::JobStatus::kDone) {
      exchange_->post(proto::encode(proto::FromClient{proto::CommitRequest{result->job}}));
    }
    exchange_->unread.push_back(std::move(message).value());
    ipc::ring_eventfd(exchange_->caller.get());
    return {};
  }

  Exchange* exchange_ = nullptr;
  std::optional<proto::Welcome> welcome_;
  std::vector<std::byte> body_;
};

class TlsDialer final : public Dialer {
 public:
  TlsDialer(net::TlsContext tls, std::string address, const proto::ClientHello& hello)
      : tls_(std::move(tls)), address_(std::move(address)), hello_(hello) {}

  std::string node() const override { return "at " + address_; }

  Result<Dialed> dial(int stop_fd) override {
    // Names are looked up each time: a machine may come back with another address.
    auto numeric = net::resolve_tcp(address_);
    if (!numeric) return numeric.error();
    auto socket = net::connect_tcp(numeric.value());
    if (!socket) return socket.error();
    auto tls = net::TlsStream::create(tls_, std::move(socket).value(), net::TlsStream::Role::kClient, address_);
    if (!tls) return tls.error();
    stream_.emplace(std::move(tls).value());
    replies_ = Replies();
    if (Status greeted = greet(stop_fd); !greeted) return greeted.error();
    auto to_carrier = ipc::make_eventfd();
    if (!to_carrier) return to_carrier.error();
    auto to_caller = ipc::make_eventfd();
    if (!to_caller) return to_caller.error();
    exchange_ = std::make_shared<Exchange>(std::move(to_carrier).value(), std::move(to_caller).value());
    replies_.begin(*exchange_);
    return Dialed{std::make_unique<TlsLink>(exchange_), replies_.welcome()->key_secret};
  }

  bool carry(int stop_fd) override {
    bool stopped = false;
    while (send_what_goes() && stream_->pump(replies_, kBudget) == net::FrameStream::State::kOpen) {
      if (stream_->more()) continue;
      if (!send_what_goes()) break;
      stream_->flush();
      pollfd fds[] = {{stream_->fd(), poll_events(), 0}, {exchange_->carrier.get(), POLLIN, 0}, {stop_fd, POLLIN, 0}};
      (void)::poll(fds, 3, -1);
      if ((stopped = fds[2].revents != 0)) break;
    }
    if (stream_->state() == net::FrameStream::State::kFailed) log_warning("node " + node() + ": " + stream_->why());
    stream_->close();
    stream_.reset();
    exchange_->end();
    return !stopped;
  }

 private:
  Status greet(int stop_fd) {
    const auto hello = proto::encode(hello_);
    if (hello.size() > net::kFrameBytesMax) return Error{ErrorCode::kInvalidArgument, "the engine's name is too long"};
    FLEXKV_ASSERT(stream_->send(static_cast<std::uint32_t>(HostFrame::kHello), proto::kHostVersion, {hello}));
    const Nanos deadline = monotonic_now() + kHandshakeTimeout;
    while (true) {
      const auto state = stream_->pump(replies_, kBudget);
      if (replies_.welcome()) return {};
      if (state == net::FrameStream::State::kFailed) return Error{ErrorCode::kPeer, stream_->why()};
      if (state == net::FrameStream::State::kClosed) return Error{ErrorCode::kPeer, "it closed the connection"};
      const Nanos left = deadline - monotonic_now();
      if (left <= 0) return Error{ErrorCode::kTimeout, "it did not answer in time"};
      pollfd fds[] = {{stream_->fd(), poll_events(), 0}, {stop_fd, POLLIN, 0}};
      const timespec timeout{left / kSecond, left % kSecond};
      (void)::ppoll(fds, 2, &timeout, nullptr);
      if (fds[1].revents != 0) return Error{ErrorCode::kCanceled, "stopped"};
    }
  }

  short poll_events() const {
    const std::uint32_t wanted = stream_->events();
    return static_cast<short>(((wanted & EPOLLIN) != 0 ? POLLIN : 0) | ((wanted & EPOLLOUT) != 0 ? POLLOUT : 0));
  }

  // From what the caller has said to the stream, as far as that has room. False: the caller ended the connection.
  bool send_what_goes() {
    ipc::drain_eventfd(exchange_->carrier.get());
    MutexLock lock(exchange_->mutex);
    while (!exchange_->unsent.empty() && stream_->has_room()) {
      const std::vector<std::byte>& message = exchange_->unsent.front();
      (void)stream_->send(static_cast<std::uint32_t>(HostFrame::kMessage), 0, {message});
      exchange_->unsent_bytes -= message.size();
      exchange_->unsent.pop_front();
    }
    return !exchange_->over;
  }

  const net::TlsContext tls_;
  const std::string address_;
  const proto::ClientHello hello_;
  std::optional<net::FrameStream> stream_;
  Replies replies_;
  std::shared_ptr<Exchange> exchange_;
};

}  // namespace

Result<std::unique_ptr<HostPort>> open_tls_port(net::TlsContext tls, const std::string& address,
                                                const proto::ClientHello& hello) {
  return open_dialed_port(std::make_unique<TlsDialer>(std::move(tls), address, hello));
}

}  // namespace flexkv::client
