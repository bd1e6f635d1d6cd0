// Which slots of one space are free, on each drive. Slot s lies on drive s % drives, at index s / drives. Pure
// arithmetic, thread-compatible. Memory: 4 bytes for a slot that was used and is free again.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/index/block_array.h"

namespace flexkv::node {

class DiskSlots {
 public:
  explicit DiskSlots(unsigned drives) : drives_(drives) {}

  // Recovered: the slot is in use. Before open().
  void claim(index::Slot slot);
  // From now on slots are dealt out: on each drive those below its limit that are not in use.
  void open(std::span<const std::uint32_t> limits);

  bool has_free(unsigned drive) const {
    const Drive& one = drives_[drive];
    return !one.free.empty() || one.next < one.limit;
  }
  // REQUIRES: has_free(drive)
  index::Slot take(unsigned drive);
  void give_back(index::Slot slot);
  // The slot is not used again.
  void abandon(index::Slot slot);
  // There is no room on its drive for this slot and those behind it; those in use are left.
  void end_before(index::Slot slot);

  unsigned drive_of(index::Slot slot) const { return slot % static_cast<unsigned>(drives_.size()); }
  unsigned drive_count() const { return static_cast<unsigned>(drives_.size()); }
  std::uint64_t used() const { return used_; }
  std::uint64_t capacity() const;

 private:
  struct Drive {
    std::uint32_t limit = 0;
    std::uint32_t next = 0;           // indices from here on were never used
    std::vector<std::uint32_t> free;  // indices below it
    std::vector<bool> claimed;        // until open()
  };
  std::vector<Drive> drives_;
  std::uint64_t used_ = 0;
  std::uint64_t abandoned_ = 0;
};

}  // namespace flexkv::node
