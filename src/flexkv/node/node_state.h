// The records behind Node. Private to this module.
#pragma once

#include <list>
#include <unordered_set>

#include "flexkv/key/namespace.h"
#include "flexkv/node/disk_slots.h"
#include "flexkv/node/node.h"
#include "flexkv/node/slot_sums.h"

namespace flexkv::node {

constexpr index::Tier kHostTier = 0;
constexpr index::Tier kDiskTier = 1;

// Of blocks that did not come from beyond the machine, or did not get there.
Reason reason_of(RemoteOutcome outcome);

inline std::size_t slot_of(Reason reason) { return static_cast<std::size_t>(reason); }

// A pinned path that several transfers to or from drives share: as long as there are any, neither its host slots nor
// its disk slots go to other blocks.
struct Node::Path {
  Space* space = nullptr;
  std::uint64_t generation = 0;
  index::PinId pin{};
  std::uint32_t users = 0;
  std::list<Path>::iterator self;
};

// A load that waits for a block.
struct Node::Waiter {
  JobKey job;
  std::uint32_t at = 0;  // which of the job's blocks
  std::uint32_t device_block = 0;
  bool precedes = false;  // what it waits for is not that block, but one without which it cannot be found
};

// A block on its way from a drive to host memory, or waiting for room there or for the drive.
struct Node::Fetch {
  Path* path = nullptr;
  std::uint32_t at = 0;               // its place in the path
  index::Slot host = index::kNoSlot;  // once begun
  DiskOp op = 0;                      // then
  std::uint64_t position = 0;         // then: bytes that its drive has to read until it is there, of all it ever read
  bool prefetch = false;
  std::vector<Waiter> waiters;
  std::vector<LoanId> loans;  // that wait for it
};

// Blocks [first, chain.size()) of a chain on their way from beyond the machine, in slots of their own. They become
// visible in their order, and not before all that precedes them; what waits for that may wait here after the read has
// ended.
struct Node::Import {
  Space* space = nullptr;
  std::uint64_t generation = 0;
  RemoteOp op = 0;
  std::vector<key::BlockKey> chain;
  std::uint32_t first = 0;
  index::PinId pin{};  // as far as the index knows the chain
  std::vector<index::Slot> slots;
  std::vector<std::vector<Waiter>> waiters;
  // Of its blocks, leading ones: those that have come, and of them those in the index.
  std::uint32_t arrived = 0;
  std::uint32_t published = 0;
  std::uint32_t asked_from = 0;  // of its blocks, the first one of the read
  bool reading = true;           // the port has its slots
  bool prefetch = false;
  bool canceled = false;
  Nanos begun = 0;

  std::uint32_t blocks() const { return static_cast<std::uint32_t>(slots.size()); }
};

struct Node::Remote {
  explicit Remote(RemotePort& beyond) : port(beyond) {}

  RemotePort& port;
  RemoteOp next_op = 1;
  std::map<RemoteOp, std::unique_ptr<Import>> imports;
  std::uint64_t prefetching_bytes = 0;
  std::vector<plan::Stretch> stretches;  // scratch
};

// Blocks [begin, end) of the pinned path: gathered for the store, or being written there.
struct Node::StoreRun {
  Space* space = nullptr;
  std::uint64_t generation = 0;
  index::PinId pin{};
  std::uint32_t begin = 0;
  std::uint32_t end = 0;
  key::BlockKey last;                // of them, while they are gathered
  Nanos since = 0;                   // the first of them is gathered, or they are written
  std::vector<index::Slot> slots{};  // while they are written: where they lie
};

// Of a node that drains: what only host memory has, on its way to the store. It looks through all that is kept, offers
// the hottest of it, and looks again, until there is nothing left.
struct Node::Offers {
  enum class State : std::uint8_t { kLooking, kOffering, kDone };
  struct Found {
    SpaceNumber space = 0;
    index::PrefixIndex::Part part;
  };
  void look(Nanos at) {
    state = State::kLooking;
    due = at;
    again = false;
    lacking = 0;
    found.clear();
    space = 0;
    run = 0;
  }

  State state = State::kLooking;
  Nanos until = 0;            // nothing is offered any more
  Nanos due = 0;              // to go on, unless something ends before
  bool again = false;         // there may be more than it has seen
  std::uint64_t lacking = 0;  // blocks: seen, and not offered since
  std::uint64_t offered = 0;  // blocks, since the beginning
  std::vector<Found> found;   // the hottest; a heap while it looks, then in order, the hottest last
  SpaceNumber space = 0;      // where it looks: in the first one from this on,
  std::uint32_t run = 0;      // from there on
};

struct Node::Store {
  explicit Store(StorePort& beyond) : port(beyond) {}

  StorePort& port;
  RemoteOp next_op = 1;
  std::list<StoreRun> gathering;  // too short to be written yet, the oldest first
  std::list<StoreRun> ready;      // wait for others to have been written
  std::unordered_map<RemoteOp, StoreRun> writes;
  std::uint32_t blocks = 0;  // of all these
  std::uint64_t bytes = 0;
  bool flushing = false;
  std::optional<Offers> offers;  // once the node drains
  // Scratch of store_beyond() and offer().
  std::vector<index::Slot> slots;
  std::vector<key::BlockKey> keys;
};

// Blocks [first, end) of the pinned path, lent to another node or on their way from drives for it.
struct Node::Lent {
  Space* space = nullptr;
  std::uint64_t generation = 0;
  index::PinId pin{};
  std::uint32_t first = 0;
  std::uint32_t end = 0;
  std::uint32_t pinned = 0;  // blocks, from the first one of the chain on
  Loan::Limit limit = Loan::Limit::kNone;
  std::vector<bool> missing;       // of [first, end)
  std::vector<index::Slot> slots;  // once it is answered: where those lie that are lent
  std::uint32_t missing_count = 0;
  Nanos deadline = 0;
  bool answered = false;

  std::uint32_t count() const { return end - first; }
};

// All blocks of one kind: same model, same weights, same bytes in every shard.
struct Node::Space {
  Space(RangeAllocator& ranges, std::uint64_t slot_bytes, std::uint64_t pool_bytes,
        const index::PrefixIndex::Options& index_options, std::vector<SlotSums::Shard> shards)
      : slots(ranges, slot_bytes, pool_bytes), sums(std::move(shards)), index(index_options) {}

  key::Root digest{};
  std::array<std::byte, 32> fingerprint{};  // of the model, as the client said it
  std::string model;
  SlotSpace slots;
  SlotSums sums;
  std::optional<events::SpaceFeed> feed;  // once somebody follows; the index tells it
  index::PrefixIndex index;
  std::uint64_t block_bytes = 0;  // payload, each shard once
  std::uint32_t engines = 0;
  std::uint32_t jobs = 0;
  std::uint32_t reserved = 0;    // slots held by save jobs, not yet in the index
  std::uint64_t generation = 0;  // bumped by reset: what was begun before publishes nothing
  struct Damaged {
    index::Slot slot = index::kNoSlot;
    Nanos found_at = 0;
  };
  std::vector<Damaged> damaged;  // slots of blocks that were dropped, and may still be read
  // Saves that run, by their first block. A prompt's blocks in flight are found from where its match ends: the next
  // one begins a save or nobody saves it; where that save ends, another may follow.
  std::unordered_map<key::BlockKey, JobKey, key::BlockKeyHash> in_flight;

  SpaceNumber number = 0;
  SpaceName name{};
  // Those on their way from beyond the machine, or waiting to be published: by whom, and which of its blocks.
  std::unordered_map<key::BlockKey, std::pair<RemoteOp, std::uint32_t>, key::BlockKeyHash> importing;
  std::uint32_t imports = 0;
  std::uint32_t loans = 0;
  std::uint32_t storing = 0;  // runs
  // Of those that are gathered, by their last block.
  std::unordered_map<key::BlockKey, std::list<StoreRun>::iterator, key::BlockKeyHash> storing_ends;
  std::optional<admission::AdmissionFilter> store_admission;  // with a store

  // ---- with drives
  enum class DiskState : std::uint8_t { kNone, kOpening, kOpen } disk_state = DiskState::kNone;
  std::optional<DiskSlots> disk_slots;
  std::optional<admission::AdmissionFilter> admission;
  std::uint64_t drops = 0;  // blocks that turned out bad: what was matched before may have holes
  std::unordered_map<key::BlockKey, index::PinId, key::BlockKeyHash> recovered_ends;  // while opening: of each chain
  std::unordered_map<key::BlockKey, Fetch, key::BlockKeyHash> fetches;
  std::unordered_set<key::BlockKey, key::BlockKeyHash> writing;
  std::unordered_map<key::BlockKey, DiskOp, key::BlockKeyHash> checks;  // under way
  std::uint32_t fetching = 0;                                           // fetches that hold a host slot
  std::uint32_t paths = 0;  // in use by fetches, writes and checks, waiting ones included
};

// A transfer that a drive has.
struct Node::DiskIo {
  enum class Kind : std::uint8_t { kFetch, kWrite, kCheck };
  Space* space = nullptr;
  key::BlockKey key;
  Path* path = nullptr;
  std::uint32_t at = 0;
  index::Slot disk = index::kNoSlot;
  Kind kind = Kind::kFetch;
  bool prefetch = false;
  Nanos begun = 0;
  index::Slot host = index::kNoSlot;  // of a write
  bool summed = false;                // of a write: the drive checks what it writes
  bool dropped = false;               // the block was found bad by another read: this one gives the slot back
  std::uint64_t scrub = 0;            // of a check: the number of its scrub
  bool given_up = false;              // of a check: its drive went off, and the scrub does not wait for it any more
};

// The latest check of all blocks on drives.
struct Node::Scrub {
  std::optional<ScrubStatus> status;  // none: there was no scrub
  std::uint64_t number = 0;
  SpaceNumber space = 0;       // whose blocks are visited, if it is scanning; those before it are done
  bool scanning = false;       // its index
  Path* next = nullptr;        // to the block that is to be checked next, once it is found
  Nanos next_at = 0;           // not before
  bool waits = false;          // for something to end
  std::uint32_t checking = 0;  // blocks that drives have, but for those that were given up
};

struct Node::Disk {
  explicit Disk(DiskPort& drives)
      : port(drives), writes(drives.drive_count()), reads(drives.drive_count()), reading(drives.drive_count()) {}

  // Blocks [begin, end) of the path are to be written; those before `next` are the drives' already.
  struct WriteRun {
    Path* path = nullptr;
    std::uint32_t begin = 0;
    std::uint32_t next = 0;
    std::uint32_t end = 0;
  };
  DiskPort& port;
  std::list<Path> paths;
  std::unordered_map<DiskOp, DiskIo> ios;
  DiskOp next_op = 1;
  // To be begun. What was begun or given up since counts for nothing.
  std::deque<FetchId> loads;
  std::deque<FetchId> prefetches;
  std::deque<WriteRun> write_runs;
  std::uint64_t queued_write_bytes = 0;  // of write_runs
  std::vector<std::uint32_t> writes;     // at each drive
  unsigned next_drive = 0;               // for a write, if others have no less to do
  bool pumping = false;
  std::uint32_t prefetching = 0;      // reads that drives have
  std::vector<plan::FlowRate> reads;  // of each drive
  // The latest choices, and how many there ever were.
  std::array<Choice, kChoicesKept> choices{};
  std::uint64_t choice_count = 0;
  // Scratch of served().
  std::vector<index::Slot> host_slots;
  std::vector<index::Slot> disk_slots;
  struct Reading {
    double nanos_per_byte = 0;
    double free = 0;          // nanoseconds from now until it has read what it has to
    double own = 0;           // of them, for the request in question
    std::uint32_t asked = 0;  // blocks for it that are not counted yet
  };
  std::vector<Reading> reading;
  std::vector<plan::Stretch> stretches;
  std::vector<key::BlockKey> keys;  // scratch of write_behind()
  Scrub scrub;
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
  std::uint32_t matched = 0;     // blocks up to and including the pinned one
  std::uint32_t remote_end = 0;  // and so many with those found beyond the machine
  std::uint64_t born = 0;  // generation of the space when it was opened: what was computed before a reset is not kept
  std::uint64_t generation = 0;
  std::uint64_t drops = 0;
  // The last save in flight that this sequence was found to follow, whole, and where it ends: the next save need not
  // walk along all those before it.
  Parent carried;
  std::uint32_t carried_end = 0;
  // What the engine calls its blocks, as far as it said so.
  std::vector<events::DescriptionRef> descriptions;
  std::uint32_t described = 0;      // leading blocks found to be so in the index
  std::uint32_t engine_blocks = 0;  // leading ones that its engine has itself, by the last lookup
  bool counted = false;             // in the lookup statistics
  std::uint32_t found = 0;          // blocks, by the first lookup
  bool announced = false;           // by a prefetch, and not looked up yet
  std::uint64_t choice = 0;         // the number of its latest one, from 1 on
  Nanos arrives = 0;                // what it is to load, in host memory
  Nanos compute = 0;                // what its engine has to do for it, then
  bool computing = false;           // that is part of its engine's computes_until
  bool leased = false;              // was found, and what was found is neither loaded nor passed by yet
  Nanos used_at = 0;
};

struct Node::Engine {
  EngineHandle handle = 0;
  std::string id;
  std::string model;
  bool client = false;
  std::array<std::byte, 32> fingerprint{};
  std::uint32_t block_tokens = 0;
  plan::PrefillTime prefill;
  // As far as one can tell: until when it computes what was looked up and waits for nothing, and, of its loads that
  // wait for drives, when they arrive and how long it computes then.
  Nanos computes_until = 0;
  struct Arrival {
    Nanos arrives = 0;
    Nanos compute = 0;
  };
  std::unordered_map<JobId, Arrival> arrivals;
  std::uint32_t announced = 0;  // sequences
  std::uint32_t rank_count = 0;
  struct Rank {
    AgentHandle agent = 0;  // 0: not attached
    proto::AgentHello hello;
    // Once there is a space:
    std::uint64_t host_offset = 0;   // of its shard within a slot
    std::uint32_t shard_place = 0;   // which of the slot's shards that is
    std::uint32_t holder_count = 1;  // ranks that hold the same shard
    std::uint32_t holder = 0;        // which of them this is
  };
  std::vector<Rank> ranks;
  Space* space = nullptr;
  std::unordered_map<SequenceId, Sequence> sequences;

  std::uint32_t ranks_attached() const {
    std::uint32_t count = 0;
    for (const Rank& rank : ranks) count += rank.agent != 0;
    return count;
  }
  // Of a block, on all ranks together.
  std::uint64_t device_bytes() const {
    std::uint64_t bytes = 0;
    for (const Rank& rank : ranks) bytes += rank.hello.shard_bytes;
    return bytes;
  }
};

struct Node::Job {
  EngineHandle engine = 0;
  Space* space = nullptr;
  device::Direction direction = device::Direction::kToHost;
  std::uint64_t generation = 0;
  std::uint32_t blocks = 0;
  std::uint64_t block_bytes = 0;  // copied for each block, all ranks
  Nanos started_at = 0;
  Nanos deadline = 0;  // 0: none pending any more
  bool failed = false;
  Reason failure = Reason::kNone;
  std::vector<bool> waiting;  // per rank: has the command, has not reported
  std::uint32_t waiting_count = 0;
  index::PinId pin{};  // load: last block; save: the block that the first one follows (unless `parent`)
  bool pinned = false;
  // Load only:
  std::uint32_t end = 0;                    // blocks from this one on do not come, for the reason `failure`
  std::uint32_t good = 0;                   // leading blocks that each rank that has reported has
  std::vector<bool> fetched;                // whether the job waits for the block from a drive; empty: for none
  std::vector<key::BlockKey> fetched_keys;  // of all that were set there, less what is not to be read any more
  std::uint32_t missing = 0;                // how many are set there
  SlotRuns arrived;                         // since the last piece
  std::uint32_t pieces = 0;                 // sent
  // Save only:
  std::vector<key::BlockKey> keys;
  std::vector<index::Slot> slots;
  std::vector<events::DescriptionRef> descriptions;  // of `keys`, null where not known; empty if nobody follows
  std::optional<JobKey> parent;                      // a save in flight that this one continues
  std::uint32_t parent_blocks = 0;                   // how many of its blocks precede our first
  std::vector<JobKey> followers;                     // saves that continue this one
  bool on_commit = false;                            // is to be kept only when its client says so, which it has not yet
  bool told = false;                                 // that it is done; then there is no deadline
  admission::Origin origin;                          // `last_found` is not set:
  std::optional<key::BlockKey> last_found;
};

}  // namespace flexkv::node
