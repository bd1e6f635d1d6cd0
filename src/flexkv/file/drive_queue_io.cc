// DriveQueue's I/Os: which comes next, and what an ended one means for the requests in it.
#include <algorithm>
#include <cerrno>

#include "flexkv/base/assert.h"
#include "flexkv/file/drive_queue.h"

namespace flexkv::file {
namespace {

// A request in separate memory joins an I/O only up to this size: above, one more I/O costs less than what a scattered
// one loses (registered memory, parallel service).
constexpr std::size_t kScatterBytesMax = 64 << 10;
constexpr std::size_t kPartsMax = 128;
// Neighbours are joined up to this size only: more in one I/O gains nothing, and the first would wait for the last.
constexpr std::size_t kJoinedBytesMax = 1 << 20;
// A line that others pass over while it waits gets its turn after so many I/Os of theirs.
constexpr std::uint32_t kPassedOverMax = 32;
constexpr std::uint32_t kRetriesMax = 100;

}  // namespace

// ---- begin ---------------------------------------------------------------------------------------------------------

const Io* DriveQueue::begin(Nanos now) {
  if (!again_.empty()) {
    const std::uint32_t slot = again_.front();
    again_.pop_front();
    return &slots_[slot].io;
  }
  if (!breaker_.available()) return begin_probe(now);
  std::uint64_t bytes = 0;
  for (const Flight& flight : in_flight_) bytes += flight.bytes;
  if (free_slots_.empty() || bytes >= limits_.flight_bytes_max) return nullptr;
  const std::size_t urgency = pick_urgency();
  if (urgency == kNone) return nullptr;
  Slot& slot = take_slot(static_cast<Urgency>(urgency), now);
  fill(slot, waiting_[urgency].begin());
  return &slot.io;
}

// While anything is loaded, writes get a part of the drive only: what they occupy, a load that comes now would wait
// for.
bool DriveQueue::may_save() const {
  constexpr auto kLoad = static_cast<std::size_t>(Urgency::kLoad);
  if (waiting_[kLoad].empty() && in_flight_[kLoad].ios == 0) return true;
  const Flight& saves = in_flight_[static_cast<std::size_t>(Urgency::kSave)];
  return saves.ios < std::max(limits_.depth / 4, 1U) &&
         saves.bytes < std::max<std::uint64_t>(limits_.flight_bytes_max / 4, 1);
}

std::size_t DriveQueue::pick_urgency() {
  constexpr auto kSave = static_cast<std::size_t>(Urgency::kSave);
  const auto ready = [&](std::size_t u) { return !waiting_[u].empty() && (u != kSave || may_save()); };
  const std::uint64_t reading = in_flight_[static_cast<std::size_t>(Urgency::kLoad)].bytes +
                                in_flight_[static_cast<std::size_t>(Urgency::kScrub)].bytes;
  std::size_t picked = kNone;
  for (std::size_t u = kUrgencyCount; u-- > 0;) {
    if (ready(u) && (picked == kNone || passed_over_[picked] < kPassedOverMax)) picked = u;
  }
  if (picked == kNone || (picked != kSave && reading >= limits_.read_bytes_max)) return kNone;
  passed_over_[picked] = 0;
  for (std::size_t u = picked + 1; u < kUrgencyCount; ++u) {
    if (ready(u)) ++passed_over_[u];
  }
  return picked;
}

DriveQueue::Slot& DriveQueue::take_slot(Urgency urgency, Nanos now) {
  Slot& slot = slots_[free_slots_.back()];
  free_slots_.pop_back();
  slot.urgency = urgency;
  slot.bytes = slot.done_bytes = 0;
  slot.retries = 0;
  slot.begun = now;
  slot.busy = true;
  slot.io.parts.clear();
  slot.shares.clear();
  ++in_flight_[static_cast<std::size_t>(urgency)].ios;
  return slot;
}

void DriveQueue::fill(Slot& slot, Iter first) {
  const Request& request = first->request;
  slot.io.op = request.op;
  slot.io.file = request.file;
  slot.io.offset = request.offset + first->issued_bytes;
  const bool shareable = request.op != Op::kSync && first->issued_bytes == 0 && !first->alone;
  const std::uint64_t end = request.offset + request.bytes;
  const std::size_t bytes = std::min(request.bytes - first->issued_bytes, limits_.io_bytes_max);
  Start next{request.file, request.op, request.urgency, end};
  const bool whole = bytes == request.bytes;
  add_share(slot, first, bytes);
  if (!shareable || !whole) return;
  const std::size_t bytes_max = std::min(limits_.io_bytes_max, kJoinedBytesMax);
  for (auto found = starts_.find(next); found != starts_.end(); found = starts_.find(next)) {
    const Iter entry = found->second;
    const Request& neighbour = entry->request;
    if (slot.bytes + neighbour.bytes > bytes_max) return;
    const iovec& last = slot.io.parts.back();
    const bool adjacent = static_cast<std::byte*>(last.iov_base) + last.iov_len == neighbour.data;
    if (!adjacent && (neighbour.bytes > kScatterBytesMax || slot.io.parts.size() == kPartsMax)) return;
    next.offset += neighbour.bytes;
    add_share(slot, entry, neighbour.bytes);
  }
}

void DriveQueue::add_share(Slot& slot, Iter entry, std::size_t bytes) {
  if (!entry->begun) forget_start(entry);
  entry->begun = true;
  ++entry->io_count;
  if (bytes > 0) {
    std::byte* const data = entry->request.data + entry->issued_bytes;
    std::vector<iovec>& parts = slot.io.parts;
    if (!parts.empty() && static_cast<std::byte*>(parts.back().iov_base) + parts.back().iov_len == data) {
      parts.back().iov_len += bytes;
    } else {
      parts.push_back({data, bytes});
    }
  }
  entry->issued_bytes += bytes;
  slot.bytes += bytes;
  in_flight_[static_cast<std::size_t>(slot.urgency)].bytes += bytes;
  slot.shares.push_back({entry, bytes});
  if (entry->issued_bytes == entry->request.bytes) move_to(begun_, entry);
}

const Io* DriveQueue::begin_probe(Nanos now) {
  // No probe while anything hangs: its result could not matter.
  if (probing_ || closed_ || hangs_on() || now < breaker_.probe_at()) return nullptr;
  probing_ = true;
  Slot& slot = slots_.back();
  slot.retries = 0;
  slot.io.op = Op::kWrite;
  slot.io.file = probe_file_;
  slot.io.offset = 0;
  slot.io.parts.assign(1, {probe_page_, kDirectAlignment});
  return &slot.io;
}

// ---- end -----------------------------------------------------------------------------------------------------------

void DriveQueue::end(std::uint32_t index, std::int64_t result, Nanos now) {
  Slot& slot = slots_[index];
  if ((result == -EINTR || result == -EAGAIN) && slot.retries++ < kRetriesMax) {
    again_.push_back(index);
    return;
  }
  if (index == limits_.depth) return end_probe(result, now);
  FLEXKV_ASSERT(slot.busy);
  if (result < 0) {
    const int error_number = static_cast<int>(-result);
    if (breaker_.available() && breaker_.failed(error_number, now)) trip(now);
    return finish(slot, error_number, now);
  }
  breaker_.succeeded();
  if (slot.io.op == Op::kSync) return finish(slot, 0, now);
  if (result == 0) return finish(slot, slot.io.op == Op::kRead ? ENODATA : EIO, now);
  advance(slot, static_cast<std::size_t>(result));
  if (slot.done_bytes == slot.bytes) return finish(slot, 0, now);
  slot.retries = 0;
  again_.push_back(index);
}

void DriveQueue::advance(Slot& slot, std::size_t bytes) {
  slot.done_bytes += bytes;
  FLEXKV_ASSERT(slot.done_bytes <= slot.bytes);
  slot.io.offset += bytes;
  std::vector<iovec>& parts = slot.io.parts;
  auto part = parts.begin();
  while (bytes > 0 && part->iov_len <= bytes) bytes -= (part++)->iov_len;
  if (bytes > 0) {
    part->iov_base = static_cast<std::byte*>(part->iov_base) + bytes;
    part->iov_len -= bytes;
  }
  parts.erase(parts.begin(), part);
}

void DriveQueue::finish(Slot& slot, int error_number, Nanos now) {
  std::size_t done = slot.done_bytes;
  // Completing one request never touches another's share: a sync that may run now only joins a line.
  for (const Share& share : slot.shares) {
    const std::size_t landed = std::min(done, share.bytes);
    done -= landed;
    settle(slot, share, landed, error_number, now);
  }
  release(slot);
}

void DriveQueue::settle(Slot& slot, const Share& share, std::size_t done_bytes, int error_number, Nanos now) {
  const Iter entry = share.entry;
  --entry->io_count;
  entry->landed_bytes += done_bytes;
  if (error_number != 0 && (done_bytes < share.bytes || share.bytes == 0)) {
    // Whose fault it was, nobody knows: each gets a try of its own. Not at a file's end, which is the same for all.
    const bool shared = slot.shares.size() > 1 && slot.io.op != Op::kSync;
    if (shared && error_number != ENODATA && entry->error_number == 0 && breaker_.available()) {
      entry->issued_bytes = entry->landed_bytes = 0;
      entry->alone = true;
      move_to(waiting_[static_cast<std::size_t>(entry->request.urgency)], entry);
      return;
    }
    return stop_issuing(entry, error_number, now);
  }
  complete_if_over(entry, now);
}

void DriveQueue::release(Slot& slot) {
  slot.busy = false;
  slot.shares.clear();
  Flight& flight = in_flight_[static_cast<std::size_t>(slot.urgency)];
  --flight.ios;
  flight.bytes -= slot.bytes;
  free_slots_.push_back(slot.io.slot);
}

void DriveQueue::end_probe(std::int64_t result, Nanos now) {
  Slot& slot = slots_.back();
  // That a full drive has no page for the probe, or that nothing may be written to it, says nothing of how it works.
  constexpr int kOnlyNoWrites[] = {ENOSPC, EDQUOT, EROFS, EPERM, EACCES};
  const bool passed = result == static_cast<std::int64_t>(kDirectAlignment) ||
                      std::ranges::find(kOnlyNoWrites, -result) != std::end(kOnlyNoWrites);
  if (passed && slot.io.op == Op::kWrite && !closed_) {
    slot.io.op = Op::kRead;
    again_.push_back(slot.io.slot);
    return;
  }
  probing_ = false;
  if (closed_) return;
  // The end of the file: written in vain, for lack of space.
  const bool alive = passed || result == 0;
  breaker_.probed(alive ? 0 : result < 0 ? static_cast<int>(-result) : EIO, now);
  if (breaker_.available()) events_.changes.push_back({true, {}});
}

}  // namespace flexkv::file
