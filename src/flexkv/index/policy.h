// Which blocks of a tier go first. A policy orders SEGMENTS: consecutive blocks of one run that share one history, from
// the end of which blocks are taken. It knows nothing of trees. The index in turn knows no policy: it asks for a
// victim, and when that may not go yet (it is pinned, or other blocks of the tier stand behind it) it sets it aside
// until it may. That makes every policy take leaves first, at O(1) a block: a segment is set aside at most once per
// event that brings it back. Thread-compatible. A policy links segments that the index owns.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "flexkv/base/time.h"
#include "flexkv/index/slab.h"

namespace flexkv::index {

struct Segment {
  Nanos used = 0;               // by the policy: when last used
  std::uint32_t run = kNone;    // by the index, like the next three
  std::uint32_t below = kNone;  // the next segment of this run and tier towards the root
  std::uint32_t end = 0;        // behind its last block in the run (one that has a slot); it starts at below's end
  std::uint32_t count = 0;      // blocks that have a slot
  std::uint32_t older = kNone;  // by the policy, to the end
  std::uint32_t newer = kNone;
  std::uint8_t list = 0;
  std::uint8_t uses = 0;  // counted as far as the policy distinguishes them
  bool listed = false;    // false: set aside
};

enum class PolicyKind : std::uint8_t {
  kAdaptive,   // LRU in which every use of a block, up to 4, is worth one eviction age (see policy.cc); the default
  kLru,        // least recently used
  kHitReward,  // LRU by last use + PolicyOptions::hit_reward per use, up to 15 uses
  kLfu,        // least often used (counted up to 63), LRU among equals
  kSlru,       // blocks used less than PolicyOptions::protected_after times first; LRU within both parts
  kFifo,       // oldest first
  kFilo,       // youngest first
  kMru,        // most recently used first
  kS3Fifo,     // S3-FIFO (Yang et al., SOSP 2023)
};

struct PolicyOptions {
  PolicyKind kind = PolicyKind::kAdaptive;
  unsigned protected_after = 2;     // kSlru; 1..63
  Nanos hit_reward = 60 * kSecond;  // kHitReward
};

class Policy {
 public:
  virtual ~Policy() = default;
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // Takes a segment of new blocks. `remembered`: 0, or 1 + the uses that these blocks had when they last left.
  virtual void insert(std::uint32_t id, unsigned remembered, Nanos now) = 0;
  // All blocks of the segment were used: by a lookup (`hit`), or by blocks that came in behind them. Along a path the
  // deepest segment is touched first, so that ancestors end up on the safer side.
  virtual void touch(std::uint32_t id, bool hit, Nanos now) = 0;
  // The segment to take blocks from, which stays listed; kNone if all are set aside.
  virtual std::uint32_t victim(Nanos now) = 0;
  // Whether touch() and the `remembered` of insert() mean anything: if not, the index saves the work.
  virtual bool heeds_touch() const { return true; }
  virtual bool heeds_memory() const { return false; }

  // Takes a segment out: for good, or until restore().
  void remove(std::uint32_t id) {
    if (segments_[id].listed) unlink(id);
  }
  // Back from being set aside, to where it was: the victims' end of its list.
  void restore(std::uint32_t id) { link(id, segments_[id].list, !newest_first_); }
  // `part` has been cut off `id` and has its history: it goes next to it, on the safer side.
  void split(std::uint32_t part, std::uint32_t id);
  // Whether two segments can be one without changing any order.
  bool mergeable(std::uint32_t a, std::uint32_t b) const;
  // A segment has grown or shrunk, or a merge has moved blocks between two.
  void resize(std::uint32_t id, std::int64_t blocks) {
    if (segments_[id].listed) lists_[segments_[id].list].blocks += blocks;
  }
  // Forgets all segments.
  void clear() { lists_ = {}, nonempty_ = 0; }

 protected:
  static constexpr unsigned kListCountMax = 64;
  struct List {
    std::uint32_t oldest = kNone;
    std::uint32_t newest = kNone;
    std::int64_t blocks = 0;
  };

  // `newest_first`: victims are taken from the newest end of a list.
  Policy(Slab<Segment>& segments, bool newest_first) : segments_(segments), newest_first_(newest_first) {}

  void link(std::uint32_t id, unsigned list, bool as_oldest);
  void unlink(std::uint32_t id);
  void move_to_newest(std::uint32_t id, unsigned list) {
    remove(id);
    link(id, list, false);
  }
  std::uint32_t first(unsigned list) const { return newest_first_ ? lists_[list].newest : lists_[list].oldest; }

  Slab<Segment>& segments_;
  const bool newest_first_;
  std::array<List, kListCountMax> lists_{};
  std::uint64_t nonempty_ = 0;  // a bit per list
};

// REQUIRES: `segments` outlives the policy
std::unique_ptr<Policy> make_policy(const PolicyOptions& options, Slab<Segment>& segments);

}  // namespace flexkv::index
