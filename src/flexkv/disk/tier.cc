#include "flexkv/disk/tier.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"

namespace flexkv::disk {
namespace {

// Waiting jobs beyond one for each request: openings, resets, health.
constexpr std::size_t kSpareJobs = 4096;

// Volumes whose drives hang with buffers in their hands.
void keep_for_ever(std::shared_ptr<Volume> volume) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<std::shared_ptr<Volume>>;
  std::lock_guard lock(mutex);
  kept->push_back(std::move(volume));
}

}  // namespace

std::unique_ptr<Workers> make_thread_workers(const std::string& name, unsigned threads, std::size_t jobs_max) {
  return std::make_unique<ThreadWorkers>(name, threads, jobs_max);
}

DiskTier::DiskTier(TierOptions options, std::span<const VolumeSpec> volumes, TierSink& sink,
                   const MakeWorkers& make_workers)
    : options_(std::move(options)), sink_(sink) {
  FLEXKV_ASSERT(!volumes.empty());
  const std::size_t jobs_max = volumes.size() * (options_.requests_per_drive_max + kSpareRequests) + kSpareJobs;
  // One checks about 10 GB/s.
  const unsigned threads = std::clamp(std::thread::hardware_concurrency() / 4, 1U, 4U);
  checksums_ = make_workers("flexkv-sums", threads, jobs_max);
  const std::uint64_t share = options_.bytes_max / volumes.size();
  for (unsigned i = 0; i < volumes.size(); ++i) {
    const Volume::Environment environment{options_, sink_, *checksums_, static_cast<unsigned>(volumes.size())};
    volumes_.push_back(std::make_shared<Volume>(i, volumes[i], share, environment,
                                                make_workers("flexkv-files" + std::to_string(i), 1, kSpareJobs)));
  }
  for (unsigned i = 0; i < volumes.size(); ++i) volumes_[i]->start(volumes[i]);
}

DiskTier::~DiskTier() {
  if (!closed_) (void)close(0);
}

bool DiskTier::close(Nanos patience) {
  FLEXKV_ASSERT(!std::exchange(closed_, true));
  const Nanos until = options_.now() + patience;
  std::vector<bool> quiet;
  for (const auto& volume : volumes_) quiet.push_back(volume->close(std::max<Nanos>(until - options_.now(), 0)));
  checksums_->stop();
  for (std::size_t i = 0; i < volumes_.size(); ++i) {
    const bool ended = volumes_[i]->end();
    if (quiet[i] && ended) continue;
    log_warning("SSD cache: " + volumes_[i]->directory() + " hangs; what it was asked for is left behind" +
                (quiet[i] ? "" : ", and the memory that it may still write to stays in use"));
    keep_for_ever(volumes_[i]);
  }
  return std::ranges::find(quiet, false) == quiet.end();
}

// ---- spaces --------------------------------------------------------------------------------------------------------

void DiskTier::open_space(SpaceHandle space, const SpaceId& id, std::uint64_t slot_bytes) {
  FLEXKV_ASSERT(slot_bytes > 0 && slot_bytes % file::kDirectAlignment == 0);
  const Volume::Environment environment{options_, sink_, *checksums_, drive_count()};
  std::shared_ptr<Opening> opening;
  {
    std::lock_guard lock(mutex_);
    const auto [entry, fresh] = spaces_.try_emplace(space, id, slot_bytes);
    FLEXKV_ASSERT(fresh);
    opening = std::make_shared<Opening>(space, entry->second.codec, volumes_, environment,
                                        [this, space](Opening::Result result) { opened(space, std::move(result)); });
    entry->second.opening = opening;
  }
  // Elsewhere, because a volume that is off answers at once.
  checksums_->post([opening] { opening->begin(); });
}

void DiskTier::opened(SpaceHandle space, Opening::Result result) {
  {
    std::lock_guard lock(mutex_);
    Space& entry = spaces_.at(space);
    entry.opening = nullptr;
    entry.epoch = result.epoch;
    // Later than what could not be read now and comes back with the next start, written in this very second perhaps.
    const std::uint64_t seconds = options_.wall_seconds() + (result.all_read ? std::uint64_t{0} : 1);
    entry.sequence = std::max(result.sequence_max, seconds << 32);
    for (unsigned i = 0; i < volumes_.size(); ++i) {
      result.opened.slots[i] > 0 ? volumes_[i]->finish_open(space) : volumes_[i]->close_space(space);
    }
    if (entry.reset) reset_volumes(space, entry);
    if (entry.closing) {
      close_volumes(space);
      return;
    }
  }
  sink_.on_opened(space, result.opened);
}

// Under the mutex.
void DiskTier::close_volumes(SpaceHandle space) {
  for (const auto& volume : volumes_) volume->close_space(space);
  spaces_.erase(space);
}

void DiskTier::close_space(SpaceHandle space) {
  std::lock_guard lock(mutex_);
  Space& entry = spaces_.at(space);
  if (entry.opening == nullptr) {
    close_volumes(space);
  } else {
    entry.closing = true;
    entry.opening->stop_emitting();
  }
}

void DiskTier::reset_space(SpaceHandle space, std::function<void(bool durable)> then) {
  std::lock_guard lock(mutex_);
  Space& entry = spaces_.at(space);
  entry.reset_waiting.push_back(std::move(then));
  if (entry.opening == nullptr) {
    reset_volumes(space, entry);
  } else {
    entry.reset = true;
    entry.opening->stop_emitting();
  }
}

// Under the mutex, so that epochs reach the volumes in their order.
void DiskTier::reset_volumes(SpaceHandle space, Space& entry) {
  struct Answers {
    std::vector<std::function<void(bool)>> waiting;
    std::atomic<std::size_t> pending;
    std::atomic<bool> durable = true;
  };
  entry.epoch = new_epoch(entry.epoch, options_);
  const auto answers = std::make_shared<Answers>();
  answers->waiting.swap(entry.reset_waiting);
  answers->pending = volumes_.size() + 1;
  const auto answer = [this, answers](Outcome outcome, int) {
    if (outcome != Outcome::kDone) answers->durable = false;
    if (--answers->pending > 0) return;
    checksums_->post([answers] {
      for (const auto& then : answers->waiting) {
        if (then) then(answers->durable);
      }
    });
  };
  for (const auto& volume : volumes_) {
    // Where it has no files here, it may have some that are younger when it comes back; see docs/formats/disk.md.
    if (!volume->reset(space, entry.epoch, answer)) answer(Outcome::kDone, 0);
  }
  answer(Outcome::kDone, 0);
}

void DiskTier::remove_closed(std::span<const std::uint8_t> id_prefix) {
  for (const auto& volume : volumes_) volume->remove_closed(id_prefix);
}

// ---- transfers -----------------------------------------------------------------------------------------------------

Admission DiskTier::write(const WriteOp& op) {
  std::uint64_t sequence = 0;
  {
    std::lock_guard lock(mutex_);
    const auto found = spaces_.find(op.space);
    if (found == spaces_.end() || found->second.opening != nullptr) return Admission::kUnavailable;
    sequence = ++found->second.sequence;
  }
  return volumes_[op.slot % drive_count()]->write(op, op.slot / drive_count(), sequence);
}

Admission DiskTier::read(const ReadOp& op) {
  return volumes_[op.slot % drive_count()]->read(op, op.slot / drive_count());
}

void DiskTier::cancel(OpId id) {
  for (const auto& volume : volumes_) volume->cancel(id);
}

std::vector<VolumeStats> DiskTier::stats() const {
  std::vector<VolumeStats> stats;
  for (const auto& volume : volumes_) stats.push_back(volume->stats());
  return stats;
}

void DiskTier::register_memory(std::span<std::byte> memory) {
  for (const auto& volume : volumes_) volume->register_memory(memory);
}

}  // namespace flexkv::disk
