// Which peer a node reads blocks from, and what becomes of it: chooses by what the replica of the directory knows,
// spreads reads over peers that have the same, and goes on at another one when a peer does not deliver, or no more.
//
// Pure logic, guarded by the node's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/cluster/replica.h"
#include "flexkv/node/remote_port.h"
#include "flexkv/peer/types.h"
#include "flexkv/server/read_choice.h"
#include "flexkv/server/read_source.h"

namespace flexkv::server {

// So long a peer in which blocks were found is asked for them though it has drained or ended since: it lends on for as
// long when it drains.
constexpr Nanos kPromise = 2 * kSecond;

// What a reader is told of a loan that ended for this reason.
peer::Outcome to_peer(node::Loan::Limit limit);

class RemoteReads {
 public:
  // What the lane of peers does; returns at once.
  struct Peers {
    std::function<void(peer::ReadRequest)> read;
    std::function<void(peer::RequestId)> cancel;
    std::function<void(peer::RequestId)> give_up;  // as PeerLane's
  };

  // `replica` outlives this. `pool`: where the blocks go. `own`: this node's incarnation, by which nodes that read the
  // same choose differently.
  RemoteReads(const cluster::Replica& replica, std::span<std::byte> pool, cluster::Incarnation own, Peers peers)
      : replica_(replica), pool_(pool), own_(own), peers_(std::move(peers)) {}

  void open_space(node::SpaceNumber number, cluster::SpaceIndex index, const node::SpaceName& name,
                  std::uint64_t slot_bytes) {
    spaces_[number] = {index, name, slot_bytes};
  }
  void close_space(node::SpaceNumber number) { spaces_.erase(number); }

  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now);
  // False: nobody has the first block any more, and nothing was begun.
  bool read(node::RemoteRead read, Nanos now);
  void cancel(node::RemoteOp op);

  // What a peer delivered, or said last, and what the node is to be told of it; nullopt: nothing.
  struct Arrived {
    node::RemoteOp op = 0;
    std::uint32_t index = 0;
  };
  std::optional<Arrived> on_block(peer::RequestId request, Nanos now);
  struct Ended {
    node::RemoteOp op = 0;
    node::RemoteOutcome outcome = node::RemoteOutcome::kDone;
  };
  // `may_go_on`: at another peer.
  std::optional<Ended> on_end(peer::RequestId request, peer::Outcome outcome, bool may_go_on, Nanos now);

  // When to call on_time next; it gives up what has stopped.
  std::optional<Nanos> next_time() const { return watch_.next(); }
  void on_time(Nanos now);

  std::size_t reading() const { return reads_.size(); }
  std::uint64_t given_up() const { return given_up_; }  // reads at a peer that had stopped, so far
  // Bytes on their way from the peer, and how fast they came so far (0: not known).
  struct Flow {
    std::uint64_t waiting_bytes = 0;
    double bytes_per_second = 0;
    bool resting = false;
  };
  Flow flow(cluster::Incarnation peer, Nanos now) const;

 private:
  struct Space {
    cluster::SpaceIndex index = 0;
    node::SpaceName name{};
    std::uint64_t slot_bytes = 0;
  };
  struct Peer {
    ReadSource source;
    Nanos promised_until = 0;  // since blocks were last found there
  };
  struct Source {
    cluster::Incarnation node = 0;
    std::string address;
    std::uint32_t blocks = 0;  // at most
    Tier tier{};
  };
  struct Read {
    node::RemoteRead asked;
    Space space;
    cluster::Incarnation from = 0;
    ReadSource::Read there;                   // the request under way
    std::uint32_t done = 0;                   // blocks that came
    std::vector<cluster::Incarnation> tried;  // not asked again
    bool canceled = false;

    std::uint32_t wanted() const { return static_cast<std::uint32_t>(asked.host_offsets.size()); }
  };

  struct Choice : ReadChoice {  // of places in holdings_
    bool known = false;         // how long it takes
  };
  std::optional<Choice> choose(const Space& space, std::span<const key::BlockKey> keys,
                               std::span<const cluster::Incarnation> tried, double block_nanos, Nanos now);
  std::optional<Source> source(const Read& read, std::span<const key::BlockKey> keys, Nanos now);
  bool begin(Read&& read, Nanos now);
  Peer& peer(cluster::Incarnation node, Nanos now);
  void settle(Read& read, peer::Outcome outcome, Nanos now);
  void watch(peer::RequestId request, const Read& read, Nanos now);

  const cluster::Replica& replica_;
  const std::span<std::byte> pool_;
  const cluster::Incarnation own_;
  const Peers peers_;
  std::unordered_map<node::SpaceNumber, Space> spaces_;
  std::unordered_map<peer::RequestId, Read> reads_;
  std::unordered_map<node::RemoteOp, peer::RequestId> requests_;
  std::unordered_map<cluster::Incarnation, Peer> known_;  // that were asked
  const ReadSource unknown_;                              // as whoever was never asked
  TierCosts costs_;                                       // of all together
  ReadWatch watch_;                                       // of reads_
  std::uint64_t given_up_ = 0;
  std::vector<cluster::Replica::Holding> holdings_;  // scratch,
  std::vector<ReadPlace> places_;                    // the same ones
  std::uint64_t choices_ = 0;                        // made so far
  peer::RequestId next_request_ = 1;
};

}  // namespace flexkv::server
