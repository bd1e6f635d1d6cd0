// TCP sockets of nodes: non-blocking, close-on-exec, without Nagle's delay, and given up when the other machine is gone
// without a word. Thread-safe functions.
#pragma once

#include <string>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::net {

// HOST:PORT or [HOST]:PORT with HOST a name or an address of this machine ("0.0.0.0", "::" for all), and PORT 0 for
// any.
Result<Fd> listen_tcp(const std::string& address);
// ADDRESS:PORT that a listener got, the port above all.
Result<std::string> local_address(const Fd& socket);

// What waits to be accepted. An invalid Fd: nobody.
Result<Fd> accept_tcp(const Fd& listener);
// Of the other side, for messages.
std::string peer_address(const Fd& socket);

// The address with its host looked up, for connect_tcp(). May wait for the network's name servers for seconds.
Result<std::string> resolve_tcp(const std::string& address);
// Begins to connect. The address is numeric, because looking up a name may take long. The socket becomes writable when
// that has succeeded or failed; what is done with it then says why it failed.
Result<Fd> connect_tcp(const std::string& address);

}  // namespace flexkv::net
