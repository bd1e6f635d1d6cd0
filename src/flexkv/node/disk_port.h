// The node's view of its drives. The node says which block lies in which slot; whoever implements this moves the bytes.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/time.h"
#include "flexkv/index/block_array.h"
#include "flexkv/key/block_key.h"

namespace flexkv::node {

using SpaceNumber = std::uint32_t;  // of a space in this node, never used twice

// Names a space on drives, for ever. Its first half is the same for all spaces of one model.
using SpaceName = std::array<std::uint8_t, 32>;
using ModelName = std::array<std::uint8_t, 16>;
using DiskOp = std::uint64_t;  // one read or write, never used twice

// Slot s of a space lies on drive s % drives.
struct DiskTransfer {
  DiskOp op = 0;
  SpaceNumber space = 0;
  index::Slot slot = 0;
  key::BlockKey key;
  key::BlockKey parent;              // zero: the block is the first of a chain (writes)
  std::uint64_t host_offset = 0;     // of slot_bytes in the pool, not touched by others until on_disk_done
  Nanos deadline = 0;                // by which it must have begun; 0: none
  std::vector<SummedExtent> sums{};  // what must be there, or it is not written (writes)
};

enum class DiskAdmission : std::uint8_t {
  kQueued,       // Node::on_disk_done follows
  kBusy,         // the drive's queue is full: again when something is done
  kUnavailable,  // the drive is off
  kBadSlot,      // not to be used again (writes)
  kLater,        // not now; Node::on_disk_ready follows (writes)
  kBudget,       // the drive has been written to as much as it may be for now (writes)
};

enum class DiskOutcome : std::uint8_t {
  kDone,
  kFailed,
  kChecksum,     // what lies there is not this block
  kDeadline,     // not begun in time
  kUnavailable,  // the drive went off
  kNoRoom,       // there cannot be such a slot now (writes)
  kCanceled,     // by cancel(), before all of it had begun
  kDamaged,      // what was to be written is not what its sums say (writes)
};

struct DiskResult {
  DiskOp op = 0;
  DiskOutcome outcome = DiskOutcome::kDone;
};

// Blocks found on the drives: the first follows `parent`, which is zero or the last block of an earlier chain.
struct RecoveredChain {
  key::BlockKey parent;
  std::span<const key::BlockKey> keys;
  std::span<const index::Slot> slots;
};

// Called under the node's lock; must not call back and must not block.
class DiskPort {
 public:
  virtual ~DiskPort() = default;
  virtual unsigned drive_count() const = 0;
  // Node::on_disk_recovered any number of times, then Node::on_disk_opened.
  virtual void open_space(SpaceNumber space, const SpaceName& name, std::uint64_t slot_bytes) = 0;
  // Its slots stay on the drives. REQUIRES: no transfer is under way
  virtual void close_space(SpaceNumber space) = 0;
  // All that was written before is never found again.
  virtual void reset_space(SpaceNumber space) = 0;
  // The same for the spaces of a model, or of all models, that are not open.
  virtual void reset_closed_spaces(const std::optional<ModelName>& model) = 0;
  virtual DiskAdmission write(const DiskTransfer& transfer) = 0;
  virtual DiskAdmission read(const DiskTransfer& transfer) = 0;
  // Reads the block only to see whether it is right, when the drive has nothing else to do; to no place in the pool.
  virtual DiskAdmission verify(const DiskTransfer& transfer) = 0;
  // Asks, of a read or verify() that nobody waits for any more: what has not begun need not. Node::on_disk_done follows
  // all the same; what has begun ends by itself. Nothing, if it has ended.
  virtual void cancel(DiskOp op) = 0;
  virtual bool can_read(unsigned drive) const = 0;
  // 0: drives may be written to as one likes, 1: not at all; the nearer, the choosier the node is.
  virtual double write_pressure() const = 0;
};

}  // namespace flexkv::node
