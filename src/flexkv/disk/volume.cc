#include "flexkv/disk/volume.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"

namespace flexkv::disk {
namespace {

// For the lock, the secret and the drive's own file.
constexpr std::uint64_t kOverheadBytes = 64 << 10;
// So long no write is tried after one found the drive full or read-only.
constexpr Nanos kNoWritesTime = 60 * kSecond;
// At the end: for a call that the lane is in, and for closing the files.
constexpr Nanos kLanePatience = kSecond;

bool is_lack_of_memory(int error_number) {
  return error_number == ENOMEM || error_number == EAGAIN || error_number == ENOBUFS;
}

Outcome to_outcome(file::Outcome outcome) {
  switch (outcome) {
    case file::Outcome::kDone:
      return Outcome::kDone;
    case file::Outcome::kFailed:
      return Outcome::kFailed;
    case file::Outcome::kDeadline:
      return Outcome::kDeadline;
    case file::Outcome::kCanceled:
      return Outcome::kCanceled;
  }
  return Outcome::kFailed;
}

}  // namespace

const char* outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone:
      return "done";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kChecksum:
      return "checksum";
    case Outcome::kDeadline:
      return "deadline";
    case Outcome::kCanceled:
      return "canceled";
    case Outcome::kUnavailable:
      return "unavailable";
    case Outcome::kNoRoom:
      return "no room";
    case Outcome::kDamaged:
      return "damaged";
  }
  return "?";
}

std::uint32_t seconds_since_1970() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return static_cast<std::uint32_t>(std::chrono::duration_cast<std::chrono::seconds>(now).count());
}

Volume::Volume(unsigned number, const VolumeSpec& spec, std::uint64_t share_bytes, const Environment& environment,
               std::unique_ptr<Workers> lane)
    : number_(number),
      directory_(spec.directory),
      share_bytes_(share_bytes),
      environment_(environment),
      meter_(spec.meter),
      lane_(std::move(lane)),
      idle_(spec.found),
      used_bytes_(kOverheadBytes) {
  for (const auto& [space, found] : idle_) used_bytes_ += found.bytes;
}

Volume::~Volume() = default;

void Volume::start(const VolumeSpec& spec) {
  std::string why_not = spec.why_not;
  if (why_not.empty()) {
    auto opened = spec.open_drive(*this);
    if (opened) {
      drive_ = std::move(opened).value();
    } else {
      why_not = opened.error().message;
    }
  }
  if (drive_ != nullptr) {
    log_info("SSD cache: " + drive_->describe());
    lane_->post([this] { fit_share(); });  // smaller than last time, perhaps
    return;
  }
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    available_ = false;
    off_why_ = why_not;
    set_health({false, false, why_not}, actions);
  }
  // As always, from another thread.
  environment_.checksums.post([this, told = std::make_shared<Actions>(std::move(actions))] { act(*told); });
}

bool Volume::close(Nanos patience) {
  Actions actions;
  std::unique_lock lock(mutex_);
  closing_ = true;
  for (auto& [handle, files] : spaces_) {
    for (Transfer* transfer : std::exchange(files->waiting_for_room, {})) {
      finish(*transfer, Outcome::kCanceled, 0, actions);
    }
  }
  lock.unlock();
  act(actions);
  lock.lock();
  const Nanos begin = environment_.options.now();
  quiet_.wait_for(lock, std::chrono::nanoseconds(patience), [&] { return transfers_.empty() && internals_.empty(); });
  lock.unlock();
  const Nanos left = std::max<Nanos>(patience - (environment_.options.now() - begin), 0);
  const bool quiet = drive_ == nullptr || drive_->close(left);
  lock.lock();
  abandoned_ = true;
  return quiet_drive_ = quiet;
}

bool Volume::end() {
  std::vector<std::string> stale;  // of a reset that could not be written down
  {
    std::lock_guard lock(mutex_);
    for (const auto& [handle, files] : spaces_) {
      if (available_ && files->epoch != files->synced_epoch) stale.push_back(files->codec.records_name());
    }
  }
  // The caller waits for no file system, which may hang also when no I/O is in flight.
  Job last = [this, stale] {
    for (const std::string& name : stale) (void)calls_.remove(name);
    if (quiet_drive_) calls_.destroy(drive_);
  };
  while (!lane_->stop(kLanePatience, std::exchange(last, nullptr))) {
    if (calls_.give_up()) return false;
  }
  return true;
}

// ---- what the drive says -------------------------------------------------------------------------------------------

void Volume::on_completions(std::span<const file::Completion> completions) {
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    if (abandoned_) return;
    for (const file::Completion& completion : completions) {
      const std::uint64_t id = completion.tag >> 2;
      if ((completion.tag & 3) == kInternal) {
        auto node = internals_.extract(id);
        FLEXKV_ASSERT(!node.empty());
        Internal& internal = node.mapped();
        if (internal.ended) {
          actions.ended.push_back(
              {std::move(internal.ended), {to_outcome(completion.outcome), completion.error_number}});
        }
        actions.landed.push_back(internal.files);
      } else if (const auto found = transfers_.find(id); found != transfers_.end()) {
        part_ended(*found->second, completion, actions);
      }
    }
  }
  act(actions);
}

void Volume::part_ended(Transfer& transfer, const file::Completion& completion, Actions& actions) {
  --transfer.parts;
  Outcome outcome = to_outcome(completion.outcome);
  if (outcome == Outcome::kFailed && completion.error_number == ECANCELED) {
    outcome = Outcome::kCanceled;  // when only a part of it had begun
  } else if (outcome == Outcome::kFailed && !available_) {
    outcome = Outcome::kUnavailable;  // a drive that is off failed them all: it says nothing of this block
  } else if (outcome == Outcome::kFailed && !transfer.write && is_lack_of_memory(completion.error_number)) {
    outcome = Outcome::kUnavailable;  // nor does the kernel when it had no room for the request
  }
  // Of two failures, an error tells more than a request that was not begun.
  if (outcome == Outcome::kFailed || (outcome != Outcome::kDone && transfer.outcome == Outcome::kDone)) {
    transfer.outcome = outcome;
    transfer.error_number = completion.error_number;
  }
  if (transfer.parts > 0) return;
  if (transfer.outcome != Outcome::kDone) {
    if (transfer.write && transfer.outcome == Outcome::kFailed) note_write_error(transfer.error_number, actions);
    const bool bad = !transfer.write && transfer.outcome == Outcome::kFailed && transfer.error_number == EIO;
    if (bad) note_bad_slot(*transfer.files, transfer.index);
    const bool short_file = !transfer.write && transfer.outcome == Outcome::kFailed && transfer.error_number == ENODATA;
    actions.tells_short |= short_file && !std::exchange(transfer.files->told_damaged, true);
    finish(transfer, transfer.outcome, transfer.error_number, actions);
  } else if (transfer.write) {
    transfer.files->commit_waiting.push_back({transfer.index, transfer.record, transfer.id});
    actions.commit.push_back(transfer.files->handle);
  } else {
    actions.verify.push_back(&transfer);
  }
}

void Volume::on_overdue(std::uint64_t tag) {
  Ended ended;
  std::optional<OpId> read;
  {
    std::lock_guard lock(mutex_);
    if (abandoned_) return;
    const std::uint64_t id = tag >> 2;
    if ((tag & 3) == kInternal) {
      const auto found = internals_.find(id);
      if (found != internals_.end()) ended = std::exchange(found->second.ended, nullptr);
    } else if (const auto found = transfers_.find(id); found != transfers_.end()) {
      Transfer& transfer = *found->second;
      if (!transfer.write && !std::exchange(transfer.overdue, true)) read = id;
    }
  }
  if (ended) ended(Outcome::kDeadline, 0);
  if (read) environment_.sink.on_overdue(*read);
}

void Volume::on_availability(bool available, const std::string& why) {
  Actions actions;
  std::vector<SpaceFiles*> stale;
  std::map<std::uint64_t, Answer> broken;
  std::vector<OpId> overdue;
  {
    std::lock_guard lock(mutex_);
    if (abandoned_) return;
    available_ = available;
    off_why_ = why;
    set_health({available, available && no_writes_why_.empty(), available ? no_writes_why_ : why}, actions);
    for (auto& [handle, files] : spaces_) {
      // A reset that the drive missed.
      if (available && files->state == State::kOpen && files->synced_epoch != files->epoch && want_header(*files, {})) {
        stale.push_back(files.get());
      }
      if (available) continue;
      give_up_headers(*files, actions);
      // No kernel has their buffers, and what makes room for them may hang as well.
      for (Transfer* transfer : std::exchange(files->waiting_for_room, {})) {
        finish(*transfer, Outcome::kUnavailable, 0, actions);
      }
    }
    if (!available) {
      broken.swap(promises_);
      waiting_opens_.clear();
    }
    for (auto& [id, transfer] : transfers_) {
      const bool reading = !transfer->write && transfer->parts > 0;
      if (!available && reading && !std::exchange(transfer->overdue, true)) overdue.push_back(id);
    }
  }
  act(actions);
  for (const OpId id : overdue) environment_.sink.on_overdue(id);
  for (SpaceFiles* files : stale) write_header(*files);
  for (const auto& [number, give_up] : broken) give_up(why);
}

// ---- state ---------------------------------------------------------------------------------------------------------

Volume::SpaceFiles* Volume::find(SpaceHandle space, State state) {
  const auto found = spaces_.find(space);
  return found == spaces_.end() || found->second->state != state ? nullptr : found->second.get();
}

// Under the mutex. Who waits gets one answer: by who keeps the promise, or `give_up` when the drive goes off.
std::uint64_t Volume::promise(Answer give_up) {
  promises_.emplace(next_promise_, std::move(give_up));
  return next_promise_++;
}

// False: it was given up.
bool Volume::keep_promise(std::uint64_t number) {
  std::lock_guard lock(mutex_);
  return promises_.erase(number) > 0;
}

void Volume::set_health(const Health& health, Actions& actions) {
  if (health.reads == health_.reads && health.writes == health_.writes && health.why == health_.why) return;
  health_ = health;
  actions.health = health;
}

void Volume::note_write_error(int error_number, Actions& actions) {
  // Not permitted: the files are immutable, or something watches over the node. Each further write would fail, too.
  constexpr int kNoWrites[] = {ENOSPC, EDQUOT, EROFS, EPERM, EACCES};
  if (std::ranges::find(kNoWrites, error_number) == std::end(kNoWrites)) return;
  no_writes_until_ = environment_.options.now() + kNoWritesTime;
  no_writes_why_ = std::string("no more writes for now: ") + std::strerror(error_number);
  if (available_) set_health({true, false, no_writes_why_}, actions);
}

void Volume::drop_flight(SpaceFiles& files, std::uint32_t count, Actions& actions) {
  FLEXKV_ASSERT(files.in_flight >= count);
  files.in_flight -= count;
  if (files.in_flight == 0 && files.state == State::kClosing) actions.close.push_back(files.handle);
}

void Volume::act(Actions& actions) {
  if (actions.health) {
    const Health& health = *actions.health;
    const std::string line = "SSD cache: " + directory_ +
                             (health.reads && health.writes ? " serves again"
                              : health.reads                ? " takes no writes: "
                                                            : " is off: ") +
                             health.why;
    log(health.reads && health.writes ? LogLevel::kInfo : LogLevel::kWarning, line);
    environment_.sink.on_health(number_, health);
  }
  if (actions.tells_short) {
    log_warning("SSD cache: " + directory_ +
                ": a file is shorter than what was written to it; what is missing is not served, and `flexkv status` "
                "counts it as failed reads. Does something else change the directory?");
  }
  if (!actions.completions.empty()) environment_.sink.on_completions(actions.completions);
  for (Transfer* transfer : actions.verify) environment_.checksums.post([this, transfer] { verify(*transfer); });
  for (auto& [ended, result] : actions.ended) ended(result.first, result.second);
  if (!actions.landed.empty()) {
    // Only now, so that files outlive what was just called for them.
    std::lock_guard lock(mutex_);
    for (SpaceFiles* files : actions.landed) drop_flight(*files, 1, actions);
  }
  for (const SpaceHandle space : actions.commit) commit(space);
  for (const SpaceHandle space : actions.close) lane_->post([this, space] { close_files(space); });
  std::lock_guard lock(mutex_);
  if (closing_ && transfers_.empty() && internals_.empty()) quiet_.notify_all();
}

// Ends also when the drive refuses: then before this returns.
void Volume::run(SpaceFiles& files, file::Op op, file::FileId file, std::uint64_t offset, Buffer buffer, Nanos deadline,
                 Ended ended) {
  file::Request request;
  request.op = op;
  request.urgency = op == file::Op::kRead ? file::Urgency::kLoad : file::Urgency::kSave;
  request.file = file;
  request.offset = offset;
  request.data = buffer == nullptr ? nullptr : buffer->data();
  request.bytes = buffer == nullptr ? 0 : buffer->size();
  request.deadline = deadline;
  std::uint64_t id = 0;
  bool open = true;
  {
    std::lock_guard lock(mutex_);
    open = !abandoned_;
    id = next_internal_++;
    internals_[id] = {&files, std::move(buffer), std::move(ended)};
    ++files.in_flight;
  }
  request.tag = id << 2 | kInternal;
  if (open && drive_->submit({&request, 1})) return;
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    auto node = internals_.extract(id);
    FLEXKV_ASSERT(!node.empty());
    actions.ended.push_back({std::move(node.mapped().ended), {Outcome::kUnavailable, 0}});
    actions.landed.push_back(&files);
  }
  act(actions);
}

std::uint32_t Volume::queued() const {
  std::lock_guard lock(mutex_);
  return queued_;
}

VolumeStats Volume::stats() const {
  file::DriveStats drive;
  std::string form;
  if (drive_ != nullptr) {
    drive = drive_->stats();
    form = drive_->describe();
  }
  std::lock_guard lock(mutex_);
  VolumeStats stats = stats_;
  stats.directory = directory_;
  stats.form = std::move(form);
  stats.health = health_;
  stats.share_bytes = share_bytes_;
  stats.used_bytes = used_bytes_;
  for (const auto& [id, idle] : idle_) stats.closed_bytes += idle.bytes;
  stats.queued = queued_;
  stats.drive = drive;
  return stats;
}

void Volume::register_memory(std::span<std::byte> memory) {
  if (drive_ != nullptr) drive_->register_memory(memory);
}

}  // namespace flexkv::disk
