#include "flexkv/ipc/socket.h"

#include <fcntl.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "flexkv/ipc/poll.h"

namespace flexkv::ipc {
namespace {

constexpr std::size_t kControlBytes = CMSG_SPACE(kMaxFrameFds * sizeof(int));

Error connect_error(const std::string& path, int saved_errno) {
  Error error = errno_error("connect to " + path, saved_errno);
  if (saved_errno == ENOENT || saved_errno == ECONNREFUSED) error.code = ErrorCode::kNotFound;
  if (saved_errno == EAGAIN) error.code = ErrorCode::kTimeout;
  return error;
}

Status set_nonblocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return errno_error("set O_NONBLOCK", errno);
  return {};
}

// Takes ownership of every descriptor of the message, so that none leaks whatever is wrong with it.
void take_fds(msghdr& message, std::vector<Fd>& fds) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      fds.emplace_back(fd);
    }
  }
}

}  // namespace

UnixAddress::UnixAddress(std::string_view path, Fd dir) : dir_(std::move(dir)) {
  FLEXKV_ASSERT(path.size() < sizeof(address_.sun_path));
  address_.sun_family = AF_UNIX;
  std::ranges::copy(path, address_.sun_path);
}

Result<UnixAddress> UnixAddress::of(const std::string& path) {
  constexpr std::size_t kMax = sizeof(sockaddr_un::sun_path) - 1;
  if (path.size() <= kMax) return UnixAddress(path, Fd());
  const std::size_t slash = path.rfind('/');
  const std::string dir = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  Fd fd(::open(dir.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) {
    const int saved = errno;
    Error error = errno_error("open " + dir, saved);
    if (saved == ENOENT) error.code = ErrorCode::kNotFound;
    return error;
  }
  const std::string shorter = "/proc/self/fd/" + std::to_string(fd.get()) + "/" + path.substr(slash + 1);
  if (shorter.size() > kMax) {
    return Error{ErrorCode::kInvalidArgument, "the name of the socket is too long; use a shorter one: " + path};
  }
  return UnixAddress(shorter, std::move(fd));
}

Result<Socket> Socket::connect(const std::string& path, Nanos timeout) {
  const auto address = UnixAddress::of(path);
  if (!address) return address.error();
  // A non-blocking connect fails at once when the listener's queue is full and gives nothing to wait for; a blocking
  // one waits in the kernel, for as long as SO_SNDTIMEO says.
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return errno_error("socket", errno);
  const Nanos deadline = deadline_after(timeout);
  while (true) {
    // Zero would mean for ever.
    const Nanos left = std::max(time_left(deadline), kMicrosecond);
    const timeval wait{.tv_sec = left / kSecond, .tv_usec = left % kSecond / kMicrosecond};
    if (::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)) != 0) {
      return errno_error("set SO_SNDTIMEO", errno);
    }
    if (::connect(fd.get(), address.value().get(), UnixAddress::size()) == 0) return adopt(std::move(fd));
    if (errno != EINTR) return connect_error(path, errno);
  }
}

Result<Socket> Socket::adopt(Fd fd) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) return errno_error("SO_PEERCRED", errno);
  if (peer.uid != ::geteuid() && peer.uid != 0) {
    return Error{ErrorCode::kPeer,
                 "process " + std::to_string(peer.pid) + " of uid " + std::to_string(peer.uid) + " is not trusted"};
  }
  if (auto status = set_nonblocking(fd.get()); !status) return status.error();
  return Socket(std::move(fd), peer);
}

Result<SendOutcome> Socket::send(std::span<const std::byte> frame, std::span<const int> fds) {
  FLEXKV_ASSERT(!frame.empty() && frame.size() <= kMaxFrameBytes && fds.size() <= kMaxFrameFds);
  iovec part{.iov_base = const_cast<std::byte*>(frame.data()), .iov_len = frame.size()};
  alignas(cmsghdr) char control[kControlBytes] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
  }
  while (::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return SendOutcome::kWouldBlock;
    if (errno == EINTR) continue;
    Error error = errno_error("send to process " + std::to_string(peer_.pid), errno);
    if (errno == EPIPE || errno == ECONNRESET) error.code = ErrorCode::kPeer;
    return error;
  }
  return SendOutcome::kSent;
}

Result<RecvOutcome> Socket::recv(Frame& out) {
  out.fds.clear();
  out.bytes.resize(kMaxFrameBytes);
  iovec part{.iov_base = out.bytes.data(), .iov_len = out.bytes.size()};
  alignas(cmsghdr) char control[kControlBytes];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t size = 0;
  do {
    size = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (size < 0 && errno == EINTR);
  const int failure = size < 0 ? errno : 0;
  if (size >= 0) take_fds(message, out.fds);
  const bool truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  if (size <= 0 || truncated) {
    out.bytes.clear();
    out.fds.clear();
  }
  if (failure == EAGAIN || failure == EWOULDBLOCK) return RecvOutcome::kWouldBlock;
  // No honest peer sends an empty frame, which looks like the end.
  if (size == 0 || failure == ECONNRESET) return RecvOutcome::kClosed;
  if (failure != 0) return errno_error("receive from process " + std::to_string(peer_.pid), failure);
  if (truncated) {
    return Error{ErrorCode::kPeer, "process " + std::to_string(peer_.pid) + " sent a frame or descriptors too many"};
  }
  out.bytes.resize(static_cast<std::size_t>(size));
  return RecvOutcome::kFrame;
}

}  // namespace flexkv::ipc
