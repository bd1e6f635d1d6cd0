// Opening, resetting and closing the files of a space.
#include <algorithm>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/disk/volume.h"

namespace flexkv::disk {
namespace {

// By which the read of a header must have begun.
constexpr Nanos kHeaderPatience = 10 * kSecond;
// Of writing one while a space opens: without it the drive is off for the space until it is opened again.
constexpr unsigned kHeaderTries = 3;

std::string failure(const std::string& what, Outcome outcome, int error_number) {
  return what + ": " + (error_number != 0 ? std::strerror(error_number) : outcome_name(outcome));
}

}  // namespace

// ---- opening -------------------------------------------------------------------------------------------------------

void Volume::begin_open(SpaceHandle space, const SpaceCodec& codec, std::function<void(Found)> then) {
  Found off;
  {
    std::lock_guard lock(mutex_);
    if (available_) {
      const std::uint64_t number = promise([then](const std::string& why) { then({.why_not = why}); });
      const SpaceId& id = codec.space();
      Job job = [this, space, codec, number, then] { prepare_open(space, codec, number, then); };
      const bool closing = std::ranges::any_of(spaces_, [&](const auto& entry) {
        return entry.second->codec.space() == id && entry.second->state == State::kClosing;
      });
      const bool waited_for =
          std::ranges::any_of(waiting_opens_, [&](const auto& waiting) { return waiting.first == id; });
      if (closing || waited_for) {
        waiting_opens_.push_back({id, std::move(job)});
      } else {
        lane_->post(std::move(job));
      }
      return;
    }
    off.why_not = off_why_;
  }
  then(off);
}

void Volume::prepare_open(SpaceHandle space, const SpaceCodec& codec, std::uint64_t number,
                          const std::function<void(Found)>& then) {
  const auto answer = [this, number, then](const Found& found) {
    if (keep_promise(number)) then(found);
  };
  auto created = std::make_unique<SpaceFiles>(codec);
  created->handle = space;
  SpaceFiles& files = *created;
  Found found;
  {
    std::lock_guard lock(mutex_);
    if (!promises_.contains(number)) return;
    if (closing_) found.why_not = "it is being closed";
    for (const auto& [handle, other] : spaces_) {
      if (other->codec.space() == codec.space()) found.why_not = "the space is open already";
    }
  }
  if (found.why_not.empty()) {
    if (auto opened = open_files(files); !opened) found.why_not = opened.error().message;
  }
  if (!found.why_not.empty()) return answer(found);
  found.any_file = files.blocks_bytes + files.records_bytes > 0;
  bool given_up = false;
  {
    std::lock_guard lock(mutex_);
    given_up = !promises_.contains(number);
    if (!given_up) {
      if (auto idle = idle_.extract(codec.space()); !idle.empty()) used_bytes_ -= idle.mapped().bytes;
      used_bytes_ += files.blocks_bytes + files.records_bytes;
      spaces_.emplace(space, std::move(created));
    }
  }
  if (given_up) {
    calls_.close_file(files.blocks);
    calls_.close_file(files.records);
    return;
  }
  if (files.records_bytes < kHeaderBytes) return answer(found);
  const auto buffer = std::make_shared<std::vector<std::byte>>(kHeaderBytes);
  run(files, file::Op::kRead, files.records, 0, buffer, environment_.options.now() + kHeaderPatience,
      [found, codec, buffer, answer](Outcome outcome, int error_number) mutable {
        if (outcome == Outcome::kDone) {
          found.fault = decode_header(*buffer, codec.space(), codec.slot_bytes(), found.header);
          if (found.fault == HeaderFault::kVersion) found.why_not = version_refusal(codec.records_name());
        } else {
          found.why_not = failure("cannot read " + codec.records_name(), outcome, error_number);
        }
        answer(found);
      });
}

Status Volume::open_files(SpaceFiles& files) {
  auto blocks = calls_.open(files.codec.blocks_name(), true);
  if (!blocks) return blocks.error();
  auto records = calls_.open(files.codec.records_name(), false);
  if (!records) {
    calls_.close_file(blocks.value());
    return records.error();
  }
  files.blocks = blocks.value();
  files.records = records.value();
  auto blocks_bytes = calls_.file_bytes(files.blocks);
  auto records_bytes = calls_.file_bytes(files.records);
  if (blocks_bytes.ok() && records_bytes.ok()) {
    files.blocks_bytes = blocks_bytes.value();
    files.records_bytes = records_bytes.value();
    return {};
  }
  calls_.close_file(files.blocks);
  calls_.close_file(files.records);
  return blocks_bytes.ok() ? records_bytes.error() : blocks_bytes.error();
}

void Volume::adopt(SpaceHandle space, std::uint64_t epoch, std::uint64_t written_epoch,
                   std::function<void(Adopted)> then) {
  std::uint64_t number = 0;
  std::string why_not;
  {
    std::lock_guard lock(mutex_);
    if (available_) {
      number = promise([then](const std::string& why) { then({.why_not = why}); });
    } else {
      why_not = off_why_;
    }
  }
  if (!why_not.empty()) return then({.why_not = why_not});
  lane_->post([this, space, epoch, written_epoch, number, then = std::move(then)] {
    const auto answer = [this, number, then](const Adopted& adopted) {
      if (keep_promise(number)) then(adopted);
    };
    SpaceFiles* files = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (!promises_.contains(number)) return;
      files = find(space, State::kOpening);
      FLEXKV_ASSERT(files != nullptr);
      ++files->in_flight;
    }
    Adopted adopted = settle(*files, written_epoch != 0);
    const bool usable = adopted.why_not.empty();
    if (usable) {
      std::lock_guard lock(mutex_);
      files->epoch = epoch;
      // Then the blocks there are good, and stay when no header can be written now.
      if (written_epoch == epoch) files->synced_epoch = epoch;
    }
    // Also when it is there already: it may not be on stable storage.
    usable ? write_first_header(*files, kHeaderTries, std::move(adopted), answer) : answer(adopted);
    Actions actions;
    {
      std::lock_guard lock(mutex_);
      drop_flight(*files, 1, actions);
    }
    act(actions);
  });
}

void Volume::write_first_header(SpaceFiles& files, unsigned tries, Adopted adopted, std::function<void(Adopted)> then) {
  {
    std::lock_guard lock(mutex_);
    const bool begins =
        want_header(files, [this, &files, tries, adopted, then](Outcome outcome, int error_number) mutable {
          if (outcome == Outcome::kFailed && tries > 1) {
            return write_first_header(files, tries - 1, std::move(adopted), std::move(then));
          }
          if (outcome != Outcome::kDone) adopted.why_not = failure("cannot write a header", outcome, error_number);
          then(adopted);
        });
    FLEXKV_ASSERT(begins);
  }
  write_header(files);
}

// Makes the files ready for use: of this space, with a header's room, no larger than they may be.
Volume::Adopted Volume::settle(SpaceFiles& files, bool keep) {
  Adopted adopted;
  const std::uint64_t slot_bytes = files.codec.slot_bytes();
  const auto give_up = [&](const Status& status) {
    adopted.why_not = status.error().message;
    return adopted;
  };
  if (!keep && files.blocks_bytes + files.records_bytes > 0) {
    if (auto status = recreate(files); !status) return give_up(status);
  }
  std::uint64_t room = share_bytes_;
  {
    std::lock_guard lock(mutex_);
    std::uint64_t idle_bytes = 0;
    for (const auto& [id, idle] : idle_) idle_bytes += idle.bytes;
    room -= std::min(room, used_bytes_ - files.blocks_bytes - files.records_bytes - idle_bytes);
  }
  const std::uint32_t slots_max = slots_that_fit(room, slot_bytes);
  if (slots_max == 0) {
    adopted.why_not = "no room for a block of " + std::to_string(slot_bytes) + " bytes: of its share of " +
                      std::to_string(share_bytes_) + " bytes, " + std::to_string(room) +
                      " are not in use; give it more (ssd_cache_gb)";
    return adopted;
  }
  const std::uint64_t records =
      (std::max<std::uint64_t>(files.records_bytes, kHeaderBytes) - kHeaderBytes) / kRecordBytes;
  auto slots =
      static_cast<std::uint32_t>(std::min<std::uint64_t>({slots_max, files.blocks_bytes / slot_bytes, records}));
  const std::uint64_t blocks_end = std::min(files.blocks_bytes, slots * slot_bytes);
  if (blocks_end < files.blocks_bytes || records_file_bytes(slots) < files.records_bytes) {
    // To the byte, so that the rest of the page is zeros when it comes back.
    if (auto status = cut(files, blocks_end, kHeaderBytes + slots * std::uint64_t{kRecordBytes}); !status) {
      adopted.dropped = "larger than their share now, and not to be shortened: " + status.error().message;
      if (status = recreate(files); !status) return give_up(status);
      slots = 0;
    }
  }
  if (auto status = allocate(files, slots); !status) return give_up(status);
  std::lock_guard lock(mutex_);
  files.slots_max = slots_max;
  files.slots_on_file = slots;
  adopted.slots_max = slots_max;
  adopted.slots_on_file = slots;
  adopted.record_count = slots;
  return adopted;
}

void Volume::read_records(SpaceHandle space, std::uint32_t first, std::uint32_t count, Nanos deadline,
                          std::function<void(Outcome, int, Buffer)> then) {
  SpaceFiles* files = nullptr;
  {
    std::lock_guard lock(mutex_);
    files = find(space, State::kOpening);
    FLEXKV_ASSERT(files != nullptr);
  }
  const auto buffer = std::make_shared<std::vector<std::byte>>(count * kRecordBytes);
  run(*files, file::Op::kRead, files->records, kHeaderBytes + first * std::uint64_t{kRecordBytes}, buffer, deadline,
      [buffer, then = std::move(then)](Outcome outcome, int error_number) { then(outcome, error_number, buffer); });
}

void Volume::finish_open(SpaceHandle space) {
  std::lock_guard lock(mutex_);
  SpaceFiles* files = find(space, State::kOpening);
  if (files != nullptr) files->state = State::kOpen;
}

// ---- the epoch -----------------------------------------------------------------------------------------------------

bool Volume::reset(SpaceHandle space, std::uint64_t epoch, Ended ended) {
  SpaceFiles* files = nullptr;
  {
    std::lock_guard lock(mutex_);
    files = find(space, State::kOpen);
    if (files == nullptr) return false;
    files->epoch = epoch;
    if (available_) {
      if (!want_header(*files, std::exchange(ended, nullptr))) return true;
    }
  }
  ended ? ended(Outcome::kUnavailable, 0) : write_header(*files);
  return true;
}

// Under the mutex. True: write_header() is to be called.
bool Volume::want_header(SpaceFiles& files, Ended ended) {
  if (!ended && files.header_active) return false;
  files.header_waiting.push_back(std::move(ended));
  ++files.in_flight;
  return !std::exchange(files.header_active, true);
}

void Volume::write_header(SpaceFiles& files) {
  std::uint64_t epoch = 0;
  {
    std::lock_guard lock(mutex_);
    files.header_now.swap(files.header_waiting);
    epoch = files.epoch;
  }
  if (meter_ != nullptr) meter_->charge(kHeaderBytes);
  const HeaderPage page = encode_header({files.codec.space(), files.codec.slot_bytes(), epoch});
  run(files, file::Op::kWrite, files.records, 0, std::make_shared<std::vector<std::byte>>(page.begin(), page.end()), 0,
      [this, &files, epoch](Outcome outcome, int error_number) {
        if (outcome != Outcome::kDone) return end_header(files, epoch, outcome, error_number);
        run(files, file::Op::kSync, files.records, 0, nullptr, 0,
            [this, &files, epoch](Outcome synced, int error) { end_header(files, epoch, synced, error); });
      });
}

void Volume::end_header(SpaceFiles& files, std::uint64_t epoch, Outcome outcome, int error) {
  Actions actions;
  bool again = false;
  {
    std::lock_guard lock(mutex_);
    if (outcome == Outcome::kDone) files.synced_epoch = epoch;
    if (outcome == Outcome::kFailed) note_write_error(error, actions);
    again = !files.header_waiting.empty();
    files.header_active = again;
    for (Ended& ended : std::exchange(files.header_now, {})) {
      if (ended) actions.ended.push_back({std::move(ended), {outcome, error}});
      actions.landed.push_back(&files);
    }
  }
  if (again) write_header(files);
  act(actions);
}

// Under the mutex. The drive is off, and may never end what it began: nobody waits for that. The requests go on.
void Volume::give_up_headers(SpaceFiles& files, Actions& actions) {
  for (auto* const waiting : {&files.header_now, &files.header_waiting}) {
    for (Ended& ended : *waiting) {
      if (ended) actions.ended.push_back({std::exchange(ended, nullptr), {Outcome::kUnavailable, 0}});
    }
  }
}

// ---- closing -------------------------------------------------------------------------------------------------------

void Volume::close_space(SpaceHandle space) {
  Actions actions;
  {
    std::lock_guard lock(mutex_);
    const auto found = spaces_.find(space);
    if (found == spaces_.end()) return;
    found->second->state = State::kClosing;
    if (found->second->in_flight == 0) actions.close.push_back(space);
  }
  act(actions);
}

void Volume::close_files(SpaceHandle space) {
  SpaceFiles* files = nullptr;
  {
    std::lock_guard lock(mutex_);
    const auto found = spaces_.find(space);
    if (found == spaces_.end() || found->second->in_flight > 0) return;
    files = found->second.get();
  }
  const SpaceCodec codec = files->codec;
  const std::uint64_t bytes = files->blocks_bytes + files->records_bytes;
  calls_.close_file(files->blocks);
  calls_.close_file(files->records);
  Job next;
  std::vector<Job> waiting;
  bool stale = false;
  {
    std::lock_guard lock(mutex_);
    // A reset that could not be written down. The last way to forget.
    stale = files->epoch != files->synced_epoch || files->doomed;
    // Later than what was found at the start, and in order.
    constexpr std::int64_t kClosedHere = INT64_MAX / 2;
    idle_[codec.space()] = {bytes, kClosedHere + ++closed_count_};
    spaces_.erase(space);
    const auto open = std::ranges::find(waiting_opens_, codec.space(), &std::pair<SpaceId, Job>::first);
    if (open != waiting_opens_.end()) {
      next = std::move(open->second);
      waiting_opens_.erase(open);
    }
    waiting.swap(waiting_removals_);
  }
  if (stale) remove_idle(codec.space());
  for (Job& then : waiting) when_removed(std::move(then));
  fit_share();
  if (next) lane_->post(std::move(next));
}

}  // namespace flexkv::disk
