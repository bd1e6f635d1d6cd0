#include "flexkv/ipc/channel.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string_view>

#include "flexkv/ipc/poll.h"

namespace flexkv::ipc {
namespace {

// The order of the descriptors in a Welcome; the server's own follow.
enum FdSlot : std::size_t { kToServerRing, kToClientRing, kServerWake, kClientWake, kChannelFds };
static_assert(kChannelFds + Channel::kMaxUserFds <= kMaxFrameFds);

// Another kind of file could block us, or take our writes as data.
Status check_eventfd(const Fd& fd) {
  std::array<char, 64> target{};
  const std::string link = "/proc/self/fd/" + std::to_string(fd.get());
  const ssize_t size = ::readlink(link.c_str(), target.data(), target.size());
  const std::string_view kind(target.data(), size > 0 ? static_cast<std::size_t>(size) : 0);
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (kind != "anon_inode:[eventfd]" || flags < 0 || (flags & O_NONBLOCK) == 0) {
    return Error{ErrorCode::kPeer, "the peer's wake descriptor is not a non-blocking eventfd"};
  }
  return {};
}

Result<Frame> receive_answer(Socket& socket, Nanos deadline) {
  Frame frame;
  while (true) {
    const auto outcome = socket.recv(frame);
    if (!outcome) return outcome.error();
    if (outcome.value() == RecvOutcome::kFrame) return frame;
    if (outcome.value() == RecvOutcome::kClosed) return Error{ErrorCode::kPeer, "the server closed the connection"};
    pollfd readable{.fd = socket.fd(), .events = POLLIN, .revents = 0};
    const auto ready = poll_until({&readable, 1}, deadline);
    if (!ready) return ready.error();
    if (!ready.value()) return Error{ErrorCode::kTimeout, "the server did not answer the handshake in time"};
  }
}

}  // namespace

struct Channel::Parts {
  RingMemory sending;
  RingMemory receiving;
  Fd wake;
  Fd peer_wake;
};

Channel::Channel(Socket socket, Parts parts)
    : socket_(std::move(socket)),
      wake_(std::move(parts.wake)),
      peer_wake_(std::move(parts.peer_wake)),
      sending_(std::move(parts.sending)),
      receiving_(std::move(parts.receiving)),
      producer_(sending_, peer_wake_.get()),
      consumer_(receiving_, peer_wake_.get()) {
  // Both sides have their mappings or their copies by now.
  sending_.close_fd();
  receiving_.close_fd();
}

Result<Connection> Channel::connect(const std::string& path, const Hello& hello, Nanos timeout) {
  const Nanos deadline = deadline_after(timeout);
  auto socket = Socket::connect(path, timeout);
  if (!socket) return socket.error();
  return connect(std::move(socket).value(), hello, time_left(deadline));
}

Result<Connection> Channel::connect(Socket socket, const Hello& hello, Nanos timeout) {
  const Nanos deadline = deadline_after(timeout);
  const auto sent = socket.send(encode_hello(hello));
  // The first frame on a connection always finds room. A server that refuses and closes at once may leave its answer
  // behind, which tells more than the failure to send.
  if (!sent && sent.error().code != ErrorCode::kPeer) return sent.error();
  auto answer = receive_answer(socket, deadline);
  if (!answer) return answer.error();
  auto payload = decode_answer(answer.value().bytes);
  if (!payload) return payload.error();
  auto& fds = answer.value().fds;
  if (fds.size() < kChannelFds) return Error{ErrorCode::kPeer, "the server's Welcome lacks descriptors"};
  for (const auto slot : {kServerWake, kClientWake}) {
    if (auto status = check_eventfd(fds[slot]); !status) return status.error();
  }
  auto sending = RingMemory::attach(fds[kToServerRing]);
  if (!sending) return sending.error();
  auto receiving = RingMemory::attach(fds[kToClientRing]);
  if (!receiving) return receiving.error();
  Parts parts{.sending = std::move(sending).value(),
              .receiving = std::move(receiving).value(),
              .wake = std::move(fds[kClientWake]),
              .peer_wake = std::move(fds[kServerWake])};
  fds.erase(fds.begin(), fds.begin() + kChannelFds);
  return Connection{.channel = Channel(std::move(socket), std::move(parts)),
                    .payload = std::move(payload).value(),
                    .fds = std::move(fds)};
}

Result<Channel> Channel::welcome(Socket& socket, std::span<const std::byte> payload, std::span<const int> fds,
                                 std::size_t ring_capacity) {
  FLEXKV_ASSERT(fds.size() <= kMaxUserFds);
  auto sending = RingMemory::create(ring_capacity);
  if (!sending) return sending.error();
  auto receiving = RingMemory::create(ring_capacity);
  if (!receiving) return receiving.error();
  auto wake = make_eventfd();
  if (!wake) return wake.error();
  auto peer_wake = make_eventfd();
  if (!peer_wake) return peer_wake.error();

  std::array<int, kMaxFrameFds> all{};
  all[kToServerRing] = receiving.value().fd();
  all[kToClientRing] = sending.value().fd();
  all[kServerWake] = wake.value().get();
  all[kClientWake] = peer_wake.value().get();
  std::ranges::copy(fds, all.begin() + kChannelFds);
  const auto sent = socket.send(encode_welcome(payload), std::span(all).first(kChannelFds + fds.size()));
  if (!sent) return sent.error();
  if (sent.value() != SendOutcome::kSent) return Error{ErrorCode::kPeer, "the client does not read its answer"};
  return Channel(std::move(socket), Parts{.sending = std::move(sending).value(),
                                          .receiving = std::move(receiving).value(),
                                          .wake = std::move(wake).value(),
                                          .peer_wake = std::move(peer_wake).value()});
}

void Channel::disarm() {
  drain_eventfd(wake_.get());
  consumer_.disarm();
}

bool Channel::peer_gone() const {
  // Nothing follows the handshake on the socket: a frame is as much an end as the end is.
  std::byte probe{};
  const ssize_t size = ::recv(socket_.fd(), &probe, 1, MSG_DONTWAIT | MSG_PEEK);
  return size >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

void Channel::hang_up() { (void)::shutdown(socket_.fd(), SHUT_WR); }

bool Channel::peer_closed() {
  std::byte ignored{};
  while (true) {
    const ssize_t size = ::recv(socket_.fd(), &ignored, 1, MSG_DONTWAIT);
    if (size > 0 || (size < 0 && errno == EINTR)) continue;
    return size == 0 || (errno != EAGAIN && errno != EWOULDBLOCK);
  }
}

}  // namespace flexkv::ipc
