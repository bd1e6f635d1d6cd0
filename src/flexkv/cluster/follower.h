// How far this node has followed the stream of another one's space. Decides what to read next and when the stream has a
// gap, and writes what it reads to the replica. A gap means a snapshot; when that does not help, or is not there, the
// other node is asked for a new one. Pure logic, thread-compatible.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "flexkv/base/time.h"
#include "flexkv/cluster/replica.h"
#include "flexkv/cluster/types.h"
#include "flexkv/meta/request.h"

namespace flexkv::cluster {

struct FollowerStats {
  std::uint64_t batches = 0;
  std::uint64_t residencies = 0;
  std::uint64_t snapshots = 0;  // loaded to the end
  std::uint64_t gaps = 0;       // the stream, or a snapshot, did not go on where it should
  std::uint64_t refused = 0;    // entries that could not be decoded
  std::string last_refusal;
};

class Follower {
 public:
  // `stream` and `snapshot` (to which the generation is added) are names in the store. The rest outlives it.
  Follower(Incarnation node, SpaceIndex space, std::string stream, std::string snapshot, Replica& replica,
           FollowerStats& stats)
      : node_(node),
        space_(space),
        stream_(std::move(stream)),
        snapshot_(std::move(snapshot)),
        replica_(replica),
        stats_(stats) {}

  // What the node's newest heartbeat says of the space.
  void told(const Beat::Space& space, Nanos now);

  bool loading() const { return state_ == State::kLoading; }
  // REQUIRES: loading()
  meta::Request load_request() const;
  void loaded(std::span<const meta::Answer> answers, Nanos now);

  bool following() const { return state_ == State::kFollowing; }
  std::uint64_t known() const { return known_; }  // the newest batch that has been applied
  meta::Position position() const { return {stream_, meta::entry_id(known_)}; }
  // The batches that a read which begins now must find.
  std::uint64_t promised() const { return told_.head; }
  // `entries` came behind position(); `all`: the stream has no more. `promised`: as it was when the read began.
  void read(std::span<const meta::Entry> entries, bool all, std::uint64_t promised, Nanos now);

  // Only a snapshot newer than generation() can help.
  bool stuck() const { return state_ == State::kStuck; }
  std::uint64_t generation() const { return tried_; }

 private:
  enum class State : std::uint8_t { kNew, kLoading, kFollowing, kStuck };
  void begin(Nanos now);
  void gap(Nanos now);
  void apply(std::span<const Residency> residencies);
  void refuse(const Error& error, Nanos now);
  std::string snapshot_place() const { return snapshot_ + std::to_string(tried_); }

  const Incarnation node_;
  const SpaceIndex space_;
  const std::string stream_;
  const std::string snapshot_;
  Replica& replica_;
  FollowerStats& stats_;
  State state_ = State::kNew;
  Beat::Space told_;
  std::uint64_t known_ = 0;
  std::uint64_t tried_ = 0;  // the snapshot from which it began; 0: the beginning of the stream
  Beat::Space loading_;
  std::uint64_t part_ = 0;
  bool left_out_ = false;  // the replica had no room for something
  Nanos begun_ = 0;
};

}  // namespace flexkv::cluster
