// How a client reaches its node: by function call (embedded) or over a channel (daemon).
// Thread-compatible: one calling thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/proto/messages.h"
#include "flexkv/server/node_server.h"

namespace flexkv::client {

constexpr Nanos kLookupPatience = 50 * kMillisecond;

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

// The node must outlive the port.
Result<std::unique_ptr<NodePort>> open_embedded_port(server::NodeServer& node, const proto::ClientHello& hello);

// Returns at once; connects in the background as soon as (and whenever again) a node of that name listens.
Result<std::unique_ptr<NodePort>> open_remote_port(const std::string& runtime_dir, const std::string& node_name,
                                                   const proto::ClientHello& hello);

}  // namespace flexkv::client
