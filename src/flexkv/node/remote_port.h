// The node's view of what lies beyond its machine: blocks that other nodes have, or stores that they share. The node
// says what it wants; whoever implements this knows where that is, and moves the bytes.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/key/block_key.h"
#include "flexkv/node/disk_port.h"

namespace flexkv::node {

using ResetId = std::uint64_t;   // of one reset: random, never 0
using RemoteOp = std::uint64_t;  // one read, never used twice

// Of a chain of blocks: how many, from a given one on, can be had from elsewhere without a gap.
struct RemoteFound {
  std::uint32_t blocks = 0;
  double bytes_per_second = 0;  // at which they are expected; 0: not known
  Nanos wait = 0;               // until the first of them, because of distance and what was asked for before
};

struct RemoteRead {
  RemoteOp op = 0;
  SpaceNumber space = 0;
  std::vector<key::BlockKey> keys;          // the chain, from its first block on
  std::uint32_t first = 0;                  // of the blocks that are wanted: the last ones
  std::vector<std::uint64_t> host_offsets;  // of slot_bytes each in the pool, the port's until on_remote_end
  Nanos deadline = 0;                       // by which it has ended
};

enum class RemoteOutcome : std::uint8_t {
  kDone,         // all blocks came
  kMissing,      // nobody has it any more
  kBusy,         // those who have it give no more for now
  kUnreachable,  // those who have it do not answer
  kDeadline,
  kChecksum,  // what came is not the block
  kCanceled,
  kStoreOff,     // a store is left alone for a while, because it failed or hung
  kStoreFailed,  // a store did not do it
  kDamaged,      // what was to be stored is not what its sums say
};

// Called under the node's lock; must not call back and must not block.
class RemotePort {
 public:
  virtual ~RemotePort() = default;
  virtual void open_space(SpaceNumber space, const SpaceName& name, std::uint64_t slot_bytes) = 0;
  // REQUIRES: no read is under way
  virtual void close_space(SpaceNumber space) = 0;
  // Of the chain `keys`, from block `first` on. From memory, in microseconds. `block_nanos`: the time that the engine
  // takes to compute a block, which one that is left out costs; 0: not known, and none is left out.
  virtual RemoteFound find(SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                           double block_nanos, Nanos now) = 0;
  // Node::on_remote_block for each block that came, in order, each whole and checked; then Node::on_remote_end once.
  virtual void read(RemoteRead read) = 0;
  // Nothing that anybody has by now is found from here on, in no space. It reaches everybody who shares what is beyond
  // the machine, by all ways as one: `reset` says which.
  virtual void reset(ResetId reset) = 0;
  // Asks, of a read that nobody waits for any more. Node::on_remote_end follows all the same.
  virtual void cancel(RemoteOp op) = 0;
  // When on_time() must be called next; nullopt: nothing waits.
  virtual std::optional<Nanos> next_time() const { return std::nullopt; }
  virtual void on_time(Nanos /*now*/) {}
};

// Blocks of this node that another one reads.
using LoanId = std::uint64_t;  // the borrower's choice, never used twice

// Leading ones of the blocks that were asked for. They do not change or go until Node::end_loan.
struct Loan {
  enum class Limit : std::uint8_t { kNone, kMissing, kBusy, kDeadline };
  LoanId id = 0;
  std::vector<std::uint64_t> host_offsets;  // in the pool, of slot_bytes each
  Limit limit = Limit::kNone;               // why not all
  // What must be in each, or it is not given to anybody; see Node::on_loan_damaged.
  std::vector<std::vector<SummedExtent>> sums{};
};

}  // namespace flexkv::node
