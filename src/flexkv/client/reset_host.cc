#include "flexkv/client/reset_host.h"

#include <poll.h>
#include <sys/epoll.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "flexkv/net/frame_stream.h"
#include "flexkv/net/tcp.h"
#include "flexkv/proto/host_frames.h"

namespace flexkv::client {
namespace {

using proto::HostFrame;
using State = net::FrameStream::State;

constexpr std::uint32_t kTextBytesMax = 4096;
static_assert(EPOLLIN == POLLIN && EPOLLOUT == POLLOUT, "what a stream wants of epoll is asked of poll");

// What the node answers.
class Answer final : public net::FrameSink {
 public:
  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override {
    const auto kind = static_cast<HostFrame>(head.kind);
    if ((kind != HostFrame::kResetDone && kind != HostFrame::kRefused) || head.bytes > kTextBytesMax) {
      return Error{ErrorCode::kPeer, "it answers something else than what it was asked"};
    }
    text.resize(head.bytes);
    return std::as_writable_bytes(std::span(text));
  }
  Status on_frame(const net::FrameHead& head) override {
    came = true;
    done = static_cast<HostFrame>(head.kind) == HostFrame::kResetDone;
    return {};
  }

  bool came = false;
  bool done = false;
  std::string text;  // why it refuses
};

}  // namespace

Status reset_host(const net::TlsContext& tls, const std::string& address, Nanos within) {
  const Nanos deadline = monotonic_now() + within;
  auto numeric = net::resolve_tcp(address);
  if (!numeric.ok()) return numeric.error();
  auto socket = net::connect_tcp(numeric.value());
  if (!socket.ok()) return socket.error();
  auto connected = net::TlsStream::create(tls, std::move(socket.value()), net::TlsStream::Role::kClient, address);
  if (!connected.ok()) return connected.error();
  net::FrameStream stream(std::move(connected.value()));
  FLEXKV_ASSERT(stream.send(static_cast<std::uint32_t>(HostFrame::kReset), proto::kHostVersion, {}));
  Answer answer;
  while (true) {
    const State state = stream.pump(answer, kTextBytesMax);
    if (answer.came) break;
    if (state == State::kFailed) return Error{ErrorCode::kPeer, stream.why()};
    if (state == State::kClosed) {
      return Error{ErrorCode::kPeer, address +
                                         ": it closed the connection without an answer; an older FlexKV does, "
                                         "and has to be reset there"};
    }
    const Nanos left = deadline - monotonic_now();
    if (left <= 0) {
      const char* const what = state == State::kConnecting ? ": no connection in time" : ": no answer in time";
      return Error{ErrorCode::kTimeout, address + what};
    }
    if (stream.more()) continue;
    pollfd ready{stream.fd(), static_cast<short>(stream.events()), 0};
    const Nanos milliseconds = (left + kMillisecond - 1) / kMillisecond;
    ::poll(&ready, 1, static_cast<int>(std::min<Nanos>(milliseconds, std::numeric_limits<int>::max())));
  }
  stream.close();
  if (answer.done) return {};
  return Error{ErrorCode::kPeer, address + ": " + answer.text};
}

}  // namespace flexkv::client
