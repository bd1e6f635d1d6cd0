// The bytes that a volume's files take: growing, cutting, and removing what nobody uses. All of it on the lane.
#include <algorithm>
#include <array>
#include <cerrno>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/disk/volume.h"

namespace flexkv::disk {
namespace {

// Files grow in steps, so that a write seldom waits for it.
constexpr std::uint64_t kStepBytes = 256ULL << 20;
// So long nobody tries to grow a file after there was no room.
constexpr Nanos kNoRoomTime = 30 * kSecond;

std::string mebibytes(std::uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

// ---- one space -----------------------------------------------------------------------------------------------------

std::uint32_t Volume::slots_that_fit(std::uint64_t bytes, std::uint64_t slot_bytes) const {
  std::uint64_t slots = bytes / (slot_bytes + kRecordBytes);
  while (slots > 0 && slots * slot_bytes + records_file_bytes(slots) > bytes) --slots;
  // Slot numbers of the space are 32 bits wide.
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(slots, (UINT32_MAX - 1) / environment_.drive_count));
}

// Makes the files longer for those who wait, or tells them that they cannot be.
void Volume::grow(SpaceFiles& files) {
  std::uint32_t needed = 0;
  {
    std::lock_guard lock(mutex_);
    for (const Transfer* transfer : files.waiting_for_room) needed = std::max(needed, transfer->index + 1);
  }
  const std::uint32_t slots = grow_to(files, needed);
  std::vector<Transfer*> ready;
  {
    std::lock_guard lock(mutex_);
    files.slots_on_file = std::max(files.slots_on_file, slots);
    if (slots < needed) files.no_room_until = environment_.options.now() + kNoRoomTime;
    files.growing = false;
    ready.swap(files.waiting_for_room);
  }
  for (Transfer* transfer : ready) start_write(*transfer);
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    drop_flight(files, 1, actions);
  }
  act(actions);
}

// How many slots there are then.
std::uint32_t Volume::grow_to(SpaceFiles& files, std::uint32_t needed) {
  const std::uint32_t present = files.slots_on_file;  // changes on the lane only
  if (needed <= present) return present;
  const std::uint64_t step =
      std::clamp<std::uint64_t>(kStepBytes / files.codec.slot_bytes(), 1, files.slots_max / 16 + 1);
  const auto roomy = static_cast<std::uint32_t>(std::min<std::uint64_t>(files.slots_max, needed + step));
  if (allocate(files, roomy).ok()) return roomy;
  const Status status = allocate(files, needed);
  if (status.ok()) return needed;
  if (!std::exchange(files.told_no_room, true)) {
    log_warning("SSD cache: " + directory_ + " has no room for more than " + std::to_string(present) +
                " blocks of this model: " + status.error().message);
  }
  return present;
}

Status Volume::allocate(SpaceFiles& files, std::uint32_t slots) {
  const std::uint64_t blocks = std::max(files.blocks_bytes, slots * files.codec.slot_bytes());
  const std::uint64_t records = std::max(files.records_bytes, records_file_bytes(slots));
  const std::uint64_t growth = blocks - files.blocks_bytes + records - files.records_bytes;
  if (growth == 0) return {};
  make_room(growth);
  {
    std::lock_guard lock(mutex_);
    if (used_bytes_ + growth > share_bytes_) {
      return Error{ErrorCode::kNoSpace, "its share of " + mebibytes(share_bytes_) + " is used"};
    }
    used_bytes_ += growth;
  }
  Status status;
  if (records > files.records_bytes) {
    status = calls_.allocate(files.records, files.records_bytes, records - files.records_bytes);
  }
  if (status.ok() && blocks > files.blocks_bytes) {
    status = calls_.allocate(files.blocks, files.blocks_bytes, blocks - files.blocks_bytes);
  }
  const std::uint64_t expected = files.blocks_bytes + files.records_bytes + growth;
  const std::uint64_t actual = measure(files);
  std::lock_guard lock(mutex_);
  used_bytes_ = used_bytes_ + actual - expected;
  return status;
}

// Bytes of both files as the file system says, or as last known.
std::uint64_t Volume::measure(SpaceFiles& files) {
  if (auto bytes = calls_.file_bytes(files.blocks); bytes.ok()) files.blocks_bytes = bytes.value();
  if (auto bytes = calls_.file_bytes(files.records); bytes.ok()) files.records_bytes = bytes.value();
  return files.blocks_bytes + files.records_bytes;
}

Status Volume::cut(SpaceFiles& files, std::uint64_t blocks_bytes, std::uint64_t records_bytes) {
  const std::uint64_t before = files.blocks_bytes + files.records_bytes;
  Status status;
  if (blocks_bytes < files.blocks_bytes) status = calls_.truncate(files.blocks, blocks_bytes);
  if (status.ok() && records_bytes < files.records_bytes) status = calls_.truncate(files.records, records_bytes);
  const std::uint64_t after = measure(files);
  std::lock_guard lock(mutex_);
  used_bytes_ = used_bytes_ + after - before;
  return status;
}

// Empty files instead of those that are there.
Status Volume::recreate(SpaceFiles& files) {
  const std::uint64_t before = files.blocks_bytes + files.records_bytes;
  for (const std::string& name : {files.codec.records_name(), files.codec.blocks_name()}) {
    auto removed = calls_.remove(name);
    if (!removed.ok() && removed.error().code != ErrorCode::kNotFound) return removed;
  }
  const file::FileId old[] = {files.blocks, files.records};
  Status opened = open_files(files);
  if (opened.ok()) {
    for (const file::FileId file : old) calls_.close_file(file);
  } else {
    files.blocks_bytes = files.records_bytes = 0;
  }
  std::lock_guard lock(mutex_);
  used_bytes_ = used_bytes_ + files.blocks_bytes + files.records_bytes - before;
  return opened;
}

// ---- spaces that nobody has open -----------------------------------------------------------------------------------

void Volume::remove_idle(const SpaceId& space) {
  const SpaceCodec codec(space, file::kDirectAlignment);
  for (const std::string& name : {codec.records_name(), codec.blocks_name()}) {
    auto removed = calls_.remove(name);
    if (removed.ok() || removed.error().code == ErrorCode::kNotFound) continue;
    log_warning("SSD cache: " + directory_ + ": " + removed.error().message);
    // Its bytes still count.
    std::lock_guard lock(mutex_);
    idle_.erase(space);
    removal_failed_ = true;
    return;
  }
  std::lock_guard lock(mutex_);
  used_bytes_ -= idle_.extract(space).mapped().bytes;
  ++stats_.removed_spaces;
}

void Volume::remove_closed(std::span<const std::uint8_t> id_prefix) {
  const auto meant = [prefix = std::vector(id_prefix.begin(), id_prefix.end())](const SpaceId& id) {
    return std::equal(prefix.begin(), prefix.end(), id.begin());
  };
  if (drive_ == nullptr) return;
  {
    std::lock_guard lock(mutex_);
    for (const auto& [handle, files] : spaces_) {
      if (files->state == State::kClosing && meant(files->codec.space())) files->doomed = true;
    }
  }
  lane_->post([this, meant] {
    std::vector<SpaceId> ids;
    {
      std::lock_guard lock(mutex_);
      for (const auto& [id, found] : idle_) {
        if (meant(id)) ids.push_back(id);
      }
    }
    for (const SpaceId& id : ids) remove_idle(id);
  });
}

void Volume::when_removed(Job then) {
  if (drive_ == nullptr) return;
  lane_->post([this, then = std::move(then)] {
    {
      std::lock_guard lock(mutex_);
      if (removal_failed_ || !available_) return;
      if (std::ranges::any_of(spaces_, [](const auto& entry) { return entry.second->doomed; })) {
        waiting_removals_.push_back(then);
        return;
      }
    }
    calls_.call(then);
  });
}

bool Volume::remove_oldest() {
  SpaceId oldest{};
  std::uint64_t bytes = 0;
  {
    std::lock_guard lock(mutex_);
    if (idle_.empty()) return false;
    const auto found = std::ranges::min_element(idle_, {}, [](const auto& entry) { return entry.second.last_use; });
    oldest = found->first;
    bytes = found->second.bytes;
  }
  log_info("SSD cache: " + directory_ + ": removing " + mebibytes(bytes) + " of a model that is not in use");
  remove_idle(oldest);
  return true;
}

void Volume::make_room(std::uint64_t bytes) {
  while (true) {
    {
      std::lock_guard lock(mutex_);
      if (used_bytes_ + bytes <= share_bytes_) return;
    }
    if (!remove_oldest()) return;
  }
}

// For a share that is smaller than what is there: the space that was used last is cut, the others go first.
void Volume::fit_share() {
  while (true) {
    SpaceId last{};
    {
      std::lock_guard lock(mutex_);
      if (used_bytes_ <= share_bytes_ || idle_.empty()) return;
      if (idle_.size() == 1) last = idle_.begin()->first;
    }
    if (last == SpaceId{}) {
      (void)remove_oldest();
    } else {
      return cut_idle(last);
    }
  }
}

void Volume::cut_idle(const SpaceId& space) {
  SpaceFiles files(SpaceCodec(space, file::kDirectAlignment));
  if (!open_files(files).ok()) return remove_idle(space);
  const std::uint64_t bytes = files.blocks_bytes + files.records_bytes;
  std::uint64_t room = share_bytes_;
  {
    std::lock_guard lock(mutex_);
    used_bytes_ = used_bytes_ - idle_.at(space).bytes + bytes;
    idle_.at(space).bytes = bytes;
    room -= std::min(room, used_bytes_ - bytes);
  }
  const std::uint64_t blocks = room - std::min(room, files.records_bytes);
  const bool done =
      blocks >= file::kDirectAlignment && cut(files, std::min(files.blocks_bytes, blocks), files.records_bytes).ok();
  calls_.close_file(files.blocks);
  calls_.close_file(files.records);
  if (!done) return remove_idle(space);
  std::lock_guard lock(mutex_);
  idle_.at(space).bytes = files.blocks_bytes + files.records_bytes;
}

}  // namespace flexkv::disk
