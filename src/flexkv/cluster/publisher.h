// What this node has told the cluster about one space, and what it has still to tell. Takes the changes of the index,
// gives out batches for the stream and, when the stream since the last snapshot has become larger than a snapshot, the
// parts of a new one. So all that is written is at most about twice the changes, whatever the number of blocks.
//
// Pure logic. Thread-compatible. 16 to 24 bytes for each of the node's blocks, and a bounded queue of changes.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/cluster/types.h"
#include "flexkv/meta/request.h"

namespace flexkv::cluster {

struct PublisherLimits {
  Nanos publish_after = 100 * kMillisecond;      // the first of some changes waits so long, and others join it
  std::size_t batch_max = 4096;                  // residencies in a batch, at most kBatchMax
  std::size_t part_max = 65'536;                 // and in a part of a snapshot, at most kPartMax
  std::uint64_t snapshot_bytes_min = 256 << 10;  // a stream that is shorter is read faster than any snapshot
};

class Publisher {
 public:
  struct Places {  // names of keys in the store
    std::string stream;
    std::string snapshot;  // without the generation at its end
  };

  static constexpr Nanos kAskGap = 2 * kSecond;

  explicit Publisher(const PublisherLimits& limits) : limits_(limits) {}

  void apply(const Change& change, Nanos now);

  // Begins anew under other names: all that the node has is to be told again.
  void move_to(Places places, Nanos now);

  // When publish_request() has something to say.
  Nanos due(Nanos now) const;
  // Appends batches to the stream: those whose fate is unknown again, else new ones. REQUIRES: due(now) <= now
  meta::Request publish_request(Nanos now, Nanos ttl);
  void published();

  // Someone cannot follow from the snapshot of this generation on. Heeded at most once every kAskGap.
  void ask(std::uint64_t generation, Nanos now);
  bool snapshot_due() const;
  // The next part of a snapshot; begins one if none is under way. REQUIRES: snapshot_due()
  meta::Request snapshot_request(Nanos ttl);
  // True: that was the last part. Then the snapshot is part of description().
  bool part_written();
  // Whether the last snapshot was asked for.
  bool was_asked() const { return was_asked_; }

  // As the heartbeat tells it, without the id.
  Beat::Space description() const { return announced_; }
  // What keeps this node's keys alive.
  void touch(Nanos ttl, meta::Request& out) const;

  std::uint64_t block_count() const { return told_count_; }
  std::uint64_t batch_count() const { return acknowledged_; }
  std::uint64_t stream_bytes() const { return all_bytes_[0]; }
  std::uint64_t snapshot_bytes() const { return all_bytes_[1]; }

 private:
  // Of a block, in one byte: the tiers as told to the cluster, and those where it is.
  static Tiers told(std::uint8_t value) { return value >> kTierCount; }
  static Tiers is(std::uint8_t value) { return value & ((1U << kTierCount) - 1); }
  static std::uint8_t value_of(Tiers told, Tiers is) { return static_cast<std::uint8_t>(told << kTierCount | is); }

  void change(Tag tag, Before before, Tiers set, Tiers taken, Nanos now);
  void store(Tag tag, std::uint8_t value, Before before);
  // In chunks as long as rows.
  void rewrite();
  void forget_where_blocks_are(Nanos now);
  // Makes the queue what the blocks say.
  void queue_all(Nanos now);
  void cut_batches();
  void make_part(const std::string& place);
  std::string snapshot_place(std::uint64_t generation) const { return places_.snapshot + std::to_string(generation); }

  const PublisherLimits limits_;
  Places places_;
  ResidencyTable<std::uint8_t> blocks_;
  std::uint64_t table_number_ = 0;  // another one whenever blocks have moved in it
  std::uint64_t told_count_ = 0;    // blocks with told() != 0
  struct Queued {
    Tag tag;
    Before before;
  };
  std::deque<Queued> queue_;  // holds every block of which told() is not is(), maybe twice, and others
  Nanos waiting_since_ = 0;   // the queue
  bool clear_ = false;        // the next batch begins with "all is gone"

  struct Sent {
    std::uint64_t number;
    std::string bytes;
  };
  std::deque<Sent> unacknowledged_;  // as they are, until the store has them
  std::uint64_t cut_ = 0;            // the newest batch made
  std::uint64_t acknowledged_ = 0;
  std::uint64_t bytes_since_base_ = 0;  // of the stream, behind the base of the newest snapshot, done or not
  std::uint64_t all_bytes_[2] = {};     // stream, snapshots

  struct Building {
    std::uint64_t base = 0;
    std::uint64_t generation = 0;
    std::uint64_t table_number = 0;
    std::uint64_t part = 0;
    std::size_t next = 0;  // the first place behind the parts made
    std::size_t end = 0;   // what lies from here on came later, so it is in the stream behind the base
    std::string bytes;     // of the part under way, empty: none is
    bool last = false;     // that is the last one
  };
  std::optional<Building> building_;
  Beat::Space announced_;
  std::uint64_t generation_ = 0;  // the newest one begun
  std::uint64_t kept_from_ = 0;   // the stream has been trimmed up to this batch
  std::uint64_t trim_to_ = 0;
  bool asked_ = false;
  bool was_asked_ = false;
  Nanos deaf_until_ = 0;
};

}  // namespace flexkv::cluster
