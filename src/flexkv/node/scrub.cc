// The scrub: every block on drives is read and compared with its checksum, slowly, while the node serves.
//
// A block that is checked is pinned, so that its slot goes to no other block meanwhile: what is found bad is bad. One
// that is bad is forgotten there, as when a load finds it.

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// At once: enough to keep a drive busy while nobody else does, and little to wait for.
constexpr std::uint32_t kChecksPerDrive = 2;
// Under the lock, before others have their turn.
constexpr std::uint32_t kLooksMax = 4096;
constexpr std::uint32_t kBlocksMax = 256;
constexpr Nanos kTurn = kMillisecond;
// What could not be read in time for the rate is made up for as far as this.
constexpr Nanos kSlack = 100 * kMillisecond;
constexpr Nanos kBusyPause = 100 * kMillisecond;
constexpr double kPauseMax = 1e9;  // seconds: whatever the rate, it is a time

}  // namespace

void Node::begin_scrub(std::uint64_t bytes_per_second, Nanos now) {
  tell_time(now);
  if (disk_ == nullptr) return;
  FLEXKV_ASSERT(bytes_per_second > 0);
  Scrub& scrub = disk_->scrub;
  const bool goes_on = scrub.status && scrub.status->state == ScrubStatus::State::kRunning;
  if (!goes_on) {
    scrub.status.emplace();
    scrub.status->begun = now_;
    scrub.status->drives.resize(disk_->port.drive_count());
    for (const auto& space : spaces_) {
      const std::uint64_t blocks = space->index.block_count(kDiskTier);
      scrub.status->blocks += blocks;
      scrub.status->bytes += blocks * space->slots.slot_bytes();
    }
    scrub.space = 0;
    scrub.scanning = false;
    ++scrub.number;
  }
  scrub.status->bytes_per_second = bytes_per_second;
  scrub.next_at = now_;
  pump_disk();
}

void Node::stop_scrub(Nanos now) {
  tell_time(now);
  if (disk_ == nullptr) return;
  Scrub& scrub = disk_->scrub;
  if (!scrub.status || scrub.status->state != ScrubStatus::State::kRunning) return;
  end_scrub(ScrubStatus::State::kStopped);
  for (const auto& space : spaces_) {
    for (const auto& [key, op] : space->checks) disk_->port.cancel(op);
  }
}

const ScrubStatus* Node::scrub() const {
  return disk_ == nullptr || !disk_->scrub.status ? nullptr : &*disk_->scrub.status;
}

void Node::end_scrub(ScrubStatus::State state) {
  Scrub& scrub = disk_->scrub;
  scrub.status->state = state;
  scrub.status->ended = now_;
  if (scrub.next != nullptr) release(std::exchange(scrub.next, nullptr));
  Space* const space = find_space(scrub.space);
  if (std::exchange(scrub.scanning, false) && space != nullptr) space->index.end_scan();
}

// When the scrub goes on of itself; otherwise something has to end first.
std::optional<Nanos> Node::next_check() const {
  const Scrub& scrub = disk_->scrub;
  const bool goes_on = scrub.status && scrub.status->state == ScrubStatus::State::kRunning && !scrub.waits;
  return goes_on ? std::optional(scrub.next_at) : std::nullopt;
}

void Node::pump_scrub() {
  Scrub& scrub = disk_->scrub;
  std::uint32_t blocks = 0;
  while (next_check() && now_ >= scrub.next_at) {
    // Blocks of a drive that is off are passed over, and cost no time of the rate.
    if (++blocks > kBlocksMax) {
      scrub.next_at = now_ + kTurn;
      return;
    }
    if (scrub.checking >= kChecksPerDrive * disk_->port.drive_count()) {
      scrub.waits = true;
      return;
    }
    if (scrub.next == nullptr && !find_next_check()) return;
    if (!begin_check(*scrub.next)) return;
    release(std::exchange(scrub.next, nullptr));
  }
}

// The block that is to be checked next. False: not now, or there is none.
bool Node::find_next_check() {
  Scrub& scrub = disk_->scrub;
  Space* space = find_space(scrub.space);
  if (space == nullptr || !scrub.scanning) {
    // In the order in which they were opened, also those that are opened meanwhile.
    const auto next = std::ranges::find_if(spaces_, [&](const auto& one) { return one->number > scrub.space; });
    if (next == spaces_.end() || (*next)->disk_state == Space::DiskState::kOpening) {
      if (next == spaces_.end() && scrub.checking == 0) {
        end_scrub(ScrubStatus::State::kDone);
      } else {
        scrub.waits = true;
      }
      return false;
    }
    space = next->get();
    scrub.space = space->number;
    scrub.scanning = true;
    space->index.begin_scan(kDiskTier);
  }
  const auto [pin, over] = space->index.scan(kLooksMax);
  scrub.scanning = !over;
  if (pin) scrub.next = hold(*space, *pin);
  return pin.has_value();
}

// False: its drive has too much to do.
bool Node::begin_check(Path& path) {
  Scrub& scrub = disk_->scrub;
  Space& space = *path.space;
  if (path.generation != space.generation) return true;
  const std::uint32_t at = space.index.depth(path.pin) - 1;
  DiskTransfer transfer;
  space.index.collect(path.pin, kDiskTier, at, {&transfer.slot, 1});
  space.index.collect_keys(path.pin, at, {&transfer.key, 1});
  if (transfer.slot == index::kNoSlot || space.checks.contains(transfer.key)) return true;
  const unsigned drive = space.disk_slots->drive_of(transfer.slot);
  transfer.op = disk_->next_op++;
  transfer.space = space.number;
  switch (disk_->port.verify(transfer)) {
    case DiskAdmission::kQueued:
      break;
    case DiskAdmission::kBusy:
      scrub.next_at = now_ + kBusyPause;
      return false;
    default:
      ++scrub.status->drives[drive].unchecked_blocks;
      return true;
  }
  ++path.users;
  ++scrub.checking;
  space.checks[transfer.key] = transfer.op;
  disk_->ios[transfer.op] = {&space, transfer.key, &path, at, transfer.slot, DiskIo::Kind::kCheck, false, now_};
  disk_->ios[transfer.op].scrub = scrub.number;
  const double seconds =
      static_cast<double>(space.slots.slot_bytes()) / static_cast<double>(scrub.status->bytes_per_second);
  scrub.next_at = std::max(scrub.next_at, now_ - kSlack) + static_cast<Nanos>(std::min(seconds, kPauseMax) * kSecond);
  return true;
}

void Node::end_check(const DiskIo& io, DiskOutcome outcome) {
  Scrub& scrub = disk_->scrub;
  Space& space = *io.space;
  if (!io.given_up) --scrub.checking;
  space.checks.erase(io.key);
  const bool current = io.path->generation == space.generation;
  const bool bad = outcome == DiskOutcome::kChecksum || outcome == DiskOutcome::kFailed;
  if (current && bad) drop_bad(io, outcome);
  if (io.dropped) space.disk_slots->give_back(io.disk);
  // What was stopped meanwhile has its figures.
  if (current && io.scrub == scrub.number && !io.given_up) {
    ScrubStatus::Drive& drive = scrub.status->drives[space.disk_slots->drive_of(io.disk)];
    if (outcome == DiskOutcome::kDone || bad) {
      ++drive.checked_blocks;
      drive.checked_bytes += space.slots.slot_bytes();
      drive.damaged_blocks += outcome == DiskOutcome::kChecksum;
      drive.unreadable_blocks += outcome == DiskOutcome::kFailed;
    } else {
      ++drive.unchecked_blocks;
    }
  }
  release(io.path);
}

// Its drive went off: the check ends when the drive lets go of it, which may be never.
void Node::give_up_check(DiskIo& io) {
  Scrub& scrub = disk_->scrub;
  const unsigned drive = io.space->disk_slots->drive_of(io.disk);
  if (io.given_up || disk_->port.can_read(drive)) return;
  io.given_up = true;
  --scrub.checking;
  if (io.scrub == scrub.number) ++scrub.status->drives[drive].unchecked_blocks;
  pump_disk();
}

// Forgets a block that a drive does not give back as it was written. Its slot stays taken as long as another read of it
// is under way.
void Node::drop_bad(const DiskIo& io, DiskOutcome outcome) {
  Space& space = *io.space;
  index::Slot slot = index::kNoSlot;
  space.index.collect(io.path->pin, kDiskTier, io.at, {&slot, 1});
  if (slot != io.disk) return;  // the other read has found it bad before
  const auto why = outcome == DiskOutcome::kChecksum ? index::MissReason::kDamaged : index::MissReason::kUnreadable;
  (void)space.index.drop(io.path->pin, kDiskTier, io.at, why);
  ++space.drops;
  const auto other = std::ranges::find_if(
      disk_->ios, [&](const auto& entry) { return entry.second.space == &space && entry.second.disk == slot; });
  if (other != disk_->ios.end()) {
    other->second.dropped = true;
  } else {
    space.disk_slots->give_back(slot);
  }
}

}  // namespace flexkv::node
