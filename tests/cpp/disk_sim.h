// A node's use of the disk tier over simulated drives, through lives that end in power cuts, kills and closes, with
// faults and damage by seed. What is checked:
// - a read that is done gives the bytes of a write under that key, in that space, since its last reset;
// - blocks are recovered parents first, each slot once, and none from before a reset that was reported durable;
// - what was done is there after a kill, and in strict mode after a power cut, unless it was damaged on purpose or its
//   file was cut for want of room;
// - every transfer ends exactly once, openings and resets are answered, and deadlines too, while a drive hangs;
// - there are never more bytes on a drive than its share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "flexkv/disk/tier.h"
#include "flexkv/testing/sim_drive.h"

namespace flexkv::testing {

struct DiskSimTotals {
  std::uint64_t lives = 0, kills = 0, power_cuts = 0, openings = 0;
  std::uint64_t writes_done = 0, writes_failed = 0;
  std::uint64_t reads_done = 0, verified = 0, reads_failed = 0, checksum = 0, deadline = 0, overdue = 0, refused = 0;
  std::uint64_t resets = 0, resets_durable = 0;
  std::uint64_t recovered = 0, expected = 0;  // the latter: had to be there, and were
  std::uint64_t damages = 0, hangs = 0, unhealthy = 0, absent = 0;
};

class DiskSim final : public disk::TierSink {
 public:
  DiskSim(std::uint64_t seed, bool verbose, DiskSimTotals& totals);
  void run();

  void on_completions(std::span<const disk::Completion> completions) override;
  void on_overdue(disk::OpId id) override;
  void on_recovered(disk::SpaceHandle space, std::span<const disk::Chain> chains) override;
  void on_opened(disk::SpaceHandle space, const disk::Opened& opened) override;
  void on_health(unsigned drive, const disk::Health& health) override;

 private:
  using Key = std::uint32_t;  // 1 + its place in the forest; 0: none
  struct FreeBytes {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  struct Op {
    bool write = false;
    unsigned model = 0;
    std::uint32_t slot = 0;
    Key key = 0;
    std::uint64_t version = 0;  // writes only
    std::uint64_t generation = 0;
    Nanos deadline = 0;
    bool overdue = false;
    bool excused = false;  // it may fail for what the simulation does to it
    std::unique_ptr<std::byte, FreeBytes> bytes;
  };
  struct Expected {
    Key key = 0;
    std::uint64_t generation = 0;
  };
  struct Model {
    disk::SpaceId id{};
    std::uint64_t slot_bytes = 0;
    std::string blocks_name, records_name;
    std::vector<Key> parents;                                        // by key
    std::map<Key, std::map<std::uint64_t, std::uint64_t>> versions;  // all ever begun, to their generation
    std::map<Key, std::uint64_t> last_version;
    std::map<std::uint32_t, Expected> expected;                  // by slot: what must be found
    std::map<std::uint64_t, std::set<unsigned>> durable_resets;  // drives that have the generation written down
    std::vector<std::uint64_t> blocks_bytes;                     // by drive, as last seen
    bool in_doubt = false;  // what comes back after damage, or with a drive, may hide blocks
    // ---- of one opening
    disk::SpaceHandle handle{};
    enum class State { kClosed, kOpening, kOpen } state = State::kClosed;
    std::shared_ptr<std::vector<std::uint32_t>> slots;
    std::uint64_t floor = 0;       // oldest generation that may be served
    std::uint64_t generation = 0;  // of writes now
    bool confirmed = false;        // `generation` will be found after a restart
    bool was_reset = false;        // during the opening
    Nanos opened_by = 0;
    std::map<std::uint32_t, Key> found;
    std::map<std::uint32_t, Key> held;
    std::map<std::uint32_t, unsigned> busy;
    std::set<std::uint32_t> overlapped;  // written while in use: anything may have become of it
  };
  using Jobs = std::deque<disk::Job>;
  class HandWorkers;
  struct Snapshot {
    unsigned model = 0, drive = 0;
    std::uint32_t index = 0;
    std::vector<std::byte> payload, record;
  };

  // ---- disk_sim.cc
  void start_life();
  void live();
  void end_life();
  void act();
  void open(unsigned number);
  void close(unsigned number);
  void write(unsigned number);
  void read(unsigned number);
  void read_all();
  void reset(unsigned number);
  void hang(bool hanging);
  bool stuck(std::size_t jobs) const { return jobs > 0 && stuck_.contains(static_cast<unsigned>(jobs - 1)); }
  bool run_job();
  void run_jobs();
  void advance(Nanos time);
  void settle();
  bool quiet() const;
  void check_time();
  void check_media();

  // ---- disk_sim_check.cc
  void check(bool right, const std::string& what);
  void note(const std::string& what) const;
  void check_bytes(const Model& model, const Op& op);
  void check_expected(Model& model);
  void forget(Model& model, unsigned drive, std::uint32_t first, std::uint32_t end = ~std::uint32_t{0});
  void forget_header(Model& model, unsigned drive);
  void write_ended(Model& model, const Op& op, disk::Outcome outcome);
  void read_ended(Model& model, const Op& op, disk::Outcome outcome);
  void damage();
  void damage_file(Model& model, unsigned number, unsigned drive);
  void fill(const Model& model, Key key, std::uint64_t version, std::span<std::byte> out) const;
  key::BlockKey block_key(const Model& model, Key key) const;
  Key key_of(const Model& model, const key::BlockKey& key) const;
  unsigned drive_count() const { return static_cast<unsigned>(media_.size()); }

  const std::uint64_t seed_;
  const bool verbose_;
  DiskSimTotals& totals_;
  Prng prng_;
  const bool strict_;
  const bool calm_;  // drives work and are there, so that nothing is excused
  std::vector<std::shared_ptr<SimMedium>> media_;
  std::vector<Model> models_;
  std::uint64_t next_version_ = 1;
  std::uint64_t next_generation_ = 1;
  std::uint64_t share_ = 0;
  std::vector<Snapshot> snapshots_;
  unsigned life_ = 0;
  std::uint32_t wall_seconds_ = 1000;

  // ---- of one life
  Nanos now_ = kSecond;
  std::vector<SimDrive*> drives_;            // null: away
  std::set<unsigned> off_;                   // as they were said to be
  std::vector<std::shared_ptr<Jobs>> jobs_;  // for checksums, then of each drive's lane
  std::set<unsigned> stuck_;                 // drives in which a call of the lane hangs
  std::map<disk::OpId, Op> ops_;
  std::unique_ptr<disk::DiskTier> tier_;
  disk::OpId next_op_ = 1;
  std::uint32_t next_handle_ = 1;
  bool faulty_ = false;
  bool overlaps_ = false;
  bool hung_ = false;                              // a drive was, in this life
  std::map<std::uint64_t, Nanos> resets_pending_;  // by generation: when it must be answered
  std::vector<std::uint64_t> allowed_;  // bytes on each drive: its share, once its lane could cut what is there
};

}  // namespace flexkv::testing
