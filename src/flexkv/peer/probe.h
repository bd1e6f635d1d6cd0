// Whether a node is there, knows the secret, and how far away it is: for who looks for faults in a cluster. Asks for no
// block, and uses a connection of its own that ends with it. Thread-safe.
#pragma once

#include <string>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/net/tls.h"

namespace flexkv::peer {

struct ProbeOptions {
  std::string own_name;   // for the other node's hello
  std::string address;    // numeric, with a port
  Nanos within = 0;       // for the connection, the handshake, both hellos and some round trips
  Nanos receive_for = 0;  // how long bytes are received then, to see how fast they come; 0: not at all
};

struct Probed {
  std::string node;             // who is there
  Nanos greeting = 0;           // from nothing to its hello
  Nanos round_trip = 0;         // the shortest of some
  double bytes_per_second = 0;  // 0: not looked at
};

// Blocks, for `within` and `receive_for` at most. The error says what did not work, and where.
// REQUIRES: the calling thread does not take SIGPIPE
Result<Probed> probe(const net::TlsContext& tls, const ProbeOptions& options);

}  // namespace flexkv::peer
