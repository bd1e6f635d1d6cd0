// What the disk tier is asked and what it answers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/time.h"
#include "flexkv/disk/directory.h"
#include "flexkv/disk/recovery.h"
#include "flexkv/file/drive.h"

namespace flexkv::disk {

enum class SpaceHandle : std::uint32_t {};

// Chosen by the caller, below kOpIdEnd, never used twice.
using OpId = std::uint64_t;
constexpr OpId kOpIdEnd = OpId{1} << 62;

// Slot s lies on drive s % drives at index s / drives.
struct WriteOp {
  OpId id = 0;
  SpaceHandle space{};
  std::uint32_t slot = 0;
  key::BlockKey key;
  key::BlockKey parent;              // kNoParent: first block of a chain
  std::span<const std::byte> bytes;  // slot_bytes of them, 4 KiB aligned, unchanged until the completion
  Nanos deadline = 0;                // by which it must have begun; 0: none
  std::vector<SummedExtent> sums{};  // what must be in the bytes
};

struct ReadOp {
  OpId id = 0;
  SpaceHandle space{};
  std::uint32_t slot = 0;
  key::BlockKey key;
  // slot_bytes, 4 KiB aligned, the tier's until the completion; none: the block is only to be verified.
  std::span<std::byte> bytes;
  file::Urgency urgency = file::Urgency::kLoad;
  Nanos deadline = 0;
};

enum class Admission : std::uint8_t {
  kQueued,       // a completion follows
  kBusy,         // the drive's queue is full
  kUnavailable,  // the drive is off, or does not take writes
  kQuarantined,  // a slot that failed more than once; writes only
  kLater,        // the drive's meter will grant it soon, and says when; writes only
  kBudget,       // the drive's meter refuses it; writes only
};

constexpr std::uint64_t kPageBytes = 4096;  // what a drive is given at least, also for a record

// How much a drive is written to. Asked for every byte of blocks, records and headers. What a file system writes for
// itself is not known here. Thread-safe; called under locks: must not block, nor call anybody but who persists it.
class WriteMeter {
 public:
  enum class Answer : std::uint8_t { kGranted, kLater, kRefused };
  virtual ~WriteMeter() = default;
  virtual Answer take(std::uint64_t bytes) = 0;
  virtual void charge(std::uint64_t bytes) = 0;  // they are written in any case: an epoch
};

enum class Outcome : std::uint8_t {
  kDone,
  kFailed,       // `error_number` says why
  kChecksum,     // what lies there is not this block; it will not be found again
  kDeadline,     // not begun in time
  kCanceled,     // by cancel()
  kUnavailable,  // the drive went off
  kNoRoom,       // the drive or its share is full: the slot cannot be made
  kDamaged,      // what was to be written is not what its sums say
};
const char* outcome_name(Outcome outcome);

struct Completion {
  OpId id = 0;
  Outcome outcome = Outcome::kDone;
  int error_number = 0;
};

struct Opened {
  // For each drive so many slots can be used at most; 0: the drive is off for this space until it is opened again.
  std::vector<std::uint32_t> slots;
  std::uint64_t recovered = 0;
  Discarded discarded;
  std::vector<std::string> dropped_files;  // one line for each drive whose old files were not used
  Nanos duration = 0;
};

struct Health {
  bool reads = true;
  bool writes = true;
  std::string why;  // not both
};

// Called on the tier's threads, several calls at once, but not from inside a call to the tier. Must not block; may call
// the tier (not close()).
class TierSink {
 public:
  virtual ~TierSink() = default;
  virtual void on_completions(std::span<const Completion> completions) = 0;
  // A read's deadline passed, or its drive went off, while the drive has its buffer: whoever waits should give up. Its
  // completion follows.
  virtual void on_overdue(OpId id) = 0;
  // Blocks found, parents before children: they can be read from now on. Valid during the call.
  virtual void on_recovered(SpaceHandle space, std::span<const Chain> chains) = 0;
  // The last word on open_space(): from now on the space's slots can be written and read.
  virtual void on_opened(SpaceHandle space, const Opened& opened) = 0;
  virtual void on_health(unsigned drive, const Health& health) = 0;
};

std::uint32_t seconds_since_1970();

struct TierOptions {
  std::uint64_t bytes_max = 0;  // over all directories and spaces, records included
  bool strict = false;          // a write is done when it is on stable storage
  // Requests of the tier that a drive has at most; the drive must accept kSpareRequests more.
  std::uint32_t requests_per_drive_max = 1024;
  std::function<Nanos()> now = monotonic_now;
  std::function<std::uint32_t()> wall_seconds = seconds_since_1970;
};
constexpr std::uint32_t kSpareRequests = 64;

// One directory.
struct VolumeSpec {
  std::string directory;  // for messages
  std::string why_not;    // not empty: it cannot be used
  FoundSpaces found;
  std::function<Result<std::unique_ptr<file::Drive>>(file::DriveSink&)> open_drive;
  std::shared_ptr<WriteMeter> meter{};  // null: all is granted
};

struct VolumeStats {
  std::string directory;
  std::string form;  // how it is read and written, as the drive describes it; empty when it could not be opened
  Health health;
  std::uint64_t share_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t closed_bytes = 0;  // of them, of spaces that are not open
  std::uint32_t queued = 0;        // requests
  std::uint64_t blocks_written = 0;
  std::uint64_t blocks_read = 0;
  std::uint64_t block_bytes_written = 0;
  std::uint64_t block_bytes_read = 0;
  std::uint64_t record_bytes_written = 0;
  std::uint64_t record_writes = 0;
  std::uint64_t checksum_failures = 0;
  std::uint64_t failed_writes = 0;
  std::uint64_t failed_reads = 0;
  std::uint64_t quarantined_slots = 0;
  std::uint64_t removed_spaces = 0;  // their files made room for others
  file::DriveStats drive;
};

}  // namespace flexkv::disk
