// The directory's thread: brings Directory together with Redis and with the changes of this node's index. It sleeps
// while there is nothing to do, and whatever happens to Redis, only it waits.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/mutex.h"
#include "flexkv/cluster/directory.h"
#include "flexkv/meta/redis_channel.h"

namespace flexkv::cluster {

// Where the changes of the node's index come from.
class ChangeSource {
 public:
  virtual ~ChangeSource() = default;
  // Appends the next changes, at most some thousand; true: there are more. After false the source calls
  // DirectoryLane::wake() at the next change. Called on the lane's thread, without a lock.
  virtual bool read(std::vector<Change>& out) = 0;
};

struct DirectoryLaneOptions {
  DirectoryOptions directory;
  meta::RedisOptions redis;
  std::uint64_t replica_blocks_max = 100'000'000;  // of all other nodes together
};

struct DirectoryLaneStatus {
  DirectoryStats directory;
  Replica::Stats replica;
  std::vector<PeerInfo> peers;
  std::string trouble;  // with Redis; empty: there is none
};

class DirectoryLane {
 public:
  // `reset` is called on the lane's thread when the cluster has been reset: once it has returned, the source must give
  // nothing of before. It may take its time. `current`, on the same thread: from now on, until `reset` or the next
  // call, this is known to be the cluster's epoch, which began with a reset; none: it is not known. Fails when there
  // are no threads or descriptors left. REQUIRES: `source` outlives the lane
  static Result<std::unique_ptr<DirectoryLane>> start(const DirectoryLaneOptions& options, ChangeSource& source,
                                                      std::function<void(Epoch epoch)> reset,
                                                      std::function<void(std::optional<Epoch>)> current);
  // Without a farewell, if stop() was not called.
  ~DirectoryLane();
  DirectoryLane(const DirectoryLane&) = delete;
  DirectoryLane& operator=(const DirectoryLane&) = delete;

  // The rest may be called by any thread, and waits for nothing that the lane does, but for stop().

  // See Directory::add_space. To be called before the source gives changes of it.
  std::optional<SpaceIndex> add_space(const SpaceId& id);
  void know_resets(std::uint64_t resets);  // see Directory
  // False: the replica may still have blocks of nodes that do not know these resets.
  bool knows_resets() const;
  void wake();
  const Replica& replica() const { return replica_; }
  void reset_cluster(ResetId reset);
  // A reset was ordered of which the lane does not know yet.
  bool reset_ordered() const;
  DirectoryLaneStatus status() const;  // as it was when the lane last went to sleep
  void say(Condition condition);       // see Directory; DirectoryStats::left tells when others can have heard it
  // Tells the others that this node ends, as far as that is possible within `patience`, and ends the thread.
  void stop(Nanos patience);

 private:
  DirectoryLane(const DirectoryLaneOptions& options, ChangeSource& source, std::function<void(Epoch epoch)> reset,
                std::function<void(std::optional<Epoch>)> current, Fd wakeup);
  void run();
  bool read_source();
  void enter_new_epoch();
  void tell_current();
  void serve_orders(Nanos now);
  void serve_reads(Nanos now);
  void sleep(bool more) const;
  void report(Nanos now);
  void order(std::function<void(Nanos now)> wish);
  void grant_wishes();

  ChangeSource& source_;
  const std::function<void(Epoch)> reset_;
  const std::function<void(std::optional<Epoch>)> current_;
  const Fd wakeup_;  // an eventfd
  Replica replica_;
  // The lane's
  Directory directory_;
  meta::RedisChannel orders_;
  meta::RedisChannel reads_;
  std::vector<Change> changes_;
  std::optional<Epoch> told_current_;
  std::string reported_trouble_;
  Nanos quiet_until_ = 0;
  bool reported_same_name_ = false;
  bool reported_refused_ = false;

  // Not held while tables are written anew, which takes up to half a second for ten million blocks.
  mutable Mutex mutex_;
  std::vector<std::function<void(Nanos now)>> wishes_ FLEXKV_GUARDED_BY(mutex_);  // for the directory
  SpaceIndex space_count_ FLEXKV_GUARDED_BY(mutex_) = 0;
  std::size_t resets_unknown_ FLEXKV_GUARDED_BY(mutex_) = 0;  // of the wishes
  std::size_t resets_ordered_ FLEXKV_GUARDED_BY(mutex_) = 0;  // of the wishes
  DirectoryLaneStatus status_ FLEXKV_GUARDED_BY(mutex_);
  std::optional<Nanos> stop_by_ FLEXKV_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace flexkv::cluster
