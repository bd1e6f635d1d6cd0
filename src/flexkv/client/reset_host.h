// Has the node of another machine, which serves a part of an engine, forget all blocks: `flexkv reset` on the engine's
// first machine tells the others so. Uses a connection of its own that ends with it. Thread-safe.
#pragma once

#include <string>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/net/tls.h"

namespace flexkv::client {

// `tls`: of proto::kHostPurpose; `address`: HOST:PORT, where that node lets schedulers in. Blocks, for `within` at most
// and while a host's name is looked up. Ok: it has said that it has forgotten them. The error says what did not work,
// and where. REQUIRES: the calling thread does not take SIGPIPE
Status reset_host(const net::TlsContext& tls, const std::string& address, Nanos within);

}  // namespace flexkv::client
