// A connected UNIX SEQPACKET socket: frames of bytes with descriptors. Never blocks after connecting. Closes on
// destruction. Thread-compatible.
// Bounds: frames of 1 byte to 64 KiB with at most 8 descriptors; a longer one from the peer is a protocol error, after
// which the owner closes the socket. The peer's user is checked to be ours or root whenever a Socket comes to be.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::ipc {

constexpr std::size_t kMaxFrameBytes = 64 * 1024;
constexpr std::size_t kMaxFrameFds = 8;

struct Frame {
  std::vector<std::byte> bytes;
  std::vector<Fd> fds;
};

enum class SendOutcome { kSent, kWouldBlock };
enum class RecvOutcome { kFrame, kWouldBlock, kClosed };

class Socket {
 public:
  // Waits at most `timeout` for room in the listener's queue. kNotFound: nobody listens there.
  static Result<Socket> connect(const std::string& path, Nanos timeout);
  // Takes over a connected SEQPACKET socket and checks the peer's user.
  static Result<Socket> adopt(Fd fd);

  // REQUIRES: 1 <= frame.size() <= kMaxFrameBytes, fds.size() <= kMaxFrameFds. Descriptors are duplicated by the
  // kernel.
  Result<SendOutcome> send(std::span<const std::byte> frame, std::span<const int> fds = {});
  // Fills `out` for kFrame; empties it otherwise. Descriptors received are close-on-exec.
  Result<RecvOutcome> recv(Frame& out);

  int fd() const { return fd_.get(); }
  pid_t peer_pid() const { return peer_.pid; }
  uid_t peer_uid() const { return peer_.uid; }

 private:
  Socket(Fd fd, ucred peer) : fd_(std::move(fd)), peer_(peer) {}

  Fd fd_;
  ucred peer_;
};

// The kernel's address of a socket path. One that does not fit (107 bytes) is named through a descriptor of its
// directory, so this object must outlive the use. An error: there is no such directory, or even the name is too long.
class UnixAddress {
 public:
  static Result<UnixAddress> of(const std::string& path);

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address_); }
  static constexpr socklen_t size() { return sizeof(sockaddr_un); }

 private:
  UnixAddress(std::string_view path, Fd dir);

  Fd dir_;
  sockaddr_un address_{};
};

}  // namespace flexkv::ipc
