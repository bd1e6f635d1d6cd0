// A node's part in the remote tier: what is kept beyond its machine, read and written, in the terms of each.
//
// As a RemotePort and a StorePort it is called under the node's lock. What the tier says reaches the node through
// `Apply`, on the tier's thread. Owns the tier.
//
// A reset, of whichever node, begins an epoch: it leaves a mark in the store, and the marks that a node knows are part
// of the name of each space, so what was stored before is not found by who knows of the reset, nor what came after by
// who does not. Who learns of a reset forgets what it has, too.
//
// In a store that may lose marks none are left: there the cluster's epoch is part of the names, and as long as it is
// not known nothing is found or written (docs/decisions/0036).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "flexkv/base/result.h"
#include "flexkv/cluster/types.h"
#include "flexkv/net/secret.h"
#include "flexkv/node/node.h"
#include "flexkv/remote/location.h"
#include "flexkv/remote/remote_tier.h"
#include "flexkv/server/beyond.h"
#include "flexkv/server/read_source.h"
#include "flexkv/server/resets_seen.h"

namespace flexkv::server {

struct RemoteOptions {
  std::string url;                   // file:///DIRECTORY, s3://BUCKET/PREFIX or mooncake://HOST:PORT/PREFIX
  remote::S3Options s3;              // for s3://
  remote::MooncakeOptions mooncake;  // for mooncake://
  // Who share a store share their blocks if they have these alike: keys are derived from them.
  std::string cluster = "default";
  std::string secret_file;  // of the cluster, see net::Secret; empty: none, who can read the store knows all there is
  remote::TierOptions tier;
};

class RemoteBridge final : public node::RemotePort, public node::StorePort, private remote::RemoteSink {
 public:
  // Runs a call on the node under its lock.
  using Apply = std::function<void(const std::function<void(node::Node&)>& call)>;
  using Forgotten = std::function<void(const std::set<remote::Mark>& marks)>;

  // Fails for a wrong URL, without libcurl (s3://) and for a secret that is not to be had; asks nothing of the store.
  // `pool`: where the blocks lie; stays mapped until close(). `reads` is told of what comes. `forgotten`: the node has
  // forgotten all of before these marks; under the node's lock.
  static Result<std::unique_ptr<RemoteBridge>> create(const RemoteOptions& options, std::span<std::byte> pool,
                                                      SourceSink& reads, Apply apply, Forgotten forgotten);
  ~RemoteBridge() override;

  // Of the keys of blocks, the same at all nodes that share the store.
  const net::Secret::Key& key_secret() const { return key_secret_; }
  // Otherwise it needs know_epoch().
  bool keeps_marks() const { return keeps_marks_; }
  // apply is not called before that. `held_marks`: see hash_of_marks(), as the node knew them that kept what this one
  // has on drives; none: it has nothing. REQUIRES: the node knows no space yet
  void start(const std::optional<key::Root>& held_marks);
  // Ends all that is under way; then apply is not called any more.
  void close();
  // The cluster was reset, and the node is. All its nodes say so, and leave the mark that who asked for it has left: so
  // it is one reset for all who share the store. One that comes late, too: should no node with this store have heard of
  // it, what is stored is older. Under the node's lock.
  void enter_epoch(const cluster::Epoch& epoch);
  // The cluster's epoch, in which the node is and which began with a reset; none: it is not known. Under the node's
  // lock.
  void know_epoch(const std::optional<cluster::Epoch>& epoch);

  struct Status {
    std::string url;
    remote::RemoteStats tier;
    std::uint64_t waiting_bytes = 0;  // to be read
    double bytes_per_second = 0;      // of reads, so far; 0: not known
    bool resting = false;             // it is not asked for a while, because a read stopped
    std::uint64_t given_up = 0;       // reads that stopped
    std::size_t reading = 0;          // requests under way
    std::size_t writing = 0;
    telemetry::Histogram read_latency;  // of a block, since it was asked for
  };
  // Under the node's lock.
  Status status() const;

  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now) override;
  void read(node::RemoteRead read) override;
  // Until the store has heard of it, whoever starts anew finds what was there before.
  void reset(node::ResetId reset) override;
  void cancel(node::RemoteOp op) override;
  std::optional<Nanos> next_time() const override { return closing_ ? std::nullopt : watch_.next(); }
  void on_time(Nanos now) override;

  std::uint32_t write_blocks(node::SpaceNumber space) const override;
  bool has(node::SpaceNumber space, const key::BlockKey& key) const override;
  void write(node::StoreWrite write) override;

 private:
  struct Space {
    node::SpaceName name{};
    std::uint64_t slot_bytes = 0;
    remote::SpaceName there{};  // what it is called in the store, in this epoch
  };
  struct Reading {
    node::RemoteOp op = 0;
    ReadSource::Read there;
    Nanos deadline = 0;
  };

  RemoteBridge(const RemoteOptions& options, std::unique_ptr<remote::Store> store, const net::Secret::Key& key_secret,
               std::span<std::byte> pool, SourceSink& reads, Apply apply, Forgotten forgotten);

  void on_block(remote::RequestId id, std::uint32_t index) override;
  void on_end(remote::RequestId id, remote::Outcome outcome) override;
  void on_written(remote::RequestId id, remote::Outcome outcome) override;
  void on_marks(const std::set<remote::Mark>& marks) override;
  void on_no_marks() override;

  bool serves() const { return !closing_ && tier_ != nullptr && listed_; }
  void watch(remote::RequestId id, const Reading& reading, Nanos now);
  void add_mark(const remote::Mark& mark);
  void drop_early();
  void leave_epoch();
  void end_write(node::RemoteOp op, node::RemoteOutcome outcome);
  void open(Space& space);
  void reopen();
  void check_and_write(const node::StoreWrite& write, const remote::SpaceName& there);
  void begin_write(const node::StoreWrite& write, const remote::SpaceName& there);

  const RemoteOptions options_;
  const net::Secret::Key key_secret_;
  const std::span<std::byte> pool_;
  SourceSink& reads_;
  const Apply apply_;
  const Forgotten forgotten_;
  std::unique_ptr<remote::Store> store_;  // until start()
  const bool keeps_marks_;

  // Guarded by the node's lock, once started.
  std::map<node::SpaceNumber, Space> spaces_;
  std::map<remote::RequestId, Reading> readings_;
  std::map<node::RemoteOp, remote::RequestId> requests_;  // of readings_
  std::map<remote::RequestId, node::RemoteOp> writings_;
  remote::RequestId next_request_ = 1;
  std::set<remote::Mark> marks_;         // if the store keeps none: one, of the epoch
  std::optional<key::Root> held_marks_;  // of start()
  bool listed_ = false;                  // the marks in the store, or the epoch, are known
  bool unlisted_ = false;                // and could not be listed so far
  std::vector<node::StoreWrite> early_;  // wait for that
  bool closing_ = false;
  ReadSource source_;
  TierCosts costs_;
  ReadWatch watch_;  // of readings_
  std::uint64_t given_up_ = 0;
  telemetry::Histogram read_latency_;

  std::unique_ptr<remote::RemoteTier> tier_;
};

}  // namespace flexkv::server
