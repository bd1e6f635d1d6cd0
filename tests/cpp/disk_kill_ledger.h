// What processes that use the SSD tier and are killed have in common, in memory that they share with their parent: what
// was asked of the tier, and what it said.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "flexkv/disk/directory.h"

namespace flexkv::testing {

constexpr std::uint32_t kKillSlotsPerDrive = 32;
constexpr std::uint32_t kKillSlots = 2 * kKillSlotsPerDrive;

// One write: a version of a key's bytes. Versions are never used twice, later ones are higher.
struct KillEntry {
  std::uint32_t key = 0;
  std::uint64_t version = 0;
  std::uint64_t generation = 0;  // so many resets were asked for before it
};

// What may lie in a slot. A kill finds it before or after any of the changes, never between: each is one store.
class KillSlot {
 public:
  void begin(const KillEntry& entry) {
    state_ &= ~kPending;
    entries_[~state_ & kWhich] = entry;
    state_ |= kPending;
  }
  // What was begun lies there.
  void done() { state_ = ((state_ & kWhich) ^ kWhich) | kDone; }
  // What was done cannot be read any more. Its record may be found all the same until the next write.
  void lost() { state_ &= ~kDone; }
  // What no reset of before `generation` took belongs to `now`.
  void renew(std::uint64_t generation, std::uint64_t now) {
    for (KillEntry& entry : entries_) {
      if (entry.generation >= generation) entry.generation = now;
    }
  }

  bool has_done() const { return (state_ & kDone) != 0; }
  bool is_pending() const { return (state_ & kPending) != 0; }
  const KillEntry& done_entry() const { return entries_[state_ & kWhich]; }
  const KillEntry& pending_entry() const { return entries_[~state_ & kWhich]; }

 private:
  static constexpr std::uint32_t kWhich = 1, kDone = 2, kPending = 4;
  std::array<KillEntry, 2> entries_{};
  std::atomic<std::uint32_t> state_ = 0;
};

enum class KillPhase : std::uint8_t { kStarting, kOpening, kReading, kWriting, kResetting, kClosing };
constexpr std::size_t kKillPhases = 6;

struct KillTotals {
  std::atomic<std::uint64_t> openings, writes, reads, refused_reads, resets;
  // At openings: blocks found, those that had to be, slots whose last write a kill cut off, of which so many are there.
  std::atomic<std::uint64_t> recovered, expected, cut_off, completed;
};

struct KillLedger {
  // ---- set by the parent, for the next process
  std::uint64_t seed = 0;
  bool strict = false;
  std::uint64_t slot_bytes = 0;
  std::uint64_t share_bytes = 0;      // of each directory
  std::uint32_t steps = 0;            // of using the tier, between an opening and a closing
  std::uint32_t resets_in_1000 = 0;   // steps
  std::uint32_t reopens_in_1000 = 0;  // steps

  // ---- how far the process is
  std::atomic<KillPhase> phase = KillPhase::kStarting;
  std::array<std::atomic<std::uint32_t>, kKillPhases> arrivals{};
  std::atomic<std::uint32_t> steps_done = 0;

  // ---- what must, may and must not be found
  std::array<KillSlot, kKillSlots> slots{};
  std::atomic<std::uint64_t> resets_begun = 0;
  std::atomic<std::uint64_t> resets_durable = 0;  // the highest generation that was reported so
  std::atomic<std::uint64_t> next_version = 1;
  std::atomic<bool> established = false;  // an opening has ended
  disk::Secret secret{};                  // if so

  KillTotals totals{};
  std::atomic<bool> failed = false;
  std::array<char, 512> failure{};
};

}  // namespace flexkv::testing
