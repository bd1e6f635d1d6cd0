// The records behind Node. Private to this module.
#pragma once

#include <unordered_set>

#include "flexkv/key/namespace.h"
#include "flexkv/node/node.h"

namespace flexkv::node {

// All blocks of one kind: same model, same weights, same bytes per block on every rank.
struct Node::Space {
  Space(RangeAllocator& ranges, std::uint64_t slot_bytes, std::uint64_t pool_bytes,
        const index::PrefixIndex::Options& index_options)
      : slots(ranges, slot_bytes, pool_bytes), index(index_options) {}

  key::Root digest{};
  std::array<std::byte, 32> fingerprint{};  // of the model, as the client said it
  std::string model;
  SlotSpace slots;
  index::PrefixIndex index;
  std::vector<std::uint64_t> rank_offset;  // of a rank's shard within a slot
  std::uint64_t block_bytes = 0;           // payload, all ranks
  std::uint32_t engines = 0;
  std::uint32_t jobs = 0;
  std::uint32_t reserved = 0;    // slots held by save jobs, not yet in the index
  std::uint64_t generation = 0;  // bumped by reset: what was begun before publishes nothing
  // Saves that run, by their first block. A prompt's blocks in flight are found from where its match ends: the next
  // one begins a save or nobody saves it; where that save ends, another may follow.
  std::unordered_map<key::BlockKey, JobKey, key::BlockKeyHash> in_flight;
};

struct Node::Agent {
  EngineHandle engine = 0;
  std::uint32_t rank = 0;
};

struct Node::Sequence {
  SequenceId id = 0;
  std::vector<key::BlockKey> keys;
  index::PinId pin{};
  bool pinned = false;
  std::uint32_t matched = 0;  // blocks up to and including the pinned one
  std::uint64_t generation = 0;
  // The last save in flight that this sequence was found to follow, whole, and where it ends: the next save need not
  // walk along all those before it.
  Parent carried;
  std::uint32_t carried_end = 0;
  bool counted = false;  // in the lookup statistics
  Nanos used_at = 0;
};

struct Node::Engine {
  EngineHandle handle = 0;
  std::string id;
  std::string model;
  bool client = false;
  std::array<std::byte, 32> fingerprint{};
  std::uint32_t rank_count = 0;
  struct Rank {
    AgentHandle agent = 0;  // 0: not attached
    proto::AgentHello hello;
  };
  std::vector<Rank> ranks;
  Space* space = nullptr;
  std::unordered_map<SequenceId, Sequence> sequences;

  std::uint32_t ranks_attached() const {
    std::uint32_t count = 0;
    for (const Rank& rank : ranks) count += rank.agent != 0;
    return count;
  }
};

struct Node::Job {
  EngineHandle engine = 0;
  Space* space = nullptr;
  device::Direction direction = device::Direction::kToHost;
  std::uint64_t generation = 0;
  std::uint32_t blocks = 0;
  Nanos started_at = 0;
  Nanos deadline = 0;  // 0: none pending any more
  bool failed = false;
  Reason failure = Reason::kNone;
  std::vector<bool> waiting;  // per rank: has the command, has not reported
  std::uint32_t waiting_count = 0;
  index::PinId pin{};  // load: last block; save: the block that the first one follows (unless `parent`)
  bool pinned = false;
  // Save only:
  std::vector<key::BlockKey> keys;
  std::vector<index::Slot> slots;
  std::optional<JobKey> parent;     // a save in flight that this one continues
  std::uint32_t parent_blocks = 0;  // how many of its blocks precede our first
  std::vector<JobKey> followers;    // saves that continue this one
};

}  // namespace flexkv::node
