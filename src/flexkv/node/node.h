// The cache of one machine as pure logic: who is attached, which blocks are kept where, which transfers run.
//
// Embedded in an engine's process or inside a daemon it is the same class. It has no thread, no clock and no I/O: calls
// come in with the time, commands to agents go out through an Outbox. It never touches the pool's bytes.
// Thread-compatible: NodeServer guards it with one mutex.
//
// A block's life: reserved (a save job holds its slot) -> filled (every rank reported) -> published (in the index) ->
// pinned by lookups and load jobs -> evicted. INVARIANT: a slot is neither freed nor reused while any rank may still
// read or write it, that is until each rank of each job on it has reported or disconnected; nor while a drive may.
//
// A block is stored once, shard by shard. What several ranks hold alike (AgentHello::shard) is one shard: of a save
// each of them copies a slice of the blocks, a load goes to each of them whole.
//
// With drives (DiskPort), published blocks are written behind to slots there, and a load fetches what is only there:
// what host memory holds goes to the device at once, the rest as it comes. A block is fetched once, however many wait.
// A load of which a block does not come keeps its beginning: it ends before that block, and what comes before is
// copied.
//
// Beyond the machine (RemotePort) other nodes may have what comes behind a match. It is read into slots of this node,
// published as if it had been saved here, and goes to the device like blocks from drives. In return other nodes borrow
// blocks (lend()), and a store that all share (StorePort) is given those that are worth it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "flexkv/admission/admission_filter.h"
#include "flexkv/base/time.h"
#include "flexkv/events/feed.h"
#include "flexkv/index/prefix_index.h"
#include "flexkv/node/disk_port.h"
#include "flexkv/node/remote_port.h"
#include "flexkv/node/slot_space.h"
#include "flexkv/node/store_port.h"
#include "flexkv/plan/flow_rate.h"
#include "flexkv/plan/load_choice.h"
#include "flexkv/proto/messages.h"
#include "flexkv/telemetry/histogram.h"

namespace flexkv::node {

using proto::JobId;
using proto::JobStatus;
using proto::Reason;
using proto::SequenceId;

using EngineHandle = std::uint32_t;
using AgentHandle = std::uint32_t;

struct NodeOptions {
  std::uint64_t pool_bytes = 0;
  index::PolicyOptions policy;
  double evict_start_threshold = 1.0;  // occupancy (0..1) from which a save also evicts ahead
  double evict_ratio = 0.0;            // share of the slots evicted ahead then
  Nanos load_timeout = 10 * kSecond;
  Nanos save_timeout = 30 * kSecond;
  Nanos lease_time = 2 * kSecond;              // a looked-up sequence is safe from eviction that long
  std::uint64_t sequence_keys_max = 8U << 20;  // keys of open sequences, over all engines (16 bytes each)
  std::uint32_t jobs_max = 65536;              // transfers in flight, over all engines
  bool always_load = false;                    // also what computing is expected to be faster for
  bool disk_admission = true;                  // false: all that is saved is written to drives
  std::uint64_t disk_bytes = 0;                // of the drives: how many blocks admission has to remember
};

// Where the node's commands go. Called under the node's lock; must not call back and must not block.
class Outbox {
 public:
  virtual ~Outbox() = default;
  // False when the agent's queue is full or it is gone: the rank then counts as failed for that job.
  virtual bool send(AgentHandle agent, const proto::ToAgent& message) = 0;
  virtual void send(EngineHandle engine, const proto::JobResult& result) = 0;
  // For who asked with want_changes(): there are some to read.
  virtual void changed() {}
  // The answer to lend().
  virtual void lent(Loan) {}
};

struct DirectionStats {
  std::uint64_t jobs = 0;
  std::uint64_t failed_jobs = 0;
  std::uint64_t blocks = 0;  // completed, also by jobs that failed
  std::uint64_t bytes = 0;   // of them, all ranks
  telemetry::Histogram latency;
};

// Of blocks that go between host memory and drives, or come from beyond the machine.
struct DiskFlowStats {
  std::uint64_t blocks = 0;
  std::uint64_t bytes = 0;
  telemetry::Histogram latency;  // of a block, since it was asked for
};

// What was chosen for a lookup that found blocks on drives, and why. All times in nanoseconds.
struct Choice {
  enum class Basis : std::uint8_t {
    kCost,            // what is expected to be the fastest
    kAlways,          // all, because the configuration says so
    kReadsUnknown,    // all: no drive was read yet
    kPrefillUnknown,  // all: the engine did not tell yet how fast it computes
  };
  Nanos at = 0;
  EngineHandle engine = 0;
  SequenceId sequence = 0;
  std::uint32_t prompt_blocks = 0;
  // Of those found, in a row from the first one: leading ones that the engine has itself, and of the others those in
  // host memory, on the way there, on drives only.
  std::uint32_t engine_blocks = 0;
  std::uint32_t host_blocks = 0;
  std::uint32_t coming_blocks = 0;
  std::uint32_t drive_blocks = 0;
  std::uint32_t chosen_blocks = 0;  // to load, less those that the engine has
  Basis basis = Basis::kCost;
  double read_bytes_per_second = 0;  // of all drives
  double read_wait = 0;              // until the drives have read what they were asked for before
  double engine_wait = 0;            // until the engine has computed what it was given before
  std::uint32_t behind = 0;          // requests that wait for their turn
  double expected = 0;               // until the prompt is computed; 0: not known
  double expected_if_all = 0;        // was loaded
  double expected_if_none = 0;

  std::uint32_t found_blocks() const { return engine_blocks + host_blocks + coming_blocks + drive_blocks; }
};

struct NodeStats {
  std::uint64_t resets = 0;
  std::uint64_t lookups = 0;
  std::uint64_t blocks_queried = 0;
  std::uint64_t blocks_hit = 0;
  std::uint64_t disk_blocks_hit = 0;    // of them, to be read from drives
  std::uint64_t remote_blocks_hit = 0;  // and only beyond the machine
  std::uint64_t blocks_saved = 0;
  std::uint64_t blocks_evicted = 0;
  std::array<std::uint64_t, proto::kReasonCount> missed_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unsaved_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> failed_loads{};  // also those that kept their beginning
  std::uint64_t blocks_of_failed_loads = 0;                       // that are good all the same
  DirectionStats to_device;
  DirectionStats to_host;
  DiskFlowStats from_disk;
  DiskFlowStats to_disk;
  std::uint64_t blocks_prefetched = 0;  // of those from drives: nobody waited for them when they were asked for
  // How often a request with blocks on drives was to load all that was found, a part of it, nothing; and the blocks
  // that were left to the engine.
  std::uint64_t choices_all = 0;
  std::uint64_t choices_part = 0;
  std::uint64_t choices_none = 0;
  std::uint64_t recomputed_blocks = 0;
  std::uint64_t disk_blocks_evicted = 0;
  std::uint64_t disk_blocks_recovered = 0;
  std::array<std::uint64_t, proto::kReasonCount> unfetched_blocks{};
  std::array<std::uint64_t, proto::kReasonCount> unwritten_blocks{};
  DiskFlowStats from_remote;
  std::array<std::uint64_t, proto::kReasonCount> unimported_blocks{};  // asked for beyond the machine, and did not come
  std::uint64_t loans = 0;
  std::uint64_t blocks_lent = 0;
  DiskFlowStats to_store;
  std::uint64_t store_writes = 0;                                    // of them
  std::array<std::uint64_t, proto::kReasonCount> unstored_blocks{};  // were worth it, or offered, and not written
  std::uint64_t blocks_checked = 0;  // written to drives, and found to be what the device held
  std::uint64_t blocks_damaged = 0;  // in host memory, found not to be that, and dropped
};

// What has become of the latest scrub.
struct ScrubStatus {
  enum class State : std::uint8_t { kRunning, kDone, kStopped };
  struct Drive {
    std::uint64_t checked_blocks = 0;
    std::uint64_t checked_bytes = 0;
    std::uint64_t damaged_blocks = 0;     // of those checked: not what was written, and
    std::uint64_t unreadable_blocks = 0;  // not to be read; both are forgotten
    std::uint64_t unchecked_blocks = 0;   // the drive was off, or the read was given up
  };
  State state = State::kRunning;
  std::uint64_t bytes_per_second = 0;  // at most
  std::uint64_t blocks = 0;            // on drives when it began
  std::uint64_t bytes = 0;             // of them
  Nanos begun = 0;
  Nanos ended = 0;  // unless it runs
  std::vector<Drive> drives;
};

class Node {
 public:
  // `disk`: null without drives. `remote`: null if there is nothing beyond the machine. `store`: null if nothing is
  // kept there. They outlive the node.
  Node(NodeOptions options, Outbox& outbox, DiskPort* disk = nullptr, RemotePort* remote = nullptr,
       StorePort* store = nullptr);
  ~Node();

  // An engine = one client (its scheduler) and rank_count agents that name the same engine_id. Order does not matter.
  Result<EngineHandle> attach_client(const proto::ClientHello& hello);
  // Cancels its jobs as well: it can no longer do that itself.
  void detach_client(EngineHandle engine);
  Result<AgentHandle> attach_agent(const proto::AgentHello& hello);
  void detach_agent(AgentHandle agent, Nanos now);
  // 0: no such agent.
  EngineHandle engine_of(AgentHandle agent) const;

  struct Lookup {
    std::uint32_t matched_blocks = 0;
    Reason reason = Reason::kNone;  // of the first block that is missing
    std::uint32_t disk_blocks = 0;  // of those matched, to be read from drives or from beyond the machine
    std::uint32_t host_blocks = 0;  // leading ones of those matched that need neither
    // Leading ones that need no describe(), which may be more than are matched: all, if nobody follows.
    std::uint32_t described_blocks = 0;
    std::uint32_t remote_blocks = 0;  // of disk_blocks, those beyond the machine: the last ones matched
  };
  // `keys` continue the sequence's chain at block `base`, of which the engine has the first `engine_blocks` itself and
  // will not load them. What is matched is pinned for lease_time.
  Lookup lookup(EngineHandle engine, SequenceId sequence, std::uint32_t base, std::span<const key::BlockKey> keys,
                Nanos now, std::uint32_t engine_blocks = 0);
  // Of blocks that need none of the others: the last one that can be loaded, by its number from 1 in matched_blocks; 0:
  // none, for the reason of the last one. The sequence is a chain of that block alone from now on, pinned as above, and
  // transfers call it block 0.
  Lookup lookup_last(EngineHandle engine, SequenceId sequence, std::span<const key::BlockKey> keys, Nanos now);
  // Either of the two.
  Lookup lookup(EngineHandle engine, const proto::LookupRequest& request, Nanos now);
  // Queues the copy of blocks [first_block, first_block + device_blocks.size()) of the sequence. The outcome is sent
  // to the client; a reason other than kNone means that nothing was queued.
  Reason load(EngineHandle engine, const proto::TransferRequest& request, Nanos now);
  // Saves those of the blocks that are not kept yet. kNone: queued, or nothing left to do. A save that had room for
  // some of its blocks only ends as kDone with the reason kPoolFull.
  Reason save(EngineHandle engine, const proto::TransferRequest& request, Nanos now);
  // Fetches blocks of the sequence that are only on drives, as far as there is room. A reason other than kNone means
  // that the keys were not taken.
  Reason prefetch(EngineHandle engine, const proto::PrefetchRequest& request, Nanos now);
  // How fast the engine computes prompts; until it is told, all that is kept is taken to be worth loading.
  void set_prefill(EngineHandle engine, const plan::PrefillTime& time);
  void close_sequence(EngineHandle engine, SequenceId sequence);
  // A save that has not ended by now keeps nothing, whatever its ranks say later. So an engine that is about to
  // overwrite device blocks cancels the saves that read them, and waits for nobody.
  void cancel(EngineHandle engine, JobId job);
  // Keeps what a save with on_commit has copied. Nothing comes of it unless the client was told that the save is done.
  void commit(EngineHandle engine, JobId job, Nanos now);
  // Forgets every block of the engine's model; transfers that run end as they would, but publish nothing, and of
  // sequences that are open nothing is saved any more: their beginnings may have been computed before.
  void reset(EngineHandle engine, Nanos now);
  // Of all models, here and at all who share what is beyond the machine.
  void reset_all(ResetId reset, Nanos now);
  // Here, because one of those has said so.
  void reset_here(Nanos now);

  void on_report(AgentHandle agent, const proto::JobReport& report, Nanos now);

  // ---- what is kept, for readers (module events). Before the first call of follow() nothing is remembered for them.
  void follow();
  // See Subscription::read. `engine`: only its model's blocks, and nothing while its ranks are away; 0: of all models.
  bool read_changes(events::Subscription& subscription, EngineHandle engine, std::size_t changes_max,
                    std::vector<events::Change>& out);
  // Have Outbox::changed() called at the next change.
  void want_changes();
  // What the engine calls blocks of a sequence that it has looked up.
  void describe(EngineHandle engine, const proto::DescribeRequest& request);

  // From the drives; see DiskPort.
  void on_disk_recovered(SpaceNumber space, std::span<const RecoveredChain> chains, Nanos now);
  // Of each drive so many slots may be used.
  void on_disk_opened(SpaceNumber space, std::span<const std::uint32_t> slots, Nanos now);
  void on_disk_done(std::span<const DiskResult> results, Nanos now);
  // A read that has begun takes too long, or its drive went off. on_disk_done follows, however late.
  void on_disk_overdue(DiskOp op, Nanos now);
  // A write that was told kLater may be tried again.
  void on_disk_ready(Nanos now);

  // Checks all blocks on drives, reading at most so many bytes a second, behind whatever else the drives have to do:
  // those that are bad are forgotten. One that runs goes on at the new rate. Nothing without drives.
  void begin_scrub(std::uint64_t bytes_per_second, Nanos now);
  void stop_scrub(Nanos now);
  const ScrubStatus* scrub() const;  // null: there was none

  // From beyond the machine; see RemotePort. `index`: which of the blocks that were wanted, in order.
  void on_remote_block(RemoteOp op, std::uint32_t index, Nanos now);
  void on_remote_end(RemoteOp op, RemoteOutcome outcome, Nanos now);
  // From the store; see StorePort.
  void on_store_written(RemoteOp op, RemoteOutcome outcome, Nanos now);
  // Its block `index` is not what its sums say; on_store_written follows.
  void on_store_damaged(RemoteOp op, std::uint32_t index, Nanos now);
  // From now on nothing is found or taken for engines any more: to them this is a node without blocks. What was found
  // before is loaded, saves under way end, what waits to be written to drives or the store is. What only host memory
  // has is offered to the store until `until`, what is used most first, whether or not it is worth it otherwise. To
  // other nodes it lends until stop_lending(). There is no way back; asked once more, only that time is another one.
  void drain(Nanos now, Nanos until);
  bool draining() const { return draining_; }
  // Other nodes get nothing from now on; loans that were given last as long as they do.
  void stop_lending() { lends_ = false; }
  struct Undone {
    std::size_t jobs = 0;           // of engines
    std::size_t loans = 0;          // to other nodes
    std::uint32_t disk_writes = 0;  // blocks
    std::uint32_t store_writes = 0;
    // With a store: blocks that only host memory has and that were not offered to it yet, as far as is known, and
    // whether there may be more. Those that it was offered, or else on their way there, are in store_writes.
    std::uint64_t host_only = 0;
    bool looks = false;
    std::uint64_t offered = 0;  // so far
    bool lends = true;          // more loans may come
    bool none() const {
      return jobs == 0 && loans == 0 && disk_writes == 0 && store_writes == 0 && host_only == 0 && !looks && !lends;
    }
  };
  // Of what drain() waits for.
  Undone undone() const;

  // The node ends soon: what is gathered for the store is written.
  void flush_store(Nanos now);
  std::uint32_t store_queue() const;  // blocks that are gathered or being written
  // For another node: as many of the blocks keys[first, ...) as there are, those on drives as well once they have been
  // read and as far as loans may take host memory. Outbox::lent says which, once, by the deadline, maybe before this
  // returns; then end_loan() has to be called, also for a loan of no blocks. `keys`: the chain from its first block on.
  void lend(LoanId id, const SpaceName& space, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys,
            std::uint32_t first, Nanos deadline, Nanos now);
  // Block `index` of those lent is not what its sums say.
  void on_loan_damaged(LoanId id, std::uint32_t index, Nanos now);
  // Before lent() as well: then it does not come.
  void end_loan(LoanId id, Nanos now);

  // The time at which on_time must be called next; nullopt when nothing waits.
  std::optional<Nanos> next_deadline() const;
  void on_time(Nanos now);

  bool ready(EngineHandle engine) const;
  std::uint32_t blocks_in_use() const;  // over all spaces, reserved ones included
  std::uint32_t jobs_in_flight() const { return static_cast<std::uint32_t>(jobs_.size()); }
  const NodeStats& stats() const { return stats_; }

  struct EngineInfo {
    EngineHandle handle = 0;
    std::string id;
    std::string model;
    bool client = false;
    std::uint32_t ranks = 0;
    std::uint32_t ranks_attached = 0;
    std::uint32_t sequences = 0;
    bool ready = false;
    plan::PrefillTime prefill;  // not known: it did not tell
  };
  struct SpaceInfo {
    std::string id;
    std::string model;
    std::uint64_t block_bytes = 0;  // payload; what several ranks hold alike counts once
    std::uint64_t slot_bytes = 0;   // with padding to page boundaries
    std::uint32_t slots = 0;
    std::uint32_t used = 0;      // published and reserved
    std::uint32_t reserved = 0;  // being saved
    std::uint64_t metadata_bytes = 0;
    std::uint32_t engines = 0;
    std::uint64_t disk_slots = 0;
    std::uint64_t disk_used = 0;
    bool recovering = false;
    admission::AdmissionFilter::Stats admission;
    admission::AdmissionFilter::Stats store_admission;
  };
  struct DiskQueues {
    std::uint32_t fetches = 0;  // blocks that are fetched, or wait for room or a drive
    std::uint32_t writes = 0;   // blocks that are written, or wait for a drive
  };
  DiskQueues disk_queues() const;
  // Whether only blocks that are worth it are written to drives.
  bool admits() const { return disk_ != nullptr && options_.disk_admission; }
  // Of all drives together, measured while blocks are read; 0: not yet.
  double disk_bytes_per_second() const;
  // The latest ones, the oldest first, at times up to now().
  std::vector<Choice> choices() const;
  bool always_loads() const { return options_.always_load; }
  Nanos now() const { return now_; }  // the latest time that was told
  std::vector<EngineInfo> engines() const;
  std::vector<SpaceInfo> spaces() const;
  std::uint64_t free_pool_bytes() const { return ranges_.free_bytes(); }

  // Checks what must hold between any two calls; aborts when it does not. For tests.
  void check_invariants() const;

 private:
  struct Space;
  struct Engine;
  struct Agent;
  struct Job;
  struct Sequence;
  struct Disk;
  struct Path;
  struct Fetch;
  struct Waiter;
  struct DiskIo;
  struct Scrub;
  struct Remote;
  struct Import;
  struct Lent;
  struct Store;
  struct Offers;
  static constexpr std::size_t kChoicesKept = 64;
  using JobKey = std::pair<EngineHandle, JobId>;
  // `count` device blocks in a row, in as many slots in a row.
  struct SlotRun {
    std::uint32_t device_block = 0;
    index::Slot slot = index::kNoSlot;
    std::uint32_t count = 0;
    std::uint32_t first = 0;  // which of the job's blocks
  };
  using SlotRuns = std::vector<SlotRun>;

  void tell_time(Nanos now) { now_ = std::max(now_, now); }
  Engine* find_engine(EngineHandle engine);
  Result<Engine*> join_engine(const std::string& id, std::uint32_t rank_count);
  void bind_space(Engine& engine);
  void unbind_space(Engine& engine);
  void drop_engine_if_empty(EngineHandle handle);
  Space* open_space(Engine& engine);

  // The sequence with the keys appended; or why not.
  std::pair<Sequence*, Reason> sequence_of(Engine& engine, SequenceId id, std::uint32_t base,
                                           std::span<const key::BlockKey> keys);
  void close(Engine& engine, Sequence& sequence);
  void refresh_match(Engine& engine, Sequence& sequence, std::size_t block_count, bool touch, Nanos now);
  bool can_load(Engine& engine, const key::BlockKey& key, Nanos now);
  void drop_pin(Space& space, index::PinId& pin);
  Lookup miss_by_drain(Sequence& sequence);

  // A save in flight, and how many of its blocks are meant.
  struct Parent {
    std::optional<JobKey> job;
    std::uint32_t blocks = 0;
  };
  Parent skip_in_flight(const Space& space, Sequence& sequence, std::size_t end, std::uint32_t& begin) const;
  std::uint32_t reserve(Space& space, std::uint32_t count, Nanos now);
  void shed_expired_leases(Space& space, Nanos now);
  void evict(Space& space, std::uint32_t count, Nanos now);

  Job& start_job(EngineHandle handle, Engine& engine, const proto::TransferRequest& request,
                 device::Direction direction, Nanos now);
  static std::uint32_t append_runs(const SlotSpace& space, std::span<const std::uint32_t> device_blocks,
                                   std::span<const index::Slot> slots, std::uint32_t first, SlotRuns& runs);
  void dispatch(JobKey key, Job& job, const SlotRuns& runs, bool armed);
  bool send_piece(JobKey key, const Job& job, std::uint32_t number, const SlotRuns& runs, bool armed);
  static std::pair<std::uint64_t, std::uint64_t> save_slice(JobKey key, const Job& job, const Engine& engine,
                                                            std::uint32_t rank);
  void fail(JobKey key, Job& job, Reason reason);
  void cut(JobKey key, Job& job, std::uint32_t at, Reason reason);
  void rank_done(JobKey key, Job& job, std::uint32_t rank, const proto::JobReport& report, Nanos now);
  void finish_if_quiet(JobKey key, Nanos now);
  void publish_or_drop(Job& job, Nanos now);
  std::vector<JobKey> retire(JobKey key, Nanos now);
  void cancel_ranks(JobKey key, Job& job);
  void give_up(JobKey key, Job& job);
  bool awaits_commit(JobKey key, Job& job);
  void call_off(const Engine* engine, JobId job);
  void clear(Space& space, Nanos now);
  void close_ports(const Space& space);
  bool idle(const Space& space) const;
  Space* find_space(SpaceNumber number) const;
  void give_back_evicted(Space& space);

  // choice.cc: what a request is to load, and what its engine computes
  enum class Purpose : std::uint8_t { kLookup, kPrefetch };
  struct Served {
    Lookup lookup;
    std::optional<Choice> choice;  // where there was one
    Nanos arrives = 0;             // what is to be loaded, in host memory
  };
  Served served(const Engine& engine, const Sequence& sequence, Purpose purpose);
  std::uint64_t slots_in_reach(const Space& space) const;
  std::uint32_t room_for_prompt(const Space& space) const;
  Choice choose(const Engine& engine, const Sequence& sequence, std::uint32_t blocks, Purpose purpose);
  double from_now(Nanos time) const;  // in nanoseconds; 0: it is over
  plan::LoadChoice choose_load(const Engine& engine, const Sequence& sequence, std::span<const plan::Stretch> stretches,
                               std::uint32_t behind);
  double look_at_drives(const Space& space, Purpose purpose);
  void look_at_blocks(const Space& space, const Sequence& sequence, Choice& choice, std::uint32_t blocks,
                      Purpose purpose);
  static const Fetch* on_its_way(const Space& space, const key::BlockKey& key, Purpose purpose);
  void note_choice(Engine& engine, Sequence& sequence, const Served& served, bool first);
  void note_compute(Engine& engine, Sequence& sequence, const Served& served);
  void try_slow_drives(Space& space, const Sequence& sequence, const Choice& choice);

  // fetch.cc: from drives to host memory
  using FetchId = std::pair<SpaceNumber, key::BlockKey>;
  Path* hold(Space& space, index::PinId pin);  // takes the pin over; its first user is the caller
  void release(Path* path);                    // by one user
  void fetch_for(JobKey key, Job& job, const proto::TransferRequest& request, std::span<const key::BlockKey> keys,
                 std::span<const index::Slot> slots);
  void fetch_ahead(Space& space, const Sequence& sequence, std::uint32_t end);
  Fetch& add_fetch(Space& space, Path* path, std::uint32_t at, const key::BlockKey& key);
  Job* waiting_job(JobKey key, std::uint32_t at) const;
  bool awaited(const Fetch& fetch) const;
  void forsake_fetches(Job& job);
  enum class Begun : std::uint8_t { kYes, kNothing, kNoRoom, kBusy, kBudget };
  Begun begin_fetch(Space& space, const key::BlockKey& key, bool prefetch);
  void end_fetch(const DiskIo& io, DiskOutcome outcome, std::vector<JobKey>& arrived);
  void drop_fetch(Space& space, const key::BlockKey& key, Reason reason);
  void deliver(const Fetch& fetch, index::Slot slot, std::vector<JobKey>& arrived);
  void send_arrived(JobKey key, Job& job);
  void send_arrived(std::span<const JobKey> jobs);
  void pump_disk();
  bool pump_fetches(std::deque<FetchId>& queue, bool prefetch);
  bool make_way(const Space& space);

  // scrub.cc: what lies on drives, checked
  void pump_scrub();
  std::optional<Nanos> next_check() const;
  bool find_next_check();
  bool begin_check(Path& path);
  void give_up_check(DiskIo& io);
  void end_check(const DiskIo& io, DiskOutcome outcome);
  void end_scrub(ScrubStatus::State state);
  void drop_bad(const DiskIo& io, DiskOutcome outcome);

  // import.cc: from beyond the machine to host memory
  double block_nanos(const Engine& engine, const Sequence& sequence) const;
  void look_beyond(Engine& engine, Sequence& sequence, Served& served);
  std::uint32_t coming(const Space& space, std::span<const key::BlockKey> keys, double& bytes) const;
  Import* begin_import(Space& space, std::span<const key::BlockKey> keys, index::PinId pin, std::uint32_t first,
                       std::uint32_t end);
  void ask_remote(Import& import);
  void import_ahead(Space& space, const Sequence& sequence);
  void end_prefetch(Import& import);
  void import_for(JobKey key, Job& job, const proto::TransferRequest& request, std::span<const key::BlockKey> keys);
  void publish(Import& import, std::vector<JobKey>& arrived);
  void publish_all(const Space& space, std::vector<JobKey>& arrived);
  bool deliver(const Import& import, std::uint32_t block, const Waiter& waiter);
  void give_up_rest(Import& import, std::uint32_t from, Reason reason);
  bool awaited(const Import& import) const;
  void forsake_imports(const Job& job);
  void sweep_imports(Space& space);
  void disown_imports(Space& space);
  std::uint32_t imported_slots(const Space& space) const;

  // loans.cc: to other nodes
  std::uint32_t matching(Space& space, std::span<const key::BlockKey> keys);
  void answer(LoanId id, Lent& lent);
  void lend_arrived(const Fetch& fetch);
  void lend_without(const Fetch& fetch, Reason reason);
  bool waits_for(LoanId id, const Fetch& fetch) const;
  void shorten(Lent& lent, std::uint32_t count);
  std::uint32_t loans_of(const Space& space) const;

  // damage.cc
  static index::Slot take_slot(Space& space);
  void note_sums(JobKey key, const Job& job, std::uint32_t number, std::span<const std::uint64_t> sums);
  void drop_damaged(Space& space, index::PinId pin, std::uint32_t at, index::Slot host);
  void give_back_damaged(Space& space);

  // write_behind.cc: from host memory to drives, and what lies there
  static ModelName model_name(const std::array<std::byte, 32>& fingerprint);
  void open_disk(Space& space, std::uint32_t block_tokens);
  admission::AdmissionFilter::Options admission_of(const Space& space, std::uint32_t block_tokens) const;
  void note_hits(Space& space, const Sequence& sequence);
  void note_saved(Job& job);
  void write_behind(Space& space, index::PinId pin);
  void pump_writes();
  std::optional<index::Slot> take_disk_slot(Space& space, const std::vector<bool>& refused, bool& busy);
  Begun begin_write(Path* path, std::uint32_t at);
  void end_write(const DiskIo& io, DiskOutcome outcome, Reason reason);
  void check_disk_invariants() const;

  // store_writes.cc: from host memory to a store beyond the machine
  struct StoreRun;
  std::uint32_t first_unstored(Space& space, index::PinId pin);
  void store_beyond(Space& space, index::PinId pin);
  void forget_end(std::list<StoreRun>::iterator run);
  void pump_store();
  void gather(Space& space, index::PinId pin, std::uint32_t begin, std::uint32_t end, std::uint32_t write_blocks);
  void begin_store_write(StoreRun& run);
  void end_run(StoreRun& run);
  void give_up_run(StoreRun& run, Reason reason);
  void disown_store_runs(Space& space);
  std::optional<Nanos> store_deadline() const;
  void queue_for_store(Space& space, index::PinId pin, std::uint32_t begin, std::uint32_t end,
                       std::uint32_t write_blocks);
  std::uint64_t store_room(const Space& space) const;  // for so many blocks
  bool store_is_busy() const;
  void check_store_invariants() const;

  // drain.cc: to the store, what only host memory has
  void pump_offers();
  std::optional<Nanos> offers_deadline() const;
  void look_for_offers();
  bool offer(const index::PrefixIndex::Part& part, Space& space);

  // changes.cc
  void open_feed(Space& space);
  void close_feeds();
  void describe_path(Space& space, index::PinId pin, std::uint32_t first,
                     std::span<const events::DescriptionRef> known);
  void describe_saved(const Job& job);
  std::uint32_t described(const Space& space, Sequence& sequence) const;

  NodeOptions options_;
  Outbox& outbox_;
  RangeAllocator ranges_;
  NodeStats stats_;
  std::unordered_map<EngineHandle, std::unique_ptr<Engine>> engines_;
  std::unordered_map<AgentHandle, Agent> agents_;
  std::unique_ptr<events::Feed> feed_;  // null: nobody follows
  std::vector<std::unique_ptr<Space>> spaces_;
  std::map<JobKey, std::unique_ptr<Job>> jobs_;
  std::set<std::pair<Nanos, JobKey>> deadlines_;
  std::unique_ptr<Disk> disk_;      // null without drives
  std::unique_ptr<Remote> remote_;  // null if there is nothing beyond the machine
  std::unique_ptr<Store> store_;    // null if nothing is kept there
  std::map<LoanId, std::unique_ptr<Lent>> loans_;
  std::set<std::pair<Nanos, LoanId>> loan_deadlines_;  // of those that are not answered
  std::uint64_t lent_bytes_ = 0;
  std::vector<index::PrefixIndex::Evicted> evicted_;  // scratch
  std::vector<plan::Arrival> arrivals_;               // scratch
  std::uint64_t sequence_keys_ = 0;
  SpaceNumber next_space_ = 1;
  EngineHandle next_engine_ = 1;
  AgentHandle next_agent_ = 1;
  Nanos now_ = 0;  // the latest that was told
  bool draining_ = false;
  bool lends_ = true;
};

}  // namespace flexkv::node
