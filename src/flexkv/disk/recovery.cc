#include "flexkv/disk/recovery.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "flexkv/base/assert.h"

namespace flexkv::disk {
namespace {

constexpr std::size_t kAhead = 16;  // so many steps before its use memory is fetched
// Chains that are followed at once, so that their cache misses overlap, and the blocks of one that are kept meanwhile.
constexpr std::size_t kCursorCount = 16;
constexpr std::size_t kChainBlocksMax = 1024;
static_assert(kChainBlocksMax <= Recovery::kBatchBlocks);

}  // namespace

std::string describe(const Discarded& discarded) {
  std::string text;
  for (const auto& [count, reason] : {std::pair(discarded.damaged, " damaged"),
                                      {discarded.other_epoch, " from before a reset"},
                                      {discarded.out_of_range, " beyond the files or their share"},
                                      {discarded.duplicate, " written again elsewhere"},
                                      {discarded.orphan, " without the block before"}}) {
    if (count > 0) text += (text.empty() ? "" : ", ") + std::to_string(count) + reason;
  }
  return text.empty() ? "none" : text;
}

struct Recovery::Branch {
  std::uint32_t child;  // and its later siblings
  key::BlockKey parent;
};

// A chain in the making.
struct Recovery::Cursor {
  std::uint32_t at = kNone;  // the next block; kNone: nothing to do
  key::BlockKey parent;
  std::uint64_t sequence = 0;
  std::vector<key::BlockKey> keys;
  std::vector<std::uint32_t> slots;
};

class Recovery::Batch {
 public:
  explicit Batch(const std::function<void(std::span<const Chain>)>& out) : out_(out) {
    keys_.reserve(kBatchBlocks);  // so that the spans of chains stay
    slots_.reserve(kBatchBlocks);
  }
  void take(Cursor& cursor) {
    if (cursor.keys.empty()) return;
    if (keys_.size() + cursor.keys.size() > kBatchBlocks) flush();
    const std::size_t begin = keys_.size();
    keys_.insert(keys_.end(), cursor.keys.begin(), cursor.keys.end());
    slots_.insert(slots_.end(), cursor.slots.begin(), cursor.slots.end());
    chains_.push_back(
        {cursor.parent, std::span(keys_).subspan(begin), std::span(slots_).subspan(begin), cursor.sequence});
    cursor.parent = cursor.keys.back();
    cursor.sequence = 0;
    cursor.keys.clear();
    cursor.slots.clear();
  }
  void flush() {
    if (!chains_.empty()) out_(chains_);
    chains_.clear();
    keys_.clear();
    slots_.clear();
  }

 private:
  const std::function<void(std::span<const Chain>)>& out_;
  std::vector<key::BlockKey> keys_;
  std::vector<std::uint32_t> slots_;
  std::vector<Chain> chains_;
};

Recovery::Recovery(const SpaceCodec& codec, std::uint64_t epoch, unsigned drive_count, std::uint64_t record_count_max)
    : codec_(codec),
      epoch_(epoch),
      drive_count_(drive_count),
      mask_(std::bit_ceil(static_cast<std::size_t>(record_count_max + record_count_max / 2) + 1) - 1),
      table_(mask_ + 1),
      entries_(record_count_max) {
  FLEXKV_ASSERT(record_count_max < kNone);
}

std::size_t Recovery::find(const key::BlockKey& key) const {
  std::size_t at = bucket(key);
  while (table_[at] != 0 && entries_[table_[at] - 1].key != key) at = (at + 1) & mask_;
  return at;
}

void Recovery::insert(const Record& record, std::uint32_t slot) {
  const std::size_t at = find(record.key);
  const Entry entry{record.key, {record.parent}, record.sequence, slot, kNone};
  if (table_[at] == 0) {
    FLEXKV_ASSERT(entry_count_ < entries_.size());
    entries_[entry_count_++] = entry;
    table_[at] = static_cast<std::uint32_t>(entry_count_);
    return;
  }
  ++discarded_.duplicate;
  Entry& known = entries_[table_[at] - 1];
  if (record.sequence > known.sequence) known = entry;
}

void Recovery::add(unsigned drive, std::uint32_t first, std::uint32_t slot_limit, std::span<const std::byte> bytes) {
  fresh_.clear();
  fresh_slots_.clear();
  for (std::uint32_t i = 0; i < bytes.size() / kRecordBytes; ++i) {
    Record record;
    const std::uint32_t index = first + i;
    switch (codec_.decode(bytes.subspan(i * kRecordBytes).first<kRecordBytes>(), index, record)) {
      case SpaceCodec::Found::kEmpty:
        continue;
      case SpaceCodec::Found::kDamaged:
        ++discarded_.damaged;
        continue;
      case SpaceCodec::Found::kRecord:
        break;
    }
    if (record.epoch != epoch_) {
      ++discarded_.other_epoch;
      continue;
    }
    sequence_max_ = std::max(sequence_max_, record.sequence);
    if (index >= slot_limit) {
      ++discarded_.out_of_range;
      continue;
    }
    __builtin_prefetch(&table_[bucket(record.key)], 1);
    fresh_.push_back(record);
    fresh_slots_.push_back(index * drive_count_ + drive);
  }
  for (std::size_t i = 0; i < fresh_.size(); ++i) insert(fresh_[i], fresh_slots_[i]);
}

// Makes lists of children; returns the blocks without parent.
std::vector<std::uint32_t> Recovery::link() {
  std::vector<std::uint32_t> roots;
  for (std::size_t i = 0; i < entry_count_; ++i) {
    if (i + 2 * kAhead < entry_count_) __builtin_prefetch(&table_[bucket(entries_[i + 2 * kAhead].parent)]);
    if (i + kAhead < entry_count_) {
      const std::uint32_t probable = table_[bucket(entries_[i + kAhead].parent)];
      if (probable != 0) __builtin_prefetch(&entries_[probable - 1], 1);
    }
    Entry& entry = entries_[i];
    const auto self = static_cast<std::uint32_t>(i);
    if (entry.parent == kNoParent) {
      entry.next_sibling = kNone;
      roots.push_back(self);
      continue;
    }
    const std::uint32_t found = table_[find(entry.parent)];
    if (found == 0) continue;  // never reached
    Entry& parent = entries_[found - 1];
    entry.next_sibling = parent.first_child;
    parent.first_child = self;
  }
  std::ranges::sort(roots, {}, [&](std::uint32_t at) { return entries_[at].sequence; });
  return roots;
}

// One block further. What follows a branching block is put off until that block is out.
void Recovery::advance(Cursor& cursor, std::vector<Branch>& branches, Batch& batch) {
  const Entry& entry = entries_[cursor.at];
  if (entry.next_sibling != kNone) {
    if (!cursor.keys.empty()) {
      batch.take(cursor);
      branches.push_back({cursor.at, cursor.parent});
      cursor.at = kNone;
      return;
    }
    branches.push_back({entry.next_sibling, cursor.parent});
  }
  cursor.keys.push_back(entry.key);
  cursor.slots.push_back(entry.slot);
  cursor.sequence = std::max(cursor.sequence, entry.sequence);
  ++recovered_;
  cursor.at = entry.first_child;
  if (cursor.at == kNone || cursor.keys.size() == kChainBlocksMax) batch.take(cursor);
}

void Recovery::emit(const std::function<void(std::span<const Chain>)>& out) {
  const std::vector<std::uint32_t> roots = link();
  std::size_t next_root = 0;
  std::vector<Branch> branches;
  std::array<Cursor, kCursorCount> cursors;
  Batch batch(out);
  // Ends: every entry is in at most one list of children, and a cycle hangs on no root.
  for (bool busy = true; busy;) {
    busy = false;
    for (Cursor& cursor : cursors) {
      if (cursor.at != kNone) {
        advance(cursor, branches, batch);
      } else if (!branches.empty()) {
        cursor.at = branches.back().child;
        cursor.parent = branches.back().parent;
        branches.pop_back();
      } else if (next_root < roots.size()) {
        cursor.at = roots[next_root++];
        cursor.parent = kNoParent;
      } else {
        continue;
      }
      busy = true;
      if (cursor.at != kNone) __builtin_prefetch(&entries_[cursor.at]);
    }
  }
  batch.flush();
  discarded_.orphan = entry_count_ - recovered_;
}

}  // namespace flexkv::disk
