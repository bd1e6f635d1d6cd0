#include "flexkv/node/disk_slots.h"

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::node {

void DiskSlots::claim(index::Slot slot) {
  Drive& drive = drives_[drive_of(slot)];
  const std::uint32_t at = slot / drive_count();
  if (drive.claimed.size() <= at) drive.claimed.resize(at + 1);
  drive.claimed[at] = true;
  ++used_;
}

void DiskSlots::open(std::span<const std::uint32_t> limits) {
  FLEXKV_ASSERT(limits.size() == drives_.size());
  for (std::size_t i = 0; i < drives_.size(); ++i) {
    Drive& drive = drives_[i];
    drive.next = static_cast<std::uint32_t>(drive.claimed.size());
    drive.limit = std::max(limits[i], drive.next);
    // The lowest come out first: a file is written from its front.
    for (std::uint32_t at = drive.next; at-- > 0;) {
      if (!drive.claimed[at]) drive.free.push_back(at);
    }
    drive.claimed = {};
  }
}

index::Slot DiskSlots::take(unsigned which) {
  Drive& drive = drives_[which];
  FLEXKV_ASSERT(has_free(which));
  ++used_;
  std::uint32_t at = drive.next;
  if (!drive.free.empty()) {
    at = drive.free.back();
    drive.free.pop_back();
  } else {
    ++drive.next;
  }
  return at * drive_count() + which;
}

void DiskSlots::give_back(index::Slot slot) {
  Drive& drive = drives_[drive_of(slot)];
  const std::uint32_t at = slot / drive_count();
  --used_;
  if (at < drive.claimed.size()) {
    drive.claimed[at] = false;  // not open yet
  } else if (at < drive.limit) {
    drive.free.push_back(at);
  }
}

void DiskSlots::abandon(index::Slot) {
  --used_;
  ++abandoned_;
}

void DiskSlots::end_before(index::Slot slot) {
  Drive& drive = drives_[drive_of(slot)];
  drive.limit = std::min(drive.limit, slot / drive_count());
  drive.next = std::min(drive.next, drive.limit);
  std::erase_if(drive.free, [&](std::uint32_t at) { return at >= drive.limit; });
}

std::uint64_t DiskSlots::capacity() const {
  std::uint64_t sum = 0;
  for (const Drive& drive : drives_) sum += drive.limit;
  return sum - std::min(abandoned_, sum);
}

}  // namespace flexkv::node
