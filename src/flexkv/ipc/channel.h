// A connected pair of processes: a socket for handshake and liveness, a ring of records in each direction, and an
// eventfd for each side. Owns all of them; the destructor ends the connection, which the peer sees on its socket_fd().
//
// Threads: at most one sending (send, max_record, broken) and one receiving (everything else) at a time; they may be
// the same. Moved only while neither runs.
//
// A lane waits on any number of channels with epoll, level-triggered, on both descriptors of each:
//   wake_fd()    readable: disarm(), retry what send() refused, pop() until kEmpty, arm_sleep(); repeat the pops while
//                that says false
//   socket_fd()  any event: peer_gone() says whether the peer has ended or broken the protocol. The rings may still
//   hold
//                what it sent before; pop them, then drop the channel
// Bounds: the rings have a fixed capacity; send() says false when its ring is full, and the wake_fd() becomes readable
// once half of it is free.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/ipc/handshake.h"
#include "flexkv/ipc/ring.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc {

struct Connection;

class Channel {
 public:
  // Descriptors of the server's own that may accompany a Welcome.
  static constexpr std::size_t kMaxUserFds = 4;

  // The client's side; blocks for at most `timeout`. kNotFound: nobody listens; kUnsupported, kNoSpace: refused (see
  // handshake.h); kTimeout; kPeer: the peer is gone, not trusted, or broke the protocol.
  static Result<Connection> connect(const std::string& path, const Hello& hello, Nanos timeout);
  static Result<Connection> connect(Socket socket, const Hello& hello, Nanos timeout);

  // The server's side, once it has seen a Hello (pending.h): sends Welcome with the channel's descriptors and `fds`.
  // On an error the socket is left as it was. REQUIRES: as for RingMemory::create, kMaxPayload, kMaxUserFds.
  static Result<Channel> welcome(Socket& socket, std::span<const std::byte> payload, std::span<const int> fds,
                                 std::size_t ring_capacity);

  // Sends the record a + b. False: the ring is full, or broken(). REQUIRES: a.size() + b.size() <= max_record().
  bool send(std::span<const std::byte> a, std::span<const std::byte> b = {}) { return producer_.push(a, b); }
  std::size_t max_record() const { return producer_.max_record(); }
  // The peer broke the ring that we send on; drop the channel.
  bool broken() const { return producer_.broken(); }

  // kCorrupt: the peer broke the protocol; drop the channel.
  PopResult pop(std::vector<std::byte>& out) { return consumer_.pop(out); }
  // True: everything is popped, and the peer's next record makes wake_fd() readable. False: pop again.
  bool arm_sleep() { return consumer_.arm(); }
  // Call when wake_fd() is readable, before popping.
  void disarm();

  bool peer_gone() const;

  // Ends the connection for the peer, who sees it gone, but keeps it here, to learn by peer_closed() when it has let
  // go.
  void hang_up();
  // True once the peer has closed its side; what it sent on the socket before does not count.
  bool peer_closed();

  int wake_fd() const { return wake_.get(); }
  int socket_fd() const { return socket_.fd(); }
  pid_t peer_pid() const { return socket_.peer_pid(); }

 private:
  struct Parts;
  Channel(Socket socket, Parts parts);

  Socket socket_;
  Fd wake_;
  Fd peer_wake_;
  RingMemory sending_;
  RingMemory receiving_;
  // Each on cache lines of its own: two threads write them.
  alignas(128) RingProducer producer_;
  alignas(128) RingConsumer consumer_;
};

// What a client gets.
struct Connection {
  Channel channel;
  std::vector<std::byte> payload;
  std::vector<Fd> fds;
};

}  // namespace flexkv::ipc
