// A node's part in a cluster: RemotePort over the directory of the others' blocks and the connections to them, and
// this node's own blocks for them.
//
// As a RemotePort it is called under the node's lock. What peers and directory say reaches the node through `Apply`, on
// their threads. Owns both lanes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/cluster/directory_lane.h"
#include "flexkv/key/namespace.h"
#include "flexkv/memory/host_region.h"
#include "flexkv/net/secret.h"
#include "flexkv/net/tls.h"
#include "flexkv/node/node.h"
#include "flexkv/peer/peer_lane.h"
#include "flexkv/server/beyond.h"
#include "flexkv/server/remote_reads.h"

namespace flexkv::server {

struct ClusterOptions {
  std::string cluster = "default";  // clusters of other names are strangers, in the same Redis, too
  std::string node;                 // for people
  std::string secret_file;          // of the cluster; see net::Secret
  std::string listen;               // HOST:PORT, where other nodes reach this one; port 0: any
  std::string told_address;         // if they reach it elsewhere: through what a test puts between them
  meta::RedisOptions redis;
  Nanos time_to_live = 30 * kSecond;
  bool share_host = true;     // tells the others of blocks in host memory
  bool share_drives = false;  // and of those on drives
  // One of both, for nodes to read each other's memory by themselves; empty: blocks travel over the TLS connections.
  std::string nixl_library;  // path of libnixl_capi.so; others may write to the pool as well (docs/decisions/0024)
  std::vector<std::string> mooncake_helper;  // the command of the process that runs Mooncake (docs/decisions/0035)
};

class ClusterBridge final : public node::RemotePort,
                            private peer::BlockSource,
                            private peer::ReadSink,
                            private cluster::ChangeSource {
 public:
  // Runs a call on the node under its lock.
  using Apply = std::function<void(const std::function<void(node::Node&)>& call)>;

  // Fails when the secret is not to be had. `pool`: where the blocks lie; stays mapped until close(), at least. `reads`
  // is told of what comes. `reset`: the cluster was, and the node is. `current`: this is known to be the cluster's
  // epoch, and began with a reset; none: it is not known any more, which comes before each `reset`. Both under the
  // node's lock.
  static Result<std::unique_ptr<ClusterBridge>> create(const ClusterOptions& options, const memory::HostRegion& pool,
                                                       SourceSink& reads, Apply apply,
                                                       std::function<void(cluster::Epoch epoch)> reset,
                                                       std::function<void(std::optional<cluster::Epoch>)> current);
  ~ClusterBridge() override;

  // Of the keys of blocks, the same at all nodes.
  const net::Secret::Key& key_secret() const { return key_secret_; }
  // Begins to listen and to look for others; apply is not called before that. Fails when this node cannot listen; then
  // it finds nothing, and is not found. `held_epoch`: of the cluster, as the node knew it that kept what this one has
  // on drives. `needs_reset`: see DirectoryOptions. REQUIRES: the node knows no space yet
  Result<> start(const cluster::Epoch& held_epoch, bool needs_reset);
  // Begins to tell the others that this node gives nothing more, under the node's lock. False: none of them finds
  // blocks here, so none can be about to read some.
  bool drain();
  // And that it has nothing left to do; the same.
  void tell_drained();
  // Tells the others that this node ends, as far as that is possible within `patience`. Its reads go on.
  void leave(Nanos patience);
  // Ends all that is under way; then apply is not called any more. Reads that the node orders afterwards are not begun.
  // False: a call of NIXL's hangs, and the pool must stay mapped for good.
  bool close();

  // The node has forgotten what is older than these resets, of which it knows by its remote store; see hash_of_marks().
  // Nodes that do not know the same are not read from. Under the node's lock.
  void know_resets(const key::Root& marks);
  // From the node's Outbox, under its lock.
  void changed();
  void lent(const node::Loan& loan);

  struct PeerStatus {
    cluster::PeerInfo info;
    std::uint64_t blocks = 0;
    RemoteReads::Flow flow;
  };
  struct Status {
    std::string cluster;
    std::string node;
    std::string address;  // where it listens; empty: this node could not join
    // By which it can read others' memory by itself, and they its own.
    peer::Transport one_sided = peer::Transport::kNone;
    std::string one_sided_trouble;  // why not, though it was to
    cluster::DirectoryLaneStatus directory;
    std::vector<PeerStatus> nodes;  // the others
    peer::PeerStats peers;
    std::size_t reading = 0;  // reads under way
    std::uint64_t given_up = 0;
    std::size_t lending = 0;
  };
  // Under the node's lock.
  Status status() const;

  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now) override;
  void read(node::RemoteRead read) override;
  // All nodes of the cluster forget their blocks. Until this one has, it finds nothing at others.
  void reset(node::ResetId reset) override;
  void cancel(node::RemoteOp op) override;
  std::optional<Nanos> next_time() const override;
  void on_time(Nanos now) override;

 private:
  struct Lending {
    std::function<void(peer::Pinned)> answer;  // null: it was given
    std::uint64_t slot_bytes = 0;
  };
  struct Told {  // a space of the node's that the others are told of
    cluster::SpaceIndex index = 0;
    bool open = true;
  };

  ClusterBridge(const ClusterOptions& options, net::TlsContext tls, const net::Secret::Key& key_secret,
                const memory::HostRegion& pool, SourceSink& reads, Apply apply,
                std::function<void(cluster::Epoch epoch)> reset,
                std::function<void(std::optional<cluster::Epoch>)> current);

  Error not_joined(Error why);
  void start_one_sided(const std::string& node);
  Result<std::unique_ptr<peer::OneSided>> open_one_sided(const std::string& node) const;
  void enter_epoch(cluster::Epoch epoch);
  void know_epoch(std::optional<cluster::Epoch> epoch);
  void pin(const peer::SpaceName& space, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys,
           std::uint32_t first, Nanos deadline, std::function<void(peer::Pinned)> done) override;
  void unpin(std::uint64_t pin) override;
  void on_damaged(std::uint64_t pin, std::uint32_t block) override;
  void on_block(peer::RequestId id, std::uint32_t index) override;
  void on_end(peer::RequestId id, peer::Outcome outcome) override;
  bool read(std::vector<cluster::Change>& out) override;
  void tell(const events::Change& change, std::vector<cluster::Change>& out);

  const ClusterOptions options_;
  const net::TlsContext tls_;
  const net::Secret::Key key_secret_;
  const cluster::Incarnation incarnation_;
  const memory::HostRegion& region_;
  const std::span<std::byte> pool_;  // its bytes
  SourceSink& sink_;
  const Apply apply_;
  const std::function<void(cluster::Epoch)> reset_;
  const std::function<void(std::optional<cluster::Epoch>)> current_;

  // Guarded by the node's lock, once started.
  std::map<node::SpaceName, cluster::SpaceIndex> indexes_;
  std::map<node::SpaceNumber, Told> told_;
  std::optional<RemoteReads> reads_;
  std::map<node::LoanId, Lending> lending_;
  node::LoanId last_loan_ = 0;
  bool resetting_ = false;  // by this node's wish
  bool closing_ = false;

  // The directory's thread.
  events::Subscription subscription_;
  std::vector<events::Change> changes_;  // scratch

  std::string one_sided_trouble_;  // why there is none
  std::unique_ptr<peer::OneSided> one_sided_;
  std::unique_ptr<peer::PeerLane> peers_;
  std::unique_ptr<cluster::DirectoryLane> directory_;
};

}  // namespace flexkv::server
