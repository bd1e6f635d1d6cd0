// From host memory to drives, and what lies there: opening, recovery, slots, writing behind.

#include <algorithm>
#include <cstring>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: blocks that wait to be written cannot be evicted.
constexpr std::uint64_t kWriteShare = 50;
// So that a load finds few writes before its reads at a drive.
constexpr std::uint32_t kWritesPerDrive = 64;
constexpr std::uint32_t kEvictAtOnce = 16;
// Keys that admission remembers, 8 bytes each.
constexpr std::uint64_t kRememberedMin = 1 << 10;
constexpr std::uint64_t kRememberedMax = 1 << 26;

}  // namespace

// ---- opening -------------------------------------------------------------------------------------------------------

ModelName Node::model_name(const std::array<std::byte, 32>& fingerprint) {
  ModelName name;
  std::memcpy(name.data(), fingerprint.data(), name.size());
  return name;
}

void Node::open_disk(Space& space, std::uint32_t block_tokens) {
  space.disk_slots.emplace(disk_->port.drive_count());
  space.disk_state = Space::DiskState::kOpening;
  if (options_.disk_admission) space.admission.emplace(admission_of(space, block_tokens));
  disk_->port.open_space(space.number, space.name, space.slots.slot_bytes());
}

admission::AdmissionFilter::Options Node::admission_of(const Space& space, std::uint32_t block_tokens) const {
  const std::uint64_t blocks = (options_.pool_bytes + options_.disk_bytes) / space.slots.slot_bytes();
  return {.remembered_blocks = std::clamp<std::uint64_t>(2 * blocks, kRememberedMin, kRememberedMax),
          .block_tokens = block_tokens};
}

void Node::on_disk_recovered(SpaceNumber number, std::span<const RecoveredChain> chains, Nanos now) {
  tell_time(now);
  Space* space = find_space(number);
  if (space == nullptr || space->generation != 0) return;  // found before a reset
  std::vector<index::Slot> rejected;
  for (const RecoveredChain& chain : chains) {
    index::PinId pin{};
    if (chain.parent == key::BlockKey{}) {
      pin = space->index.match({}, false, now).pin;
    } else {
      const auto parent = space->recovered_ends.find(chain.parent);
      if (parent == space->recovered_ends.end()) continue;  // its slots stay free
      pin = space->index.clone(parent->second);
    }
    for (const index::Slot slot : chain.slots) space->disk_slots->claim(slot);
    rejected.clear();
    space->index.insert(pin, kDiskTier, chain.keys, chain.slots, now, rejected);
    for (const index::Slot slot : rejected) space->disk_slots->give_back(slot);
    stats_.disk_blocks_recovered += chain.keys.size() - rejected.size();
    const bool added = space->recovered_ends.emplace(chain.keys.back(), pin).second;
    if (!added) drop_pin(*space, pin);
  }
}

void Node::on_disk_opened(SpaceNumber number, std::span<const std::uint32_t> slots, Nanos now) {
  tell_time(now);
  Space* space = find_space(number);
  if (space == nullptr) return;
  for (auto& [key, pin] : space->recovered_ends) drop_pin(*space, pin);
  space->recovered_ends = {};
  space->disk_slots->open(slots);
  space->disk_state = Space::DiskState::kOpen;
  pump_disk();
}

// ---- writing -------------------------------------------------------------------------------------------------------

// A lookup that counts as a use has found these; what was not worth writing when it was saved may be now.
void Node::note_hits(Space& space, const Sequence& sequence) {
  if (sequence.matched == 0) return;
  const auto found = std::span(sequence.keys).first(sequence.matched);
  if (space.admission) {
    space.admission->on_hit(found);
    write_behind(space, sequence.pin);
  }
  if (space.store_admission) {
    space.store_admission->on_hit(found);
    store_beyond(space, sequence.pin);
  }
}

void Node::note_saved(Job& job) {
  if (job.last_found) job.origin.last_found = &*job.last_found;
  if (job.space->admission) job.space->admission->on_save(job.keys, job.origin);
  if (job.space->store_admission) job.space->store_admission->on_save(job.keys, job.origin);
}

// Has those of the pinned path's blocks written that lie on no drive and are worth it.
void Node::write_behind(Space& space, index::PinId pin) {
  if (disk_ == nullptr) return;
  std::uint32_t end = space.index.depth(pin);
  auto& slots = disk_->disk_slots;
  slots.resize(end);
  space.index.collect(pin, kDiskTier, 0, slots);
  const auto begin = static_cast<std::uint32_t>(std::ranges::find(slots, index::kNoSlot) - slots.begin());
  if (begin == end) return;
  const std::uint64_t room = options_.pool_bytes * kWriteShare / 100 - disk_->queued_write_bytes;
  if (space.admission) {
    auto& keys = disk_->keys;
    keys.resize(end - begin);
    space.index.collect_keys(pin, begin, keys);
    const auto verdict = space.admission->admit(keys, disk_->port.write_pressure());
    const Reason why = verdict.why == admission::Refusal::kUnlikely ? Reason::kUnlikely : Reason::kBudgetLow;
    stats_.unwritten_blocks[slot_of(why)] += keys.size() - verdict.count;
    end = begin + static_cast<std::uint32_t>(verdict.count);
  }
  const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(end - begin, room / space.slots.slot_bytes()));
  stats_.unwritten_blocks[slot_of(Reason::kQueueFull)] += end - begin - count;
  if (count == 0) return;
  end = begin + count;
  disk_->queued_write_bytes += count * space.slots.slot_bytes();
  disk_->write_runs.push_back({hold(space, space.index.clone(pin)), begin, begin, end});
}

void Node::pump_writes() {
  while (!disk_->write_runs.empty()) {
    Disk::WriteRun& run = disk_->write_runs.front();
    const Space& space = *run.path->space;
    if (space.disk_state == Space::DiskState::kOpening) return;
    for (; run.next < run.end && run.path->generation == space.generation; ++run.next) {
      const Begun begun = begin_write(run.path, run.next);
      if (begun == Begun::kBusy) return;
      if (begun == Begun::kBudget) {
        // Nor those behind it: without it they could not be found again.
        stats_.unwritten_blocks[slot_of(Reason::kBudget)] += run.end - run.next;
        break;
      }
    }
    if (run.path->generation != space.generation) {
      stats_.unwritten_blocks[slot_of(Reason::kReset)] += run.end - run.next;
    }
    disk_->queued_write_bytes -= (run.end - run.begin) * space.slots.slot_bytes();
    Path* path = run.path;
    disk_->write_runs.pop_front();
    release(path);
  }
}

// A slot on the least busy drive that has one; nothing when none has. `busy`: some have, but may not be asked now.
std::optional<index::Slot> Node::take_disk_slot(Space& space, const std::vector<bool>& refused, bool& busy) {
  DiskSlots& slots = *space.disk_slots;
  for (const bool evict : {false, true}) {
    if (evict) {
      // Drives that take no writes must not lose blocks for them.
      if (std::ranges::find(refused, false) == refused.end()) break;
      stats_.disk_blocks_evicted += space.index.evict(kDiskTier, kEvictAtOnce, now_, evicted_);
      give_back_evicted(space);
    }
    std::optional<unsigned> best;
    // Of those that have least to write the next one in turn: blocks that come one by one go to all drives, too.
    for (unsigned i = 0; i < slots.drive_count(); ++i) {
      const unsigned drive = (disk_->next_drive + i) % slots.drive_count();
      if (refused[drive] || !slots.has_free(drive)) continue;
      if (disk_->writes[drive] >= kWritesPerDrive) {
        busy = true;
      } else if (!best || disk_->writes[drive] < disk_->writes[*best]) {
        best = drive;
      }
    }
    if (best) {
      disk_->next_drive = (*best + 1) % slots.drive_count();
      return slots.take(*best);
    }
    if (busy) return std::nullopt;
  }
  return std::nullopt;
}

Node::Begun Node::begin_write(Path* path, std::uint32_t at) {
  Space& space = *path->space;
  index::Slot host = index::kNoSlot;
  index::Slot disk = index::kNoSlot;
  space.index.collect(path->pin, kHostTier, at, {&host, 1});
  space.index.collect(path->pin, kDiskTier, at, {&disk, 1});
  key::BlockKey keys[2];  // its parent's and its own
  const std::uint32_t first = at == 0 ? 0 : at - 1;
  space.index.collect_keys(path->pin, first, std::span(keys).last(at - first + 1));
  if (host == index::kNoSlot || disk != index::kNoSlot || space.writing.contains(keys[1])) return Begun::kNothing;

  std::vector<bool> refused(space.disk_slots->drive_count());
  bool later = false;
  bool budget = false;
  bool crowded = false;  // by others' work
  while (true) {
    bool busy = false;
    const auto slot = take_disk_slot(space, refused, busy);
    if (!slot) {
      if (busy || later) return Begun::kBusy;
      if (budget) return Begun::kBudget;
      const bool off = std::ranges::find(refused, true) != refused.end();
      const Reason why = crowded ? Reason::kDiskBusy : off ? Reason::kDiskOff : Reason::kDiskFull;
      ++stats_.unwritten_blocks[slot_of(why)];
      return Begun::kNothing;
    }
    const unsigned drive = space.disk_slots->drive_of(*slot);
    DiskTransfer transfer;
    transfer.op = disk_->next_op++;
    transfer.space = space.number;
    transfer.slot = *slot;
    transfer.key = keys[1];
    transfer.parent = keys[0];
    transfer.host_offset = space.slots.offset(host);
    transfer.sums = space.sums.of(host);
    transfer.deadline = now_ + options_.save_timeout;
    const DiskAdmission admission = disk_->port.write(transfer);
    switch (admission) {
      case DiskAdmission::kQueued:
        ++path->users;
        ++disk_->writes[drive];
        space.writing.insert(keys[1]);
        disk_->ios[transfer.op] = {
            &space, keys[1], path, at, *slot, DiskIo::Kind::kWrite, false, now_, host, !transfer.sums.empty()};
        return Begun::kYes;
      case DiskAdmission::kBusy:
        space.disk_slots->give_back(*slot);
        if (disk_->writes[drive] > 0) return Begun::kBusy;
        refused[drive] = crowded = true;  // no write would end and have us try again
        break;
      case DiskAdmission::kUnavailable:
        space.disk_slots->give_back(*slot);
        refused[drive] = true;
        break;
      case DiskAdmission::kLater:
      case DiskAdmission::kBudget:
        space.disk_slots->give_back(*slot);
        refused[drive] = true;
        later = later || admission == DiskAdmission::kLater;
        budget = budget || admission == DiskAdmission::kBudget;
        break;
      case DiskAdmission::kBadSlot:
        space.disk_slots->abandon(*slot);
        break;
    }
  }
}

void Node::end_write(const DiskIo& io, DiskOutcome outcome, Reason reason) {
  Space& space = *io.space;
  --disk_->writes[space.disk_slots->drive_of(io.disk)];
  space.writing.erase(io.key);
  std::vector<index::Slot> rejected{io.disk};
  if (io.path->generation != space.generation) {
    reason = Reason::kReset;
  } else if (outcome == DiskOutcome::kDone) {
    rejected.clear();
    space.index.add_residency(io.path->pin, kDiskTier, io.at, {&io.disk, 1}, now_, rejected);
    ++stats_.to_disk.blocks;
    stats_.to_disk.bytes += space.slots.slot_bytes();
    stats_.to_disk.latency.record(now_ - io.begun);
    stats_.blocks_checked += io.summed;
  } else if (outcome == DiskOutcome::kDamaged) {
    drop_damaged(space, io.path->pin, io.at, io.host);
  }
  for (const index::Slot slot : rejected) space.disk_slots->give_back(slot);
  if (outcome == DiskOutcome::kNoRoom) space.disk_slots->end_before(io.disk);
  if (reason != Reason::kNone) ++stats_.unwritten_blocks[slot_of(reason)];
  give_back_damaged(space);
  release(io.path);
}

void Node::check_disk_invariants() const {
  std::size_t users = 0;
  std::size_t used = 0;
  std::uint64_t write_bytes = 0;
  std::size_t checks = 0;
  for (const auto& space : spaces_) {
    users += space->fetches.size() + space->writing.size() + space->checks.size();
    checks += space->checks.size();
  }
  for (const auto& [op, io] : disk_->ios) checks -= io.given_up;
  FLEXKV_ASSERT(checks == disk_->scrub.checking);
  users += disk_->scrub.next != nullptr;
  for (const auto& run : disk_->write_runs) write_bytes += (run.end - run.begin) * run.path->space->slots.slot_bytes();
  users += disk_->write_runs.size();
  for (const auto& path : disk_->paths) used += path.users;
  FLEXKV_ASSERT(used == users);
  FLEXKV_ASSERT(write_bytes == disk_->queued_write_bytes);
}

}  // namespace flexkv::node
