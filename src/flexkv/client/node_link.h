// A connection to a node, and who makes it: over a UNIX socket and rings, or over TCP in TLS to another machine.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/client/node_port.h"
#include "flexkv/proto/messages.h"

namespace flexkv::client {

constexpr Nanos kHandshakeTimeout = 10 * kSecond;

// Thread-compatible; of the port's calling thread.
class NodeLink {
 public:
  virtual ~NodeLink() = default;
  // False: there is no room for it now, or the connection is gone(). Never waits.
  virtual bool send(const proto::FromClient& message) = 0;
  enum class Take { kMessage, kNothing, kBroken };
  // kBroken: the node broke the protocol, or is gone.
  virtual Take take(proto::ToClient& out) = 0;
  // Sleeps until there may be something to take, or the connection is gone. False: it is late.
  virtual bool sleep_until(Nanos deadline) = 0;
  virtual bool gone() const = 0;
  // For the node, too. Nothing but the destructor may be called any more.
  virtual void end() = 0;
};

// Used by one thread of the port's own, which blocks here.
class Dialer {
 public:
  virtual ~Dialer() = default;
  struct Dialed {
    std::unique_ptr<NodeLink> link;
    std::array<std::uint8_t, 32> key_secret{};
  };
  // Connects once, to a node that listens or as soon as one does. kCanceled: `stop_fd` became readable.
  virtual Result<Dialed> dial(int stop_fd) = 0;
  // Returns when the connection that was dialed last has ended; false: `stop_fd` became readable.
  virtual bool carry(int stop_fd) = 0;
  virtual std::string node() const = 0;  // for messages
};

// A port to one node. Connects in the background as soon as, and whenever again, the dialer can.
Result<std::unique_ptr<HostPort>> open_dialed_port(std::unique_ptr<Dialer> dialer);

}  // namespace flexkv::client
