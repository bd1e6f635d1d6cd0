// Clients that have connected but not said Hello yet. Nothing here blocks the server's lane: it polls each fd(), calls
// advance() when that is readable, and expire() when next_deadline() has come. Owned by one thread.
// Bounds: at most `max_clients` at a time (more are told that the server is busy, and closed); each has `patience` to
// speak, then it is closed. A client that breaks the protocol is closed alone.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/handshake.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc {

// One such client. Owns its socket until accept() moves it into the Channel.
class PendingChannel {
 public:
  enum class Step { kWaiting, kHello };

  PendingChannel(Socket socket, Nanos deadline) : socket_(std::move(socket)), deadline_(deadline) {}

  // Reads what has arrived. kHello: decide by hello(), then accept() or refuse(). An error (the client left, broke the
  // protocol, or speaks another version and was told so): drop it.
  Result<Step> advance();
  // REQUIRES: advance() gave kHello.
  const Hello& hello() const { return hello_; }

  // See Channel::welcome. After an error, refuse() still works. REQUIRES: advance() gave kHello.
  Result<Channel> accept(std::span<const std::byte> payload, std::span<const int> fds, std::size_t ring_capacity) {
    return Channel::welcome(socket_, payload, fds, ring_capacity);
  }
  // Tells the client why not; see encode_refused. Drop it afterwards.
  void refuse(const Error& error);

  int fd() const { return socket_.fd(); }
  Nanos deadline() const { return deadline_; }
  pid_t peer_pid() const { return socket_.peer_pid(); }

 private:
  Socket socket_;
  Nanos deadline_;
  Hello hello_;
};

class PendingChannels {
 public:
  PendingChannels(std::size_t max_clients, Nanos patience) : max_clients_(max_clients), patience_(patience) {}

  // The descriptor to poll, or nothing: full, and the client was refused and closed.
  std::optional<int> add(Socket socket, Nanos now);
  // Valid until the next call that changes the set; null when there is none.
  PendingChannel* find(int fd);
  // Out of the set: after a kHello or an error. REQUIRES: find(fd) != nullptr.
  PendingChannel take(int fd);
  // Closes those whose time is up and returns how many.
  std::size_t expire(Nanos now);
  std::optional<Nanos> next_deadline() const;
  std::size_t size() const { return clients_.size(); }

 private:
  std::size_t max_clients_;
  Nanos patience_;
  std::vector<PendingChannel> clients_;  // oldest first
};

}  // namespace flexkv::ipc
