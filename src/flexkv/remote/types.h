// What a node asks of the remote tier, and how it ends.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/key/block_key.h"

namespace flexkv::remote {

using SpaceName = std::array<std::uint8_t, 32>;  // of a model, its layout and what else its blocks depend on
using RequestId = std::uint64_t;                 // never used twice with one tier, be it to read or to write

// Of a reset, in the store for good: what was stored before it is of no use to whoever knows it. Names are for who uses
// the tier to choose: by its spaces' names he keeps apart what was stored between resets.
using Mark = std::array<std::uint8_t, 16>;

constexpr std::uint64_t kSlotBytesMax = 1ULL << 30;
constexpr std::size_t kKeysMax = 32768;  // of one request
constexpr key::BlockKey kNoParent{};     // of the first block of a chain

enum class Outcome : std::uint8_t {
  kDone,
  kMissing,      // the store does not have it (any more)
  kDamaged,      // what the store has is not the block
  kBusy,         // too many requests wait
  kCanceled,     // by the caller, or the tier ends
  kDeadline,     // of the caller
  kUnavailable,  // the store is left alone for a while, because it failed or hung
  kFailed,       // the store did not do it
};
constexpr std::size_t kOutcomeCount = 8;
const char* outcome_name(Outcome outcome);

struct ReadRequest {
  RequestId id = 0;
  SpaceName space{};  // which is open
  std::uint64_t slot_bytes = 0;
  std::vector<key::BlockKey> keys;            // in the order of the prompt
  std::vector<std::span<std::byte>> buffers;  // for each key slot_bytes, the tier's until on_end
  Nanos deadline = 0;                         // of the monotonic clock
};

struct WriteRequest {
  struct Block {
    key::BlockKey key;
    key::BlockKey parent;  // kNoParent: the first of a chain
  };

  RequestId id = 0;
  SpaceName space{};  // which is open
  std::uint64_t slot_bytes = 0;
  std::vector<Block> blocks;                        // those of a chain one after another: they share objects
  std::vector<std::span<const std::byte>> buffers;  // for each block slot_bytes, which do not change until on_written
  Nanos deadline = 0;
};

// Why they could never be carried out; empty: they can.
std::string problem_of(const ReadRequest& request);
std::string problem_of(const WriteRequest& request);

// The node's cache. Called on the tier's lane; must not block, may call the tier.
class RemoteSink {
 public:
  virtual ~RemoteSink() = default;
  // Block `index` is in its buffer, whole and right. In order.
  virtual void on_block(RequestId id, std::uint32_t index) = 0;
  // The last word; the buffers are the caller's again. kDone: all blocks came.
  virtual void on_end(RequestId id, Outcome outcome) = 0;
  // The last word of a write. kDone: the store has all blocks; otherwise it may have some.
  virtual void on_written(RequestId id, Outcome outcome) = 0;
  // All marks that are known, when the store was first asked for them and whenever there are more. After watch_marks().
  virtual void on_marks(const std::set<Mark>&) {}
  // They could not be listed yet; that is tried again.
  virtual void on_no_marks() {}
};

// What was found wrong with objects; each is a miss.
enum class Fault : std::uint8_t {
  kGone,     // listed, or written by us, and not there
  kShort,    // of another length than its name says
  kHeader,   // its header is damaged
  kOther,    // it is of another model, layout or version, or holds other blocks than its name or header says
  kHead,     // the record before a block is damaged
  kPayload,  // a block's checksum is wrong
};
constexpr std::size_t kFaultCount = 6;
const char* fault_name(Fault fault);

struct RemoteStats {
  std::array<std::uint64_t, kOutcomeCount> reads{};   // ended so
  std::array<std::uint64_t, kOutcomeCount> writes{};  // ended so
  std::array<std::uint64_t, kFaultCount> faults{};    // objects, or blocks of them
  std::uint64_t read_blocks = 0;
  std::uint64_t read_bytes = 0;
  std::uint64_t written_blocks = 0;  // sent; those that the store had already are not
  std::uint64_t written_bytes = 0;
  std::uint64_t objects_written = 0;
  std::uint64_t gets = 0;  // operations ordered of the store, with those tried again
  std::uint64_t puts = 0;
  std::uint64_t lists = 0;
  std::uint64_t tried_again = 0;
  std::uint64_t scans = 0;  // ended whole
  std::uint64_t scans_failed = 0;
  std::uint64_t objects = 0;   // known now
  std::uint64_t blocks = 0;    // known now
  std::uint64_t left_out = 0;  // objects that found no room among the known ones
  std::uint64_t marks = 0;     // known now
  std::uint64_t marks_unstored = 0;
  bool marks_listed = false;  // once at least
  std::string trouble;        // why the store's marks, and so its blocks, are not known, or nothing can be written
  std::string reads_off;      // why the store is not asked; empty: it is
  std::string writes_off;
  std::string last_error;  // what the store said last when it failed; never with a secret
};

}  // namespace flexkv::remote
