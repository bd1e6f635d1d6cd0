// One node's part in the directory of a cluster: it tells the others what changes in its index, and keeps a replica of
// theirs. Decides what to ask of the store next; docs/decisions/0019 describes the protocol.
//
// Pure logic: a driver (DirectoryLane, or a simulation) brings time, changes and answers, and carries requests out on
// two connections, one request at a time on each: "orders", which are answered at once, and "reads", which wait in the
// store for news. Thread-compatible; only the replica is shared with other threads.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/cluster/follower.h"
#include "flexkv/cluster/names.h"
#include "flexkv/cluster/publisher.h"
#include "flexkv/cluster/replica.h"
#include "flexkv/cluster/types.h"
#include "flexkv/meta/request.h"

namespace flexkv::cluster {

struct DirectoryOptions {
  std::string cluster = "default";
  std::string name;                   // of the node, for people; at most kNameMax bytes
  std::string address;                // where others reach it; at most kAddressMax bytes
  Incarnation incarnation = 0;        // random, never 0
  Epoch epoch;                        // of the cluster, as what the node holds from earlier runs belongs to
  Nanos time_to_live = 30 * kSecond;  // after its last heartbeat nobody believes in a node's blocks; beats thrice
  // Something outlives all nodes in which blocks are found by the epoch's reset alone: there is to be one. A node that
  // knows of none, and finds none in the store, resets the cluster.
  bool needs_reset = false;
  PublisherLimits limits;
};

struct DirectoryStats {
  std::uint64_t epoch = 0;
  bool joined = false;             // the store has heard of this node
  bool left = false;               // it was told that this node gives nothing any more, or could not be when it ended
  std::uint64_t peers = 0;         // nodes whose heartbeat was heard lately
  std::uint64_t stuck = 0;         // spaces of theirs that cannot be followed for the moment
  std::uint64_t loading = 0;       // and that are being loaded from a snapshot
  std::uint64_t same_name = 0;     // of the peers, those that live and have this node's name
  std::uint64_t blocks_told = 0;   // of this node
  std::uint64_t batches = 0;       // in its streams, since it joined or the epoch began
  std::uint64_t stream_bytes = 0;  // sent, since the start
  std::uint64_t snapshot_bytes = 0;
  FollowerStats followed;
  std::vector<ResetId> told_resets;  // asked for here, and the store has heard of them, or of later ones: the latest
};

// Another node whose heartbeat was heard lately.
struct PeerInfo {
  Incarnation node = 0;
  std::string name;
  std::string address;
  Nanos silent = 0;  // since the heartbeat was last seen to change
  Condition condition = Condition::kServes;
};

class Directory {
 public:
  static constexpr std::size_t kNodesMax = 1024;  // more are left out

  // REQUIRES: options within their bounds; `replica` outlives it
  Directory(const DirectoryOptions& options, Replica& replica);

  // A model that this node serves: it tells of its blocks, and follows those of others. nullopt: there are too many.
  std::optional<SpaceIndex> add_space(const SpaceId& id, Nanos now);
  void apply(const Change& change, Nanos now);
  // Of resets that come from outside the cluster, this node knows those that this number stands for, and has forgotten
  // what is older. Blocks of nodes that know of others are not found. 0, as at the start: it hears of none.
  void know_resets(std::uint64_t resets, Nanos now);

  // The next request for each connection, if there is one now. REQUIRES: the one before has been answered
  std::optional<meta::Request> next_order(Nanos now);
  void order_done(const Result<meta::Answers>& answers, Nanos now);
  std::optional<meta::Request> next_read(Nanos now);
  void read_done(const Result<meta::Answers>& answers, Nanos now);
  // When next_order() will have one, if nothing else happens.
  Nanos order_due(Nanos now) const;
  // When next_read() will have one that it does not have now because it came just before.
  Nanos read_due(Nanos now) const;
  // Forgets nodes that were not heard of. To be called now and then.
  void expire(Nanos now);

  // The cluster has been reset: nothing of this node's cache may be found any more. Until enter_epoch(), to be called
  // once that is so and apply() knows it, nothing is asked of the store.
  std::optional<Epoch> epoch_to_enter() const { return epoch_to_enter_; }
  void enter_epoch(Nanos now);
  // The epoch that this node is in, if it began with a reset, no other one is wanted, and the store has said for as
  // long as there is between two looks of a node, 10 s at least, that it is the cluster's: who knows better, because
  // the store came back older than it was, has had the time to say so. While the store is away, what it said last
  // counts.
  std::optional<Epoch> current_epoch() const;
  // Resets the cluster, this node included.
  void reset_cluster(ResetId reset, Nanos now);

  // Tells the others from the next heartbeat on. Who drains or is drained shows no blocks, and lives on in the cluster.
  // REQUIRES: not kEnds
  void say(Condition condition, Nanos now);
  // Tells the others that this node ends; once left() nothing more is asked of the store.
  void leave(Nanos now);
  bool left() const { return left_; }

  DirectoryStats stats() const;
  std::vector<PeerInfo> peers(Nanos now) const;

 private:
  enum class Order : std::uint8_t { kNone, kLook, kBeat, kPublish, kSnapshot, kLeave };
  struct Space {
    SpaceId id{};
    Publisher publisher;
    bool asked = false;  // there is a key to be removed
  };
  struct Peer {
    Beat beat;
    Nanos heard = 0;          // when its heartbeat was seen to change
    bool seen_alive = false;  // more than once
    std::map<SpaceIndex, Follower> followers;
  };
  struct Target {  // of a read
    Incarnation node;
    SpaceIndex space;
    std::uint64_t known;  // before it
    std::uint64_t promised;
  };

  Nanos beat_gap() const { return options_.time_to_live / 3; }
  void want_round(Nanos now);
  bool reset_wanted() const { return !wanted_resets_.empty(); }
  void want_reset(ResetId reset);
  void note_resets_told();
  bool round_is_near(Nanos now) const;
  Publisher::Places places(const SpaceId& id) const;

  meta::Request look_request() const;
  void look_done(const meta::Answers& answers, Nanos now);
  void note_epoch(const meta::Answers& answers);
  void want_own_reset();
  void add_epoch(meta::Request& request) const;
  void add_reset(meta::Request& request) const;
  meta::Request beat_request(Nanos now);
  void beat_done(const meta::Answers& answers, Nanos now);
  std::string own_beat();
  void hear(Incarnation node, const meta::Answer& answer, Nanos now);
  bool trusts(const Peer& peer) const;
  void follow_spaces(Incarnation node, Peer& peer, Nanos now);
  void entries_done(const std::vector<meta::Entry>& entries, Nanos now);
  Follower* find(const Target& target);

  const DirectoryOptions options_;
  Replica& replica_;
  Names names_;
  std::vector<Space> spaces_;
  std::map<Incarnation, Peer> peers_;
  // Of nodes that fell silent, the heartbeat that was their last: a store whose clock was set back keeps it for long.
  std::map<Incarnation, std::uint64_t> forgotten_;
  FollowerStats followed_;

  Epoch epoch_;
  std::optional<Epoch> epoch_to_enter_;
  bool joined_ = false;
  std::uint64_t resets_known_ = 0;
  Condition condition_ = Condition::kServes;
  Condition beat_says_ = Condition::kServes;  // of the heartbeat under way
  Condition told_ = Condition::kServes;       // the store has heard it
  bool leaving_ = false;
  bool left_ = false;
  std::uint64_t resets_asked_ = 0;      // ever
  ResetId reset_asked_ = 0;             // the latest one of them
  ResetId reset_looked_for_ = 0;        // the latest one when the look or the farewell under way was made
  std::vector<ResetId> wanted_resets_;  // those that are not done: the latest one will do for all
  std::vector<ResetId> told_resets_;    // the latest ones that are
  bool current_ = false;                // this epoch was the store's when it was last asked, and some time before
  std::optional<Nanos> seen_since_;     // as the store's

  // Orders. A round is a look at epoch, members and asks, then a heartbeat beside a look at those of others.
  Order order_ = Order::kNone;
  SpaceIndex order_space_ = 0;
  bool looked_ = false;  // the second half of the round is due
  bool ring_ = true;     // wake the others up with the next heartbeat
  Nanos round_due_ = 0;
  Nanos round_begun_;
  std::uint64_t beat_number_ = 0;
  Epoch store_epoch_;                   // as the round saw it
  std::vector<Incarnation> listening_;  // whose heartbeats the round asks for
  std::vector<Incarnation> members_;    // as the round saw them
  std::vector<Incarnation> departed_;   // members without a heartbeat

  // Reads
  bool reading_ = false;
  bool read_loads_ = false;  // the read under way is of a snapshot
  Epoch read_epoch_;
  std::uint64_t read_count_ = 0;
  Nanos read_after_ = 0;  // not before
  std::vector<Target> read_targets_;
  std::string bell_after_ = meta::kNoEntry;
};

}  // namespace flexkv::cluster
