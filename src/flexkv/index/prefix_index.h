// One prefix index for all tiers of a cache: which blocks are known, in which tiers each has a slot, which are pinned,
// and which go first when a tier needs room. Pure logic: no thread, no lock, no system call, no clock.
//
// A block is one key. Keys are chained, so equal keys mean equal prefixes. Blocks lie in RUNS, contiguous arrays that
// form a forest: a run follows the last block of its parent run and is split where a branch starts in its middle.
// Blocks that are added behind a run without children extend it, so short turns do not make short runs. A hash table
// leads from the first key of a run to the run.
//
// Thread-compatible: one thread at a time, const calls from several. Slots are only numbers here; those that come out
// (`rejected`, Evicted) belong to the caller again. Times never run backwards inside: an earlier `now` counts as the
// latest seen. Bounds: memory follows the most blocks ever held (memory_bytes()) plus Options::ghost_count_max ghosts
// of 16 bytes; the caller bounds blocks by its slots and pins by its requests. Cost: a lookup is one probe of the table
// per run plus one binary search; inserting and evicting is O(1) a block, amortised; a touch visits the runs of the
// path and their segments.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/events/feed.h"
#include "flexkv/index/block_array.h"
#include "flexkv/index/ghost_table.h"
#include "flexkv/index/policy.h"
#include "flexkv/index/run_table.h"
#include "flexkv/index/slab.h"
#include "flexkv/key/block_key.h"

namespace flexkv::index {

enum class PinId : std::uint32_t {};

class PrefixIndex {
 public:
  struct Options {
    unsigned tier_count = 1;  // 1..kTierCountMax
    std::array<PolicyOptions, kTierCountMax> policy;
    std::size_t ghost_count_max = 1U << 16;  // for the default policy: about the number of blocks of the tiers
  };
  struct Match {
    std::uint32_t block_count;
    PinId pin;
  };
  struct Evicted {
    key::BlockKey key;
    Slot slot;
    Tier tier;
  };

  explicit PrefixIndex(const Options& options);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // ---- lookups and pins --------------------------------------------------------------------------------------------
  // A pin holds a position: a block, or the root before all blocks. Evictions take neither that block nor its
  // ancestors, in any tier. It stays valid whatever happens elsewhere, until unpin().

  // The longest prefix of `keys` of which every block has a slot in at least one tier, pinned at its last block (at the
  // root if it is empty). `touch`: counts as a use, by which policies judge.
  Match match(std::span<const key::BlockKey> keys, bool touch, Nanos now);
  // Goes on from a pinned position, and moves the pin. Returns the number of `keys` matched now, and the same pin. A
  // touch counts as a use of the blocks matched now, and for those before them only as recent.
  Match extend(PinId pin, std::span<const key::BlockKey> keys, bool touch, Nanos now);
  PinId clone(PinId pin);
  // `out` receives the blocks that clear() could not free because of this pin.
  void unpin(PinId pin, std::vector<Evicted>& out);
  // Blocks from the root to the pinned position, that included.
  std::uint32_t depth(PinId pin) const;
  // The slots in `tier` of blocks [first, first + out.size()) of the pinned path, kNoSlot where there is none.
  // REQUIRES: first + out.size() <= depth(pin)
  void collect(PinId pin, Tier tier, std::uint32_t first, std::span<Slot> out) const;
  // The same for their keys.
  void collect_keys(PinId pin, std::uint32_t first, std::span<key::BlockKey> out) const;

  // ---- residency ---------------------------------------------------------------------------------------------------

  // Gives blocks behind the pinned position a slot each in `tier`, and moves the pin to the last of them. Blocks that
  // are known already take the slot if they lack one in this tier; if not, it is returned in `rejected`: there are
  // never two copies. Counts as recent use of the path in this tier. A detached pin (clear()) takes nothing and stays.
  // REQUIRES: keys.size() == slots.size(), no slot is kNoSlot
  void insert(PinId pin, Tier tier, std::span<const key::BlockKey> keys, std::span<const Slot> slots, Nanos now,
              std::vector<Slot>& rejected);
  // The same for blocks [first, first + slots.size()) of the pinned path, which does not move.
  // REQUIRES: first + slots.size() <= depth(pin)
  void add_residency(PinId pin, Tier tier, std::uint32_t first, std::span<const Slot> slots, Nanos now,
                     std::vector<Slot>& rejected);
  // Takes the slot of block `at` of the pinned path away, pinned or not, and returns it (kNoSlot if there was none):
  // for blocks that turned out to be bad. A block without any slot ends what match() finds; why_missing() then says
  // `why`. REQUIRES: at < depth(pin)
  Slot drop(PinId pin, Tier tier, std::uint32_t at, MissReason why);

  // ---- making room -------------------------------------------------------------------------------------------------

  // Takes the slots of up to `count` blocks of a tier by its policy: no pinned ones, none behind which another block of
  // the tier stands. Returns how many; fewer only if no more may go. A block without any slot left leaves the index and
  // becomes a ghost.
  std::uint32_t evict(Tier tier, std::uint32_t count, Nanos now, std::vector<Evicted>& out);
  // Empties the index. Pinned blocks are detached: no lookup finds them, their slots can be collected, and the last
  // unpin() that holds them frees them.
  void clear(Nanos now, std::vector<Evicted>& out);

  // Why a key that match() did not find is missing. `gone_at`, if not null, is set when the answer is not kNeverSeen.
  MissReason why_missing(const key::BlockKey& key, Nanos* gone_at) const;

  // ---- visiting a whole tier ---------------------------------------------------------------------------------------
  // A scan finds each block that has a slot in its tier from begin_scan() on until it is found, whatever happens to
  // others meanwhile. Those that come later it may find, and some twice.

  // Ends the scan before, if there is one.
  void begin_scan(Tier tier);
  struct Scanned {
    std::optional<PinId> pin;  // of the next block
    bool over = false;         // there is none
  };
  // Looks at so many blocks at most: neither a pin nor the end means that there is more to look at.
  Scanned scan(std::uint32_t looks_max);
  // A scan that is not brought to its end has to be ended: until then what it is to visit is kept up to date.
  void end_scan() { scan_ = {}; }

  // ---- visiting a tier by use
  // ----------------------------------------------------------------------------------------

  // Blocks of a tier in a row that were used alike.
  struct Part {
    key::BlockKey run;      // says where, as long as that run begins as it did
    std::uint32_t end = 0;  // behind its last block there
    unsigned uses = 0;      // as far as the policy counts them
    Nanos used = 0;         // last
    // Used more often, or as often and later.
    bool hotter_than(const Part& other) const { return std::pair(uses, used) > std::pair(other.uses, other.used); }
  };
  // Calls visit(part, keys, slots) for parts of the runs from number `first` on (0: of all), keys and slots being those
  // of its blocks, slots(t) their places in tier t. Returns the number to go on at, once it has looked at so many
  // blocks or runs; nullopt: there are no more. Runs that are split between two calls may be left out.
  template <typename Visit>
  std::optional<std::uint32_t> visit_parts(Tier tier, std::uint32_t first, std::uint32_t looks_max, Visit visit) const {
    std::uint32_t looks = 0;
    for (RunId id = first; id < runs_.end(); ++id) {
      if (looks >= looks_max) return id;
      ++looks;
      const Run& run = runs_[id];
      if (run.detached || run.tiers[tier].blocks == 0) continue;
      looks += run.blocks.size();
      for (SegmentId s = run.tiers[tier].top; s != kNone; s = segments_[s].below) {
        const Segment& segment = segments_[s];
        const std::uint32_t begin = start(segment);
        const std::uint32_t count = segment.end - begin;
        visit(Part{run.blocks.keys()[0], segment.end, segment.uses, segment.used},
              std::span(run.blocks.keys() + begin, count),
              [&](Tier at) { return std::span<const Slot>(run.blocks.slots(at) + begin, count); });
      }
    }
    return std::nullopt;
  }
  // The part's last block; nullopt: it is gone.
  std::optional<PinId> pin_part(const Part& part);

  // ---- told to others ----------------------------------------------------------------------------------------------

  // From now on says to the feed, which it must outlive, what lookups can find. Null, as at first: to nobody.
  void tell(events::SpaceFeed* feed) { feed_ = feed; }
  // Appends all that lookups can find, parents first. REQUIRES: there is a feed
  void append_kept(std::vector<events::Change>& out) const;

  // ---- numbers -----------------------------------------------------------------------------------------------------

  std::uint64_t block_count(Tier tier) const { return block_count_[tier]; }  // slots held, detached ones included
  std::uint32_t run_count() const { return runs_.size(); }
  std::uint32_t pin_count() const { return pins_.size(); }
  std::uint32_t segment_count() const { return segments_.size(); }
  // All that this object has allocated.
  std::size_t memory_bytes() const;

  // Walks everything and asserts that it is consistent. For tests.
  void check_invariants() const;

 private:
  // A run of so many blocks is not moved to grow: what comes behind it is a run of its own. That bounds what an insert
  // copies (10 KiB with one tier). Each further run on a path costs a lookup several cache misses: half of this makes
  // inserts about twice as fast and lookups of long conversations about twice as slow.
  static constexpr std::uint32_t kGrowingBlocksMax = 512;

  using RunId = std::uint32_t;
  using SegmentId = std::uint32_t;

  struct Residency {             // of a run in a tier
    SegmentId top = kNone;       // its segments, a stack whose top is the deepest
    std::uint32_t blocks = 0;    // with a slot
    std::uint32_t children = 0;  // child runs at or below which blocks have a slot
    bool any() const { return blocks > 0 || children > 0; }
  };
  struct Run {
    BlockArray blocks;
    RunId parent = kNone;             // kNone: the root
    std::uint32_t depth = 0;          // blocks before its first
    std::uint32_t child_count = 0;    // they all follow its last block
    std::uint32_t bare = 0;           // blocks without a slot in any tier: others stand behind them, or a pin on them
    std::uint32_t pin_count = 0;      // pins in it and below it
    std::uint32_t first_pin = kNone;  // those in it, a list
    bool detached = false;
    std::array<Residency, kTierCountMax> tiers;
  };
  struct Pin {
    RunId run = kNone;  // kNone: the root
    std::uint32_t at = 0;
    std::uint32_t previous = kNone;
    std::uint32_t next = kNone;
    bool live = false;
  };
  struct Position {
    RunId run = kNone;
    std::uint32_t at = 0;  // block of the run; nothing at the root
  };

  // Calls visit(run, its first block, count, position in the range) for the runs of blocks [first, first + count) of
  // the pinned path, the last one first.
  template <typename Visit>
  void visit_path(PinId pin, std::uint32_t first, std::size_t count, Visit visit) const;

  // runs.cc: the forest
  RunId find_child(RunId parent, const key::BlockKey& key) const;
  // How many blocks of `keys` equal those of the run from `first` on.
  std::uint32_t common_length(const Run& run, std::uint32_t first, std::span<const key::BlockKey> keys) const;
  std::uint32_t walk(Position& position, std::span<const key::BlockKey> keys) const;
  RunId add_run(RunId parent, std::uint32_t depth, std::span<const key::BlockKey> keys);
  RunId split(RunId id, std::uint32_t at);
  void split_segments(RunId head_id, RunId tail_id, std::uint32_t at, Tier tier);
  void trim(RunId id);
  void remove_run(RunId id);
  bool is_bare(const Run& run, std::uint32_t at) const {
    for (Tier tier = 0; tier < tier_count_; ++tier) {
      if (run.blocks.slots(tier)[at] != kNoSlot) return false;
    }
    return true;
  }
  void resize_blocks(Run& run, std::uint32_t size);
  // Of the block before, zero if there is none.
  key::BlockKey parent_key(const Run& run, std::uint32_t at) const;

  // prefix_index.cc: pins
  Pin& pin_of(PinId id);
  const Pin& pin_of(PinId id) const;
  PinId add_pin(Position position);
  void link_pin(std::uint32_t id, Position position);
  void unlink_pin(std::uint32_t id);
  void move_pin(std::uint32_t id, Position position);
  // Blocks of the run, from its first, that pins hold.
  std::uint32_t pinned_length(const Run& run) const;
  void trim_detached(RunId id, std::vector<Evicted>& out);
  void release(Run& run, std::uint32_t size, std::vector<Evicted>& out);

  // residency.cc: segments
  std::uint32_t start(const Segment& segment) const;
  SegmentId cut(Run& run, Tier tier, SegmentId id, std::uint32_t at);
  void merge_below(SegmentId id, Tier tier);
  void shrink_segment(Run& run, Tier tier, SegmentId id, SegmentId above, std::uint32_t lost);
  void touch_path(Position position, std::uint32_t hits_from, Tier tier, Nanos now);
  void touch_run(RunId id, std::uint32_t end, std::uint32_t hits_from, Tier tier, Nanos now);
  Position add_blocks(Position position, Tier tier, std::span<const key::BlockKey> keys, std::span<const Slot> slots);
  void fill(RunId id, Tier tier, std::uint32_t first, std::span<const Slot> slots, std::vector<Slot>& rejected);
  void add_segment(RunId id, Tier tier, std::uint32_t first, std::uint32_t end, unsigned remembered);
  void note_resident(RunId id, Tier tier, std::uint32_t count);
  void note_lost(RunId id, Tier tier, std::uint32_t count);
  void lay_bare(RunId id, Tier tier);

  // scan.cc
  void scan_past_split(RunId head, RunId tail, std::uint32_t at);

  // eviction.cc
  std::uint32_t take_from_end(RunId id, Tier tier, std::uint32_t floor, std::uint32_t count, std::vector<Evicted>& out);

  Nanos advance(Nanos now) { return now_ = now > now_ ? now : now_; }

  const unsigned tier_count_;
  Nanos now_ = 0;
  RunTable table_;
  Slab<Run> runs_;
  Slab<Pin> pins_;
  Slab<Segment> segments_;
  GhostTable ghosts_;
  std::array<std::unique_ptr<Policy>, kTierCountMax> policies_;
  std::array<std::uint64_t, kTierCountMax> block_count_{};
  std::size_t block_bytes_ = 0;  // of all BlockArrays
  events::SpaceFeed* feed_ = nullptr;
  struct Scan {
    Tier tier = 0;
    Position next{kNone, 0};          // runs by number; kNone: there is no scan
    std::vector<Position> split_off;  // to be visited besides, each to the end of its run
  } scan_;
};

}  // namespace flexkv::index
