// What the other nodes have, as far as is known here: one table for each space, from a block to the set of nodes that
// have it. So a prompt is searched for once, whoever has it, and what lies in a row is read in a row
// (docs/decisions/0034, 0038). Lookups never leave the process.
//
// One thread writes, any number look up; a mutex is held for a few microseconds at a time, tens when blocks are told
// that hundreds of nodes have. Memory is bounded by `blocks_max`: 19 to 29 bytes for a block, however many nodes have
// it; up to 58 when a table has just lost half of what it held, and half as much again while blocks of nodes that are
// gone wait to be left out; about 120 bytes for each different set of holders; and while a space's table is written
// anew, that table once more.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/mutex.h"
#include "flexkv/base/time.h"
#include "flexkv/cluster/holder_sets.h"
#include "flexkv/cluster/types.h"

namespace flexkv::cluster {

class Replica {
 public:
  explicit Replica(std::uint64_t blocks_max) : blocks_max_(blocks_max) {}

  // ---- the writer's ------------------------------------------------------------------------------------------------

  // The node has shown that it lives, and is believed until then.
  void refresh(Incarnation node, const std::string& address, Nanos until);
  void remove(Incarnation node);
  void remove_all();
  // Forgets what the node has of a space.
  void clear(Incarnation node, SpaceIndex space);
  // False: there was no room for some of it, which is left out. No effect if the node is not known.
  bool apply(Incarnation node, SpaceIndex space, std::span<const Residency> residencies);
  bool roomy() const { return block_count_ <= blocks_max_ / 8 * 7; }

  // ---- any thread's ------------------------------------------------------------------------------------------------

  struct Holding {
    Incarnation node = 0;
    std::uint32_t blocks = 0;  // of the keys asked for, from the first on: so many it has without a gap
    std::array<std::uint32_t, kTierCount> in_tier{};  // of those, one block may be in several
  };
  // Who has how long a prefix of `keys`: nodes that have none are left out, the longest comes first. A node that was
  // not refreshed in time is not found any more from that moment on, whether or not the writer still comes by.
  void lookup(SpaceIndex space, std::span<const key::BlockKey> keys, Nanos now, std::vector<Holding>& out) const;
  // As the node says it in its heartbeat; empty if it is not there, or says none.
  std::string address(Incarnation node, Nanos now) const;

  struct Stats {
    std::uint64_t nodes = 0;
    std::uint64_t blocks = 0;
    std::uint64_t memory_bytes = 0;
    std::uint64_t left_out = 0;  // residencies for which there was no room, since the start
  };
  Stats stats() const;
  std::uint64_t blocks(Incarnation node) const;  // in all spaces
  // For tests: all that is known of a node.
  std::vector<Residency> content(Incarnation node, SpaceIndex space) const;

 private:
  static constexpr HolderSets::Holder kNone = UINT16_MAX;

  struct Node {
    Incarnation id = 0;
    std::string address;
    Nanos until = 0;
    std::array<HolderSets::Holder, kSpacesMax> holders{};  // its number in each space, or kNone
  };
  // A node in a space, until it is cleared there: then its blocks stay, and nobody finds them.
  struct Holder {
    Incarnation node = 0;  // 0: cleared
    Nanos until = 0;       // as the node's
    std::uint64_t blocks = 0;
  };
  struct Space {
    ResidencyTable<HolderSets::Id> blocks;
    HolderSets sets;
    std::vector<Holder> holders;       // by number
    std::uint64_t cleared_blocks = 0;  // at most so many: of holders that were cleared
    std::uint64_t held_blocks = 0;     // of the others
  };

  const Node* find(Incarnation node) const FLEXKV_REQUIRES(mutex_);
  Node* find(Incarnation node) FLEXKV_REQUIRES(mutex_);
  std::uint64_t blocks_of(const Node& node) const FLEXKV_REQUIRES(mutex_);
  const Holder* holder_of(const Node& node, SpaceIndex space) const FLEXKV_REQUIRES(mutex_);
  void clear(Node& node, SpaceIndex space) FLEXKV_REQUIRES(mutex_);
  // True: there is no room in the space's table, and nothing was done.
  bool apply(Space& space, HolderSets::Holder number, const Residency& residency, bool& complete)
      FLEXKV_REQUIRES(mutex_);
  // When much of a space is of no use any more, or `full`: what is of use in a new one, while lookups go on in the old
  // one, which only the writer changes.
  void tidy(SpaceIndex space, bool full);
  // Of the nodes in standing_, those stay that have the next `count` blocks, too, whose set is `id`.
  void narrow(const Space& space, HolderSets::Id id, std::uint32_t count, Nanos now, std::vector<Holding>& out) const
      FLEXKV_REQUIRES(mutex_);

  const std::uint64_t blocks_max_;
  std::uint64_t block_count_ = 0;  // the writer's
  std::uint64_t left_out_ FLEXKV_GUARDED_BY(mutex_) = 0;
  mutable Mutex mutex_;
  std::vector<Node> nodes_ FLEXKV_GUARDED_BY(mutex_);
  std::array<std::unique_ptr<Space>, kSpacesMax> spaces_ FLEXKV_GUARDED_BY(mutex_);
  struct Standing {
    HolderSets::Holder holder;
    Holding holding;
  };
  mutable std::vector<Standing> standing_ FLEXKV_GUARDED_BY(mutex_);  // scratch of lookup()
};

}  // namespace flexkv::cluster
