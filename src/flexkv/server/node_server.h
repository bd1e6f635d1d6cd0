// A Node with its surroundings: the host pool, the socket that agents and clients connect to, one lane, one mutex.
//
// The same class embedded in an engine's process (its scheduler calls the methods below directly) and in a daemon
// (clients speak the protocol). Thread-safe. One thread, the lane: accepts, decodes, applies, watches deadlines; it
// sleeps in epoll and uses no CPU when nothing happens.
#pragma once

#include <condition_variable>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>

#include "flexkv/base/fd.h"
#include "flexkv/base/mutex.h"
#include "flexkv/ipc/channel.h"
#include "flexkv/ipc/listener.h"
#include "flexkv/ipc/pending.h"
#include "flexkv/memory/host_region.h"
#include "flexkv/node/node.h"
#include "flexkv/server/beyond.h"
#include "flexkv/server/cluster_bridge.h"
#include "flexkv/server/disk_bridge.h"
#include "flexkv/server/engine_door.h"
#include "flexkv/server/remote_bridge.h"
#include "flexkv/server/resets_seen.h"
#include "flexkv/server/status.h"

namespace flexkv::server {

struct NodeServerOptions {
  node::NodeOptions node;
  DiskOptions disk;
  std::optional<ClusterOptions> cluster;  // none: this node is alone
  std::optional<RemoteOptions> remote;    // none: nothing is kept beyond this machine
  std::optional<EngineDoorOptions> door;  // none: it serves schedulers of this machine only
  bool huge_pages = true;
  unsigned touch_threads = 4;
  std::string runtime_dir;  // private directory, as ipc::runtime_dir() gives it
  std::string name;         // of the socket
  std::string mode;         // "embedded" or "daemon": for the status
};

class NodeServer final : private node::Outbox {
 public:
  static Result<std::unique_ptr<NodeServer>> start(NodeServerOptions options);
  // Leaves the cluster, ends the lane and closes every connection; agents and clients see the node go.
  ~NodeServer();

  // For the engine this node is embedded in; see Node. `results_fd`: an eventfd to be rung when take_ended_jobs() has
  // something to say; -1: none.
  Result<node::EngineHandle> attach_client(const proto::ClientHello& hello, int results_fd = -1);
  void detach_client(node::EngineHandle engine);
  node::Node::Lookup lookup(node::EngineHandle engine, const proto::LookupRequest& request);
  // What needs no answer: the reason why a transfer or a prefetch was not taken, kNone of all others. Not for lookups,
  // nor for ChangesRequest.
  proto::Reason post(node::EngineHandle engine, const proto::FromClient& message);
  void reset_all();  // of the cluster's other nodes, too
  // See Node::begin_scrub(); 0: the one that runs is to stop. Fails without an SSD tier.
  Status scrub(std::uint64_t bytes_per_second);
  // See Node::drain; the cluster is left first. What is not done after `timeout` is shown by the status, and goes on.
  // Asked once more, only the time begins anew.
  void drain(Nanos timeout);
  // Waits until nothing is left to be done, or that time is over: then false. REQUIRES: drain() was called
  bool wait_drained() const;
  bool ready(node::EngineHandle engine) const;
  // See Node; the first call of read_changes(), or of a client's ChangesRequest, begins to follow.
  bool read_changes(events::Subscription& subscription, node::EngineHandle engine, std::vector<events::Change>& out);
  // A descriptor that is readable while there may be changes that read_changes(), which must find no more before it is
  // waited for again, has not given yet. For one reader; the server's own.
  Result<int> changes_fd();
  // The engine's jobs that have ended since the last call; a client that never asks loses the oldest.
  std::vector<proto::JobResult> take_ended_jobs(node::EngineHandle engine);
  // Wait, at most so long, until there are such jobs, or until ready(); false: the time is over.
  bool wait_ended_jobs(node::EngineHandle engine, Nanos timeout) const;
  bool wait_ready(node::EngineHandle engine, Nanos timeout) const;

  const std::array<std::uint8_t, 32>& key_secret() const { return key_secret_; }
  // What `flexkv status` shows, as JSON (docs/reference/status.md).
  std::string status_json() const;
  std::string socket_path() const;
  // ADDRESS:PORT for schedulers of other machines; empty: it does not listen for any.
  std::string door_address() const { return door_ == nullptr ? "" : door_->address(); }
  // One line for the log: pool size, page kind, socket.
  std::string describe() const;

 private:
  struct Drain {
    Nanos begun = 0;
    Nanos lends_until = 0;
    Nanos deadline = 0;
    bool told = false;  // the cluster, that nothing is left
  };
  struct Peer {
    Peer(ipc::Channel c, Fd p) : channel(std::move(c)), process(std::move(p)) {}
    ipc::Channel channel;
    Fd process;                     // see open_process
    node::AgentHandle agent = 0;    // one of the two is set
    node::EngineHandle engine = 0;  // a client's
    std::uint64_t id = 0;           // its number among the peers, for a client
    bool expelled = false;          // broke the protocol: told to go, not yet gone
    events::Subscription changes;   // a client's
    bool wants_changes = false;     // and none could be told it yet
  };

  NodeServer(NodeServerOptions options, memory::HostRegion pool, ipc::Listener listener);
  std::unique_ptr<ClusterBridge> open_cluster();
  std::unique_ptr<RemoteBridge> open_remote();
  std::unique_ptr<DiskBridge> open_disk();
  void join_cluster(const ResetsSeen& held);
  void open_door();
  void call_node(const std::function<void(node::Node&)>& call);
  void note_resets(const std::function<void(ResetsSeen&)>& change) FLEXKV_REQUIRES(mutex_);
  void tell_marks() FLEXKV_REQUIRES(mutex_);
  void finish_writes();
  DrainStatus drain_status(Nanos now) const FLEXKV_REQUIRES(mutex_);
  void advance_drain(Nanos now) FLEXKV_REQUIRES(mutex_);

  bool send(node::AgentHandle agent, const proto::ToAgent& message) override FLEXKV_REQUIRES(mutex_);
  void send(node::EngineHandle engine, const proto::JobResult& result) override FLEXKV_REQUIRES(mutex_);
  void changed() override FLEXKV_REQUIRES(mutex_);
  void lent(node::Loan loan) override FLEXKV_REQUIRES(mutex_);
  void tell_changes(Peer& peer) FLEXKV_REQUIRES(mutex_);

  void lane();
  void watch(int fd, std::uint64_t token);
  void accept_clients();
  void advance_pending(int fd);
  Status answer(proto::Role role, std::span<const std::byte> question);
  Result<std::unique_ptr<Peer>> admit(ipc::PendingChannel& pending);
  void serve(std::uint64_t id, bool socket_event);
  bool apply(Peer& peer, std::span<const std::byte> record);
  proto::Reason take(node::EngineHandle engine, const proto::FromClient& message, Nanos now) FLEXKV_REQUIRES(mutex_);
  bool hear(Peer& peer);
  void hear_client_of(node::AgentHandle agent);
  void expel(std::uint64_t id);
  void drop(std::uint64_t id);
  void wake_if_earlier() FLEXKV_REQUIRES(mutex_);
  bool wait_for_news(Nanos end) const FLEXKV_REQUIRES(mutex_);  // false: it is later than that

  const NodeServerOptions options_;
  memory::HostRegion pool_;
  std::array<std::uint8_t, 32> key_secret_{};
  std::uint64_t epoch_ = 0;
  Nanos started_at_ = 0;
  std::string door_off_why_;                      // not empty: the door that was asked for could not be opened
  Beyond beyond_;                                 // both of these, as far as there are any
  std::string cluster_off_why_;                   // not empty: the cluster that was asked for could not be joined
  const std::unique_ptr<ClusterBridge> cluster_;  // null: no cluster, or no secret
  std::string remote_off_why_;                    // not empty: the remote tier that was asked for could not be opened
  const std::unique_ptr<RemoteBridge> remote_;    // null: no remote tier
  std::string disk_off_why_;                      // not empty: the SSD tier that was asked for could not be opened
  const std::unique_ptr<DiskBridge> disk_;        // null: no SSD tier

  // Owned by the lane.
  ipc::Listener listener_;
  ipc::PendingChannels pending_;
  Fd epoll_;
  Fd wake_;  // stop, or a deadline that came nearer

  mutable Mutex mutex_;
  std::condition_variable_any written_;       // nothing is left to be written to drives, or to the remote tier
  mutable std::condition_variable_any done_;  // less may be left of what a drain waits for
  mutable std::condition_variable_any news_;  // a job of an engine that this node is embedded in has ended; a rank came
  Fd changes_fd_ FLEXKV_GUARDED_BY(mutex_);   // before the node, which says at its end what is gone
  node::Node node_ FLEXKV_GUARDED_BY(mutex_);
  node::ResetId last_reset_ FLEXKV_GUARDED_BY(mutex_) = 0;  // of reset_all()
  ResetsSeen resets_seen_ FLEXKV_GUARDED_BY(mutex_);        // of those elsewhere, this node knows these
  std::unordered_map<std::uint64_t, std::unique_ptr<Peer>> peers_ FLEXKV_GUARDED_BY(mutex_);
  std::unordered_map<node::AgentHandle, Peer*> agents_ FLEXKV_GUARDED_BY(mutex_);
  std::unordered_map<node::EngineHandle, Peer*> clients_ FLEXKV_GUARDED_BY(mutex_);
  struct Ended {
    std::vector<proto::JobResult> results;
    int results_fd = -1;
  };
  std::unordered_map<node::EngineHandle, Ended> ended_ FLEXKV_GUARDED_BY(mutex_);  // of attach_client()
  bool stopping_ FLEXKV_GUARDED_BY(mutex_) = false;
  std::optional<Drain> drain_ FLEXKV_GUARDED_BY(mutex_);
  Nanos lane_wakeup_ FLEXKV_GUARDED_BY(mutex_) = 0;
  bool changed_ FLEXKV_GUARDED_BY(mutex_) = false;  // and peers were not told yet
  std::uint64_t next_peer_ = 1;

  std::thread lane_;
  std::thread toucher_;
  std::unique_ptr<EngineDoor> door_;
};

}  // namespace flexkv::server
