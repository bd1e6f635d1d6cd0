// Writes and reads of blocks.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/disk/volume.h"

namespace flexkv::disk {
namespace {

// A slot is given up when it fails again after it was written anew: what a crash left there is no reason yet.
constexpr std::uint32_t kFailuresMax = 2;

// For a block and its record. What is granted and then not written counts as written.
Admission ask_meter(WriteMeter* meter, std::uint64_t block_bytes) {
  if (meter == nullptr) return Admission::kQueued;
  switch (meter->take(block_bytes + kPageBytes)) {
    case WriteMeter::Answer::kGranted:
      return Admission::kQueued;
    case WriteMeter::Answer::kLater:
      return Admission::kLater;
    case WriteMeter::Answer::kRefused:
      break;
  }
  return Admission::kBudget;
}

}  // namespace

// Payloads written one after another whose records go to the drive together. While they do, the next ones gather.
struct Volume::CommitGroup {
  SpaceFiles* files;
  std::vector<PendingRecord> members;
  std::size_t outstanding = 0;
  Outcome outcome = Outcome::kDone;
  int error_number = 0;
};

Admission Volume::write(const WriteOp& op, std::uint32_t index, std::uint64_t sequence) {
  Transfer* transfer = nullptr;
  SpaceFiles* stale = nullptr;
  Admission admission{};
  {
    std::lock_guard lock(mutex_);
    SpaceFiles* files = find(op.space, State::kOpen);
    if (files != nullptr && available_ && files->synced_epoch != files->epoch && want_header(*files, {})) stale = files;
    admission = files == nullptr ? Admission::kUnavailable : admit_write(*files, index);
    if (admission == Admission::kQueued) admission = ask_meter(meter_.get(), op.bytes.size());
    if (admission == Admission::kQueued) {
      FLEXKV_ASSERT(op.id < kOpIdEnd && op.bytes.size() == files->codec.slot_bytes() && index < files->slots_max);
      auto created = std::make_unique<Transfer>();
      created->id = op.id;
      created->write = true;
      created->files = files;
      created->index = index;
      created->key = op.key;
      created->parent = op.parent;
      // The drive takes one kind of pointer, and does not write to what it is told to write.
      created->bytes = {const_cast<std::byte*>(op.bytes.data()), op.bytes.size()};
      created->sums = op.sums;
      created->urgency = file::Urgency::kSave;
      created->deadline = op.deadline;
      created->epoch = files->epoch;
      created->sequence = sequence;
      transfer = created.get();
      FLEXKV_ASSERT(transfers_.emplace(op.id, std::move(created)).second);
      queued_ += transfer->requests();
      ++files->in_flight;
    }
  }
  if (stale != nullptr) write_header(*stale);
  if (transfer != nullptr) environment_.checksums.post([this, transfer] { prepare_write(*transfer); });
  return admission;
}

Admission Volume::admit_write(const SpaceFiles& files, std::uint32_t index) const {
  if (closing_ || !available_) return Admission::kUnavailable;
  if (!no_writes_why_.empty() && environment_.options.now() < no_writes_until_) return Admission::kUnavailable;
  // A reset that is not on stable storage yet: neither would be what is written after it.
  if (environment_.options.strict && files.synced_epoch != files.epoch) return Admission::kUnavailable;
  const auto failures = files.failures.find(index);
  if (failures != files.failures.end() && failures->second >= kFailuresMax) return Admission::kQuarantined;
  return queued_ < environment_.options.requests_per_drive_max ? Admission::kQueued : Admission::kBusy;
}

void Volume::prepare_write(Transfer& transfer) {
  if (!holds_sums(transfer.bytes, transfer.sums)) {
    Actions actions;
    {
      std::lock_guard lock(mutex_);
      finish(transfer, Outcome::kDamaged, 0, actions);
    }
    return act(actions);
  }
  const SpaceCodec& codec = transfer.files->codec;
  const std::uint64_t checksum = codec.payload_checksum(transfer.key, transfer.epoch, transfer.bytes);
  transfer.record =
      codec.encode({transfer.key, transfer.parent, checksum, transfer.sequence, transfer.epoch}, transfer.index);
  start_write(transfer);
}

void Volume::start_write(Transfer& transfer) {
  Actions actions;
  bool grows = false;
  bool goes = false;
  SpaceFiles& files = *transfer.files;
  file::Request request;
  const OpId id = transfer.id;
  {
    std::lock_guard lock(mutex_);
    if (transfer.canceled || closing_) {
      finish(transfer, Outcome::kCanceled, 0, actions);
    } else if (!available_) {
      finish(transfer, Outcome::kUnavailable, 0, actions);
    } else if (transfer.index < files.slots_on_file) {
      goes = true;
      transfer.parts = 1;
      const std::uint64_t slot_bytes = files.codec.slot_bytes();
      request = {id << 2 | kPayload,          file::Op::kWrite,      transfer.urgency,      files.blocks,
                 transfer.index * slot_bytes, transfer.bytes.data(), transfer.bytes.size(), transfer.deadline};
    } else if (environment_.options.now() < files.no_room_until) {
      finish(transfer, Outcome::kNoRoom, ENOSPC, actions);
    } else {
      files.waiting_for_room.push_back(&transfer);
      grows = !std::exchange(files.growing, true);
      if (grows) ++files.in_flight;
    }
  }
  act(actions);
  if (grows) lane_->post([this, &files] { grow(files); });
  if (!goes) return;
  if (drive_->submit({&request, 1})) {
    submitted(id);
    return;
  }
  Actions refused;
  {
    std::lock_guard lock(mutex_);
    finish(*transfers_.at(id), Outcome::kUnavailable, 0, refused);
  }
  act(refused);
}

Admission Volume::read(const ReadOp& op, std::uint32_t index) {
  file::Request requests[2];
  {
    std::lock_guard lock(mutex_);
    SpaceFiles* files = find(op.space, State::kOpen);
    // What was found can be read while the rest is still being told.
    if (files == nullptr) files = find(op.space, State::kOpening);
    if (closing_ || files == nullptr || !available_) return Admission::kUnavailable;
    const std::uint64_t slot_bytes = files->codec.slot_bytes();
    FLEXKV_ASSERT(op.id < kOpIdEnd && (op.bytes.empty() || op.bytes.size() == slot_bytes) && index < files->slots_max);
    auto created = std::make_unique<Transfer>();
    if (queued_ + created->requests() > environment_.options.requests_per_drive_max) return Admission::kBusy;
    created->id = op.id;
    created->files = files;
    created->index = index;
    created->key = op.key;
    created->bytes = op.bytes;
    if (op.bytes.empty()) {
      created->own_bytes.reset(static_cast<std::byte*>(std::aligned_alloc(file::kDirectAlignment, slot_bytes)));
      if (created->own_bytes == nullptr) return Admission::kBusy;
      created->bytes = {created->own_bytes.get(), slot_bytes};
    }
    created->epoch = files->epoch;
    created->parts = 2;
    requests[0] = {op.id << 2 | kPayload, file::Op::kRead,       op.urgency, files->blocks,
                   index * slot_bytes,    created->bytes.data(), slot_bytes, op.deadline};
    requests[1] = {op.id << 2 | kRecord,
                   file::Op::kRead,
                   op.urgency,
                   files->records,
                   kHeaderBytes + index * std::uint64_t{kRecordBytes},
                   created->record.data(),
                   kRecordBytes,
                   op.deadline};
    queued_ += created->requests();
    ++files->in_flight;
    FLEXKV_ASSERT(transfers_.emplace(op.id, std::move(created)).second);
  }
  if (drive_->submit(requests)) {
    submitted(op.id);
    return Admission::kQueued;
  }
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    finish(*transfers_.at(op.id), Outcome::kUnavailable, 0, actions);
    actions.completions.clear();  // the caller is told by the return value
  }
  act(actions);
  return Admission::kUnavailable;
}

// A cancel() that came while the drive did not know the request yet.
void Volume::submitted(OpId id) {
  {
    std::lock_guard lock(mutex_);
    const auto found = transfers_.find(id);
    if (found == transfers_.end() || !found->second->canceled) return;
  }
  drive_->cancel(id << 2 | kPayload);
  drive_->cancel(id << 2 | kRecord);
}

void Volume::cancel(OpId id) {
  bool waiting = false;
  {
    std::lock_guard lock(mutex_);
    const auto found = transfers_.find(id);
    if (found == transfers_.end()) return;
    Transfer& transfer = *found->second;
    transfer.canceled = true;
    waiting = std::erase(transfer.files->waiting_for_room, &transfer) > 0;
    // Its completion comes from another thread, as always.
    if (waiting) environment_.checksums.post([this, &transfer] { start_write(transfer); });
  }
  if (waiting) return;
  drive_->cancel(id << 2 | kPayload);
  drive_->cancel(id << 2 | kRecord);
}

void Volume::verify(Transfer& transfer) {
  bool good =
      transfer.files->codec.holds(transfer.record, transfer.bytes, transfer.index, transfer.key, transfer.epoch);
  Actions actions;
  bool tells = false;
  {
    std::lock_guard lock(mutex_);
    SpaceFiles& files = *transfer.files;
    const bool current = transfer.epoch == files.epoch;
    if (!good && current) {
      tells = !std::exchange(files.told_damaged, true);
      ++stats_.checksum_failures;
      note_bad_slot(files, transfer.index);
    }
    good = good && current;  // a reset counts for reads under way, too
    // So that the next start does not find it again; without budget it will, and see what it is again.
    if (!good && current && !closing_ && ask_meter(meter_.get(), 0) == Admission::kQueued) {
      files.commit_waiting.push_back({transfer.index, {}, std::nullopt});
      actions.commit.push_back(files.handle);
      ++files.in_flight;
      ++queued_;
    }
    finish(transfer, good ? Outcome::kDone : Outcome::kChecksum, 0, actions);
  }
  if (tells) {
    log_warning("SSD cache: " + directory_ +
                ": a block is not what its record says, and is not served; `flexkv status` counts all of them");
  }
  act(actions);
}

void Volume::note_bad_slot(SpaceFiles& files, std::uint32_t index) {
  if (++files.failures[index] == kFailuresMax) ++stats_.quarantined_slots;
}

// Destroys the transfer.
void Volume::finish(Transfer& transfer, Outcome outcome, int error_number, Actions& actions) {
  SpaceFiles& files = *transfer.files;
  const std::uint64_t bytes = transfer.bytes.size();
  if (outcome == Outcome::kDone && transfer.own_bytes == nullptr) {
    ++(transfer.write ? stats_.blocks_written : stats_.blocks_read);
    (transfer.write ? stats_.block_bytes_written : stats_.block_bytes_read) += bytes;
    if (transfer.write && !no_writes_why_.empty()) {
      no_writes_why_.clear();
      if (available_) set_health({true, true, {}}, actions);
    }
  } else if (outcome == Outcome::kFailed) {
    ++(transfer.write ? stats_.failed_writes : stats_.failed_reads);
  }
  queued_ -= transfer.requests();
  actions.completions.push_back({transfer.id, outcome, error_number});
  transfers_.erase(transfer.id);
  drop_flight(files, 1, actions);
}

// ---- records -------------------------------------------------------------------------------------------------------

void Volume::commit(SpaceHandle space) {
  const auto group = std::make_shared<CommitGroup>();
  {
    std::lock_guard lock(mutex_);
    const auto found = spaces_.find(space);
    if (found == spaces_.end() || found->second->committing || found->second->commit_waiting.empty()) return;
    group->files = found->second.get();
    group->files->committing = true;
    group->members.swap(group->files->commit_waiting);
  }
  if (!environment_.options.strict) {
    write_records(group);
    return;
  }
  run(*group->files, file::Op::kSync, group->files->blocks, 0, nullptr, 0,
      [this, group](Outcome outcome, int error_number) {
        if (outcome == Outcome::kDone) {
          write_records(group);
        } else {
          end_commit(*group, outcome, error_number);
        }
      });
}

void Volume::write_records(const std::shared_ptr<CommitGroup>& group) {
  std::vector<RecordRun> runs = join(group->members);
  {
    std::lock_guard lock(mutex_);
    group->outstanding = runs.size();
    stats_.record_writes += runs.size();
    for (const RecordRun& run : runs) stats_.record_bytes_written += run.bytes.size();
  }
  for (RecordRun& record_run : runs) {
    const std::uint64_t offset = kHeaderBytes + record_run.first * std::uint64_t{kRecordBytes};
    run(*group->files, file::Op::kWrite, group->files->records, offset,
        std::make_shared<std::vector<std::byte>>(std::move(record_run.bytes)), 0,
        [this, group](Outcome outcome, int error_number) { record_written(group, outcome, error_number); });
  }
}

void Volume::record_written(const std::shared_ptr<CommitGroup>& group, Outcome outcome, int error_number) {
  {
    std::lock_guard lock(mutex_);
    if (outcome != Outcome::kDone && group->outcome == Outcome::kDone) {
      group->outcome = outcome;
      group->error_number = error_number;
    }
    if (--group->outstanding > 0) return;
  }
  if (!environment_.options.strict || group->outcome != Outcome::kDone) {
    end_commit(*group, group->outcome, group->error_number);
    return;
  }
  run(*group->files, file::Op::kSync, group->files->records, 0, nullptr, 0,
      [this, group](Outcome synced, int error) { end_commit(*group, synced, error); });
}

void Volume::end_commit(CommitGroup& group, Outcome outcome, int error_number) {
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    SpaceFiles& files = *group.files;
    files.committing = false;
    if (outcome == Outcome::kFailed) note_write_error(error_number, actions);
    if (!files.commit_waiting.empty()) actions.commit.push_back(files.handle);
    for (const PendingRecord& member : group.members) {
      if (member.op) {
        finish(*transfers_.at(*member.op), outcome, error_number, actions);
      } else {
        --queued_;
        drop_flight(files, 1, actions);
      }
    }
  }
  act(actions);
}

}  // namespace flexkv::disk
