#include "flexkv/peer/probe.h"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "flexkv/net/frame_stream.h"
#include "flexkv/net/tcp.h"
#include "flexkv/peer/messages.h"

namespace flexkv::peer {
namespace {

using net::FrameHead;
using State = net::FrameStream::State;

constexpr int kRoundTrips = 8;
// So many are under way while bytes are received: the other node always has room to queue its answers.
constexpr std::uint64_t kUnderWay = 4;
static_assert(kUnderWay * kDataBytesMax < net::kQueuedBytesMax);

static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT, "what a stream wants of epoll is asked of poll");

class Prober final : private net::FrameSink {
 public:
  Prober(net::TlsStream tls, const std::string& own_name, Nanos deadline)
      : stream_(std::move(tls)), deadline_(deadline) {
    Hello hello;
    hello.node = own_name;
    send(Kind::kHello, encode(hello));
  }

  ~Prober() override { stream_.close(); }
  Prober(const Prober&) = delete;
  Prober& operator=(const Prober&) = delete;

  const std::string& node() const { return node_; }

  Status wait_for_hello() {
    return wait([&] { return !node_.empty(); });
  }
  Result<Nanos> round_trip() {
    const Nanos begun = monotonic_now();
    ask(0);
    if (const Status answered = wait([&] { return answered_ == asked_; }); !answered) return answered.error();
    return monotonic_now() - begun;
  }
  // Bytes per second.
  Result<double> rate(Nanos receive_for) {
    const Nanos begun = monotonic_now();
    const Nanos end = begun + receive_for;
    deadline_ = end;
    const std::uint64_t before = answered_;
    while (monotonic_now() < end) {
      while (asked_ - answered_ < kUnderWay) ask(kDataBytesMax);
      const std::uint64_t seen = answered_;
      const Status more = wait([&] { return answered_ > seen; });
      if (!more && more.error().code != ErrorCode::kTimeout) return more.error();
    }
    const double seconds = static_cast<double>(monotonic_now() - begun) / kSecond;
    return static_cast<double>((answered_ - before) * kDataBytesMax) / seconds;
  }

 private:
  void send(Kind kind, const std::vector<std::byte>& body) {
    // A few short messages: there is room.
    FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(kind), asked_, {body}));
  }
  void ask(std::uint32_t bytes) {
    ++asked_;
    bytes_ = bytes;
    send(Kind::kProbe, encode(Probe{bytes}));
  }

  template <typename Condition>
  Status wait(Condition condition) {
    while (!condition()) {
      const State state = stream_.pump(*this, net::kQueuedBytesMax);
      if (state == State::kFailed) return Error{ErrorCode::kPeer, stream_.why()};
      if (state == State::kClosed) return Error{ErrorCode::kPeer, stream_.peer() + ": it closed the connection"};
      if (condition()) break;
      const Nanos left = deadline_ - monotonic_now();
      if (left <= 0) {
        const char* const what = state == State::kConnecting ? ": no connection in time" : ": no answer in time";
        return Error{ErrorCode::kTimeout, stream_.peer() + what};
      }
      if (stream_.more()) continue;
      pollfd ready{stream_.fd(), static_cast<short>(stream_.events()), 0};
      const Nanos milliseconds = (left + kMillisecond - 1) / kMillisecond;
      ::poll(&ready, 1, static_cast<int>(std::min<Nanos>(milliseconds, std::numeric_limits<int>::max())));
    }
    return {};
  }

  Result<std::span<std::byte>> on_head(const FrameHead& head) override {
    const auto kind = static_cast<Kind>(head.kind);
    const bool hello = node_.empty() && kind == Kind::kHello && head.bytes <= kMessageBytesMax;
    const bool answer = !node_.empty() && kind == Kind::kProbe && head.id == answered_ + 1 && answered_ < asked_ &&
                        head.bytes == bytes_;
    if (!hello && !answer) return Error{ErrorCode::kPeer, "it answers something else than what it was asked"};
    body_.resize(head.bytes);
    return std::span(body_);
  }
  Status on_frame(const FrameHead& head) override {
    if (static_cast<Kind>(head.kind) == Kind::kProbe) {
      ++answered_;
      return {};
    }
    auto hello = decode_hello(body_);
    if (!hello.ok()) return hello.error();
    node_ = std::move(hello.value().node);
    return {};
  }

  net::FrameStream stream_;
  Nanos deadline_;
  std::string node_;  // empty: it has not said hello
  std::vector<std::byte> body_;
  std::uint64_t asked_ = 0;
  std::uint64_t answered_ = 0;
  std::uint32_t bytes_ = 0;  // asked for last
};

}  // namespace

Result<Probed> probe(const net::TlsContext& tls, const ProbeOptions& options) {
  const Nanos begun = monotonic_now();
  auto socket = net::connect_tcp(options.address);
  if (!socket.ok()) return socket.error();
  auto stream = net::TlsStream::create(tls, std::move(socket.value()), net::TlsStream::Role::kClient, options.address);
  if (!stream.ok()) return stream.error();
  Prober prober(std::move(stream.value()), options.own_name, begun + options.within);
  if (const Status there = prober.wait_for_hello(); !there) return there.error();
  Probed probed{prober.node(), monotonic_now() - begun, std::numeric_limits<Nanos>::max(), 0};
  for (int i = 0; i < kRoundTrips; ++i) {
    const auto one = prober.round_trip();
    if (!one.ok()) return one.error();
    probed.round_trip = std::min(probed.round_trip, one.value());
  }
  if (options.receive_for == 0) return probed;
  const auto rate = prober.rate(options.receive_for);
  if (!rate.ok()) return rate.error();
  probed.bytes_per_second = rate.value();
  return probed;
}

}  // namespace flexkv::peer
