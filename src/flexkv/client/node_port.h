// How a client reaches its node: by function call (embedded) or over a channel (daemon).
// Thread-compatible: one calling thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/net/tls.h"
#include "flexkv/proto/messages.h"
#include "flexkv/server/node_server.h"

namespace flexkv::client {

constexpr Nanos kLookupPatience = 50 * kMillisecond;
constexpr proto::LookupReply kNoAnswer{0, 0, proto::Reason::kNoNode, 0, 0};

class NodePort {
 public:
  virtual ~NodePort() = default;
  // Differs whenever what was sent before is forgotten (another node, another connection); 0: no node now.
  virtual std::uint64_t generation() = 0;
  // Of the node of this generation. REQUIRES: generation() != 0.
  virtual const std::array<std::uint8_t, 32>& key_secret() = 0;
  virtual proto::LookupReply lookup(proto::LookupRequest request) = 0;  // its number is the port's
  virtual bool post(const proto::FromClient& message) = 0;
  // Ends the connection, if there is one: the node forgets what this engine had under way.
  virtual void hang_up() = 0;
  virtual std::vector<proto::JobResult> take_ended_jobs() = 0;
  // What has come of the changes of what the node keeps; asks it for more. An empty answer says nothing of the future.
  virtual std::vector<events::Change> take_changes() { return {}; }
  // See Client.
  virtual bool wait_ended_jobs(Nanos timeout) = 0;
  virtual bool served(Nanos timeout) = 0;
  // Remote lookups cost a round trip, so their results may be reused for a short while.
  virtual Nanos reuse_time() const = 0;
};

// One that can be asked while others are.
class HostPort : public NodePort {
 public:
  // False: it cannot be asked now. The answer that is asked for last is the one that counts.
  virtual bool ask(proto::LookupRequest request) = 0;
  // kNoAnswer: it did not come in time. REQUIRES: ask() was true
  virtual proto::LookupReply answer(Nanos deadline) = 0;
};

// The node must outlive the port.
Result<std::unique_ptr<NodePort>> open_embedded_port(server::NodeServer& node, const proto::ClientHello& hello);

// Returns at once; connects in the background as soon as (and whenever again) a node of that name listens.
Result<std::unique_ptr<NodePort>> open_remote_port(const std::string& runtime_dir, const std::string& node_name,
                                                   const proto::ClientHello& hello);

Result<std::unique_ptr<HostPort>> open_unix_port(const std::string& runtime_dir, const std::string& node_name,
                                                 const proto::ClientHello& hello);

// As above, to the node of another machine that listens for schedulers at HOST:PORT. What it saves it keeps only when
// this port has heard that it is done and nobody has cancelled it by then. Tells of no changes.
Result<std::unique_ptr<HostPort>> open_tls_port(net::TlsContext tls, const std::string& address,
                                                const proto::ClientHello& hello);

// To the nodes of all machines of an engine, in the order of their ranks, as to one: it has what all of them have. It
// is there as long as all are; when one goes, the others forget what the engine had under way. Transfers that are armed
// by nobody are refused: nothing would say when the ranks of a machine that cannot be reached are quiet. Tells the
// changes of the first. docs/decisions/0032.
std::unique_ptr<NodePort> join_ports(std::vector<std::unique_ptr<HostPort>> hosts);

}  // namespace flexkv::client
