// From records to what the index needs: blocks in chains, parents before children. Pure logic, thread-compatible.
//
// Memory: 48 bytes per usable record plus 6 to 12 per record that the files have room for, so at most 60 bytes a slot,
// freed with the object. Cost: about one cache miss per block for each of table, parent and order, many at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "flexkv/disk/large_array.h"
#include "flexkv/disk/record.h"

namespace flexkv::disk {

// Consecutive blocks: the first follows `parent` (kNoParent: nothing), each other the one before it.
struct Chain {
  key::BlockKey parent;
  std::span<const key::BlockKey> keys;
  std::span<const std::uint32_t> slots;
  std::uint64_t sequence = 0;  // the highest of its blocks: what was written last
};

// Records that were not used, by reason.
struct Discarded {
  std::uint64_t damaged = 0;
  std::uint64_t other_epoch = 0;   // before a reset
  std::uint64_t out_of_range = 0;  // of a slot that the file of blocks, or the configuration, has no room for
  std::uint64_t duplicate = 0;     // the same key was written later elsewhere
  std::uint64_t orphan = 0;        // a block before it is lost
  bool operator==(const Discarded&) const = default;
};
std::string describe(const Discarded& discarded);  // for people: "3 damaged, 1 written again elsewhere"

class Recovery {
 public:
  // Slot s of the space is slot s / drive_count of drive s % drive_count. record_count_max: over all drives.
  // REQUIRES: every record's slot number fits 32 bits
  Recovery(const SpaceCodec& codec, std::uint64_t epoch, unsigned drive_count, std::uint64_t record_count_max);

  // Records of slots [first, first + bytes.size() / kRecordBytes) of a drive, of which those from `slot_limit` on are
  // out of range. REQUIRES: before emit(), at most record_count_max in all
  void add(unsigned drive, std::uint32_t first, std::uint32_t slot_limit, std::span<const std::byte> bytes);

  // Calls `out` with batches of chains of together at most kBatchBlocks blocks, valid during the call. Chains without
  // parent come in the order in which their first blocks were written. Once.
  static constexpr std::size_t kBatchBlocks = 16384;
  void emit(const std::function<void(std::span<const Chain>)>& out);

  std::uint64_t recovered() const { return recovered_; }
  const Discarded& discarded() const { return discarded_; }
  std::uint64_t sequence_max() const { return sequence_max_; }  // also of records that were discarded

 private:
  static constexpr std::uint32_t kNone = UINT32_MAX;

  struct Entry {
    key::BlockKey key;
    union {
      key::BlockKey parent;        // until link()
      std::uint32_t next_sibling;  // after it
    };
    std::uint64_t sequence;
    std::uint32_t slot;
    std::uint32_t first_child;
  };
  static_assert(sizeof(Entry) == 48);
  struct Branch;
  struct Cursor;
  class Batch;

  std::size_t bucket(const key::BlockKey& key) const { return static_cast<std::size_t>(key.low) & mask_; }
  // The bucket that holds the key's entry, or the empty one where it belongs.
  std::size_t find(const key::BlockKey& key) const;
  void insert(const Record& record, std::uint32_t slot);
  std::vector<std::uint32_t> link();
  void advance(Cursor& cursor, std::vector<Branch>& branches, Batch& batch);

  const SpaceCodec codec_;
  const std::uint64_t epoch_;
  const unsigned drive_count_;
  const std::size_t mask_;
  LargeArray<std::uint32_t> table_;  // index + 1 of the entry; 0: empty
  LargeArray<Entry> entries_;
  std::size_t entry_count_ = 0;
  std::vector<Record> fresh_;  // scratch of add()
  std::vector<std::uint32_t> fresh_slots_;
  std::uint64_t recovered_ = 0;
  std::uint64_t sequence_max_ = 0;
  Discarded discarded_;
};

}  // namespace flexkv::disk
