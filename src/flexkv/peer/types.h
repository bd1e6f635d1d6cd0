// What nodes ask each other for, and how it ends.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/time.h"
#include "flexkv/key/block_key.h"

namespace flexkv::peer {

using SpaceName = std::array<std::uint8_t, 32>;  // of a model, its layout and what else its blocks depend on
using RequestId = std::uint64_t;                 // from 1 on, of a lane each above those before

enum class Outcome : std::uint8_t {
  kDone,
  kMissing,      // the owner does not have it (any more)
  kBusy,         // the owner lends no more for now
  kExpired,      // the owner's lease ended first
  kCanceled,     // by the reader
  kDeadline,     // of the reader
  kUnreachable,  // no connection, or it broke
  kChecksum,     // what came is not the block
};
constexpr std::uint8_t kOutcomeCount = 8;
const char* outcome_name(Outcome outcome);

// Leading ones of the blocks that were wanted, which do not change or go until they are given back.
struct Pinned {
  std::uint64_t pin = 0;
  std::vector<std::span<const std::byte>> blocks;  // each of the slot bytes asked for
  Outcome outcome = Outcome::kDone;                // why not all
  // What must be in each, ascending; empty: that is not known of any.
  std::vector<std::vector<SummedExtent>> sums{};
};

// The owner's cache. Thread-safe; must not block. Called on the lane.
class BlockSource {
 public:
  virtual ~BlockSource() = default;
  // Of the chain `keys` those from `first` on are wanted. Calls `done` once, on any thread, also from inside, at the
  // latest at `deadline`; with no blocks there is no pin.
  virtual void pin(const SpaceName& space, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys,
                   std::uint32_t first, Nanos deadline, std::function<void(Pinned)> done) = 0;
  virtual void unpin(std::uint64_t pin) = 0;
  // What lies in this block is not what its sums say: it is given to nobody. The pin stays until unpin().
  virtual void on_damaged(std::uint64_t pin, std::uint32_t block) = 0;
};

struct ReadRequest {
  RequestId id = 0;
  std::string node;     // who has to be there
  std::string address;  // where: numeric, with a port
  SpaceName space{};
  std::uint64_t slot_bytes = 0;
  std::vector<key::BlockKey> keys;  // the chain from its first block on: an owner finds blocks by those before
  std::uint32_t first = 0;          // of the blocks that are wanted: the last ones
  std::vector<std::span<std::byte>> buffers;  // for each of these slot_bytes, the lane's until on_end
  Nanos deadline = 0;                         // of the monotonic clock
};

// The reader's cache. Called on the lane; must not block, may call the lane.
class ReadSink {
 public:
  virtual ~ReadSink() = default;
  // Block `index` of those wanted is in its buffer, whole and right. In order.
  virtual void on_block(RequestId id, std::uint32_t index) = 0;
  // The last word; the buffers are the caller's again. kDone: all blocks came.
  virtual void on_end(RequestId id, Outcome outcome) = 0;
};

}  // namespace flexkv::peer
