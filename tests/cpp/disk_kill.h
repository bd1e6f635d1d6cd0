// A process that uses the SSD tier on real files and may be killed at any instruction, and the ledger that it shares
// with its parent and with the processes after it: what it asked of the tier and what it was told. Each process opens
// what the one before left, reads all of it back and compares, then writes, evicts, resets, reopens and closes. What is
// checked:
// - a read that is done gives the very bytes of the last write of that slot, or of one that was under way at a kill;
// - a write that was done is found after a kill, unless it was overwritten or reset since;
// - nothing from before a reset that was reported durable is found or read;
// - opening never fails, nor does anything else: the drives work.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "disk_kill_ledger.h"
#include "flexkv/base/prng.h"
#include "flexkv/disk/tier.h"

namespace flexkv::testing {

// Keys are a forest: the first seven begin chains.
constexpr std::uint32_t kKillKeys = 96;
constexpr std::uint32_t parent_of(std::uint32_t key) { return key < 8 ? 0 : key / 4; }
key::BlockKey block_key(std::uint32_t key);
void fill(std::uint32_t key, std::uint64_t version, std::span<std::byte> out);

// One process's use of the tier.
class KillUser final : public disk::TierSink {
 public:
  KillUser(const std::vector<std::string>& directories, KillLedger& ledger);
  // Until a failure, which goes to the ledger and ends the process with 9, or the end.
  void run();

  void on_completions(std::span<const disk::Completion> completions) override;
  void on_overdue(disk::OpId id) override;
  void on_health(unsigned drive, const disk::Health& health) override;
  void on_recovered(disk::SpaceHandle space, std::span<const disk::Chain> chains) override;
  void on_opened(disk::SpaceHandle space, const disk::Opened& opened) override;

 private:
  struct Op {
    bool write = false;
    std::uint32_t slot = 0;
    KillEntry entry;          // of a read only its key
    std::uint64_t floor = 0;  // generations below it must not be read
    bool must = false;        // be there
    bool opening = false;     // a read of what was left
    unsigned buffer = 0;
  };
  struct FreeBytes {
    void operator()(std::byte* bytes) const { std::free(bytes); }
  };
  using Lock = std::unique_lock<std::mutex>;
  // A machine may be as slow as it likes: nothing here is about time.
  static constexpr Nanos kPatience = 120 * kSecond;
  static constexpr unsigned kInFlight = 16;

  template <typename Condition>
  void wait(Lock& lock, const char* what, Condition condition) {
    check(change_.wait_for(lock, std::chrono::nanoseconds(kPatience), condition), std::string("no end of ") + what);
  }
  std::span<std::byte> buffer(unsigned number) {
    return {pool_.get() + number * ledger_.slot_bytes, static_cast<std::size_t>(ledger_.slot_bytes)};
  }

  // ---- disk_kill.cc
  void enter(KillPhase phase);
  void open_tier(const std::vector<std::string>& directories);
  void open_space(bool reset_at_once);
  void read_back();
  void step();
  void write();
  void read(std::uint32_t slot, std::uint32_t key, bool must, bool opening);
  void reset();
  void close();
  std::optional<std::uint32_t> slot_to_write();
  bool is_held(std::uint32_t key) const;

  // ---- disk_kill_check.cc
  [[noreturn]] void fail(const std::string& what);
  void check(bool right, const std::string& what) {
    if (!right) fail(what);
  }
  void check_expected();
  void ended(const disk::Completion& completion);
  void bytes_read(const Op& op);
  void read_refused(const Op& op);
  // Nothing was asked for that might have taken it.
  bool must_be_there(const KillSlot& slot) const {
    return slot.has_done() && !slot.is_pending() && slot.done_entry().generation >= floor_;
  }

  KillLedger& ledger_;
  Prng prng_;
  const std::unique_ptr<std::byte, FreeBytes> pool_;
  std::vector<std::byte> expected_bytes_;
  std::map<std::uint64_t, std::uint32_t> keys_;  // by the low half of block keys

  std::mutex mutex_;  // guards the ledger's slots and all below
  std::condition_variable change_;
  std::vector<unsigned> free_;  // buffers
  std::map<disk::OpId, Op> ops_;
  std::array<bool, kKillSlots> busy_{};
  disk::OpId next_op_ = 1;
  std::uint32_t handle_ = 0;
  std::uint64_t floor_ = 0;
  bool opened_ = false;
  bool reset_at_once_ = false;
  bool closing_ = false;
  std::map<std::uint32_t, std::uint32_t> recovered_;  // by slot: its key
  std::map<std::uint32_t, std::uint32_t> places_;     // the other way round

  std::unique_ptr<disk::DiskTier> tier_;
  std::optional<disk::Home> home_;  // holds the directories' locks
};

}  // namespace flexkv::testing
