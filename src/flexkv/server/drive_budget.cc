#include "flexkv/server/drive_budget.h"

#include <pthread.h>

#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"

namespace flexkv::server {
namespace {

using admission::WriteBudget;

constexpr const char* kName = "node.writes";
// A record and what its directory takes.
constexpr std::uint64_t kRecordWrite = 2 * disk::kPageBytes;
// So long nothing is tried after a record could not be written.
constexpr Nanos kRetryTime = 10 * kSecond;

}  // namespace

struct DriveBudget::Shared {
  Shared(std::shared_ptr<const disk::Directory> home, const Options& options, std::function<void()> call)
      : directory(std::move(home)), now(options.now), ready(std::move(call)), budget(load(options)) {}

  WriteBudget load(const Options& options) {
    std::optional<WriteBudget::State> saved = WriteBudget::State{};
    auto bytes = directory->read(kName, WriteBudget::kRecordBytes + 1);
    if (bytes) {
      if (auto state = WriteBudget::decode(bytes.value()); state) {
        saved = state.value();
      } else {
        why = state.error().message;
      }
    } else if (bytes.error().code != ErrorCode::kNotFound) {
      why = bytes.error().message;
    } else if (options.fresh) {
      saved.reset();
    } else {
      why = "no record of what was written to it before";
    }
    if (!why.empty()) {
      why += "; counting begins anew, and the budget with nothing";
      log_warning("SSD cache: " + directory->path() + ": " + why);
    }
    return {options.endurance, 0, saved, now()};
  }

  bool store(const WriteBudget::State& state) {
    const auto record = WriteBudget::encode(state);
    const auto status = directory->replace(kName, record);
    bool was_failed = false;
    {
      std::lock_guard lock(mutex);
      was_failed = std::exchange(failed, !status.ok());
      why_failed = failed ? "no record of what is written: " + status.error().message : std::string();
      if (failed) retry_at = now() + kRetryTime;
    }
    if (status.ok() && was_failed) log_info("SSD cache: " + directory->path() + ": what is written is recorded again");
    if (!status.ok() && !was_failed) {
      log_warning("SSD cache: " + directory->path() +
                  " cannot record what is written to it: " + status.error().message);
    }
    return status.ok();
  }

  // Under the mutex: whether the thread has something to do.
  bool due() {
    if (failed && now() < retry_at) return false;
    if (!unrecorded) unrecorded = budget.next_record(now());
    return unrecorded.has_value();
  }

  void loop(std::unique_lock<std::mutex>& lock);

  const std::shared_ptr<const disk::Directory> directory;  // locked as long as something may be written to it
  const std::function<Nanos()> now;
  const std::function<void()> ready;

  std::mutex mutex;
  std::condition_variable change;
  std::string why;         // of the start
  std::string why_failed;  // of the latest record
  WriteBudget budget;
  std::optional<WriteBudget::State> unrecorded;  // to be made durable
  bool failed = false;
  Nanos retry_at = 0;
  bool waited_for = false;  // somebody was told kLater
  bool working = false;     // the thread has something to do
  bool calling = false;
  bool stopping = false;
  bool abandoned = false;  // without the last record
  bool over = false;
};

// Until it is stopped, and the last record is written.
void DriveBudget::Shared::loop(std::unique_lock<std::mutex>& lock) {
  while (true) {
    change.wait(lock, [&] { return working || stopping; });
    if (stopping) break;
    const WriteBudget::State state = *unrecorded;
    lock.unlock();
    const bool stored = store(state);
    lock.lock();
    if (stopping) break;
    if (stored) {
      unrecorded.reset();
      budget.recorded();
      budget.charge(kRecordWrite, now());
    }
    working = due();
    // Also when it failed: then a take() is refused, and nobody waits for ever.
    if (!std::exchange(waited_for, false)) continue;
    calling = true;
    lock.unlock();
    if (ready) ready();
    lock.lock();
    calling = false;
    change.notify_all();
  }
  if (!abandoned) {
    const WriteBudget::State last = budget.close(now());
    lock.unlock();
    (void)store(last);
    lock.lock();
  }
  over = true;
  change.notify_all();
}

DriveBudget::DriveBudget(std::shared_ptr<const disk::Directory> directory, const Options& options,
                         std::function<void()> ready)
    : shared_(std::make_shared<Shared>(std::move(directory), options, std::move(ready))) {
  Shared& shared = *shared_;
  if (shared.due() && shared.store(*shared.unrecorded)) {
    shared.unrecorded.reset();
    shared.budget.recorded();
    shared.budget.charge(kRecordWrite, shared.now());
  }
  thread_ = start_thread([shared = shared_] {
    pthread_setname_np(pthread_self(), "flexkv-budget");
    std::unique_lock lock(shared->mutex);
    shared->loop(lock);
  });
}

DriveBudget::~DriveBudget() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(shared_->mutex);
    shared_->abandoned = true;
  }
  close(kSecond);
}

disk::WriteMeter::Answer DriveBudget::take(std::uint64_t bytes) {
  Shared& shared = *shared_;
  std::lock_guard lock(shared.mutex);
  auto answer = Answer::kRefused;
  switch (shared.budget.take(bytes, shared.now())) {
    case WriteBudget::Answer::kGranted:
      answer = Answer::kGranted;
      break;
    case WriteBudget::Answer::kLater:
      answer = Answer::kLater;
      break;
    case WriteBudget::Answer::kRefused:
      break;
  }
  if (!shared.working && !shared.stopping && shared.due()) {
    shared.working = true;
    shared.change.notify_all();
  }
  if (answer == Answer::kLater) {
    if (!shared.working) return Answer::kRefused;  // records cannot be written
    shared.waited_for = true;
  }
  return answer;
}

void DriveBudget::charge(std::uint64_t bytes) {
  std::lock_guard lock(shared_->mutex);
  shared_->budget.charge(bytes, shared_->now());
}

double DriveBudget::pressure() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->budget.pressure(shared_->now());
}

DriveBudget::Status DriveBudget::status() const {
  std::lock_guard lock(shared_->mutex);
  const Nanos now = shared_->now();
  Status status{shared_->budget.report(now), shared_->budget.pressure(now), shared_->why_failed};
  if (status.why.empty() && shared_->budget.limited()) status.why = shared_->why;
  return status;
}

void DriveBudget::close(Nanos patience) {
  if (!thread_.joinable()) return;
  std::unique_lock lock(shared_->mutex);
  shared_->stopping = true;
  shared_->change.notify_all();
  // What `ready` needs may go away with whoever closes.
  shared_->change.wait(lock, [&] { return !shared_->calling; });
  const bool over = shared_->change.wait_for(lock, std::chrono::nanoseconds(patience), [&] { return shared_->over; });
  lock.unlock();
  if (over) {
    thread_.join();
    return;
  }
  log_warning("SSD cache: " + shared_->directory->path() + " hangs; how much was written to it is not recorded");
  thread_.detach();
}

}  // namespace flexkv::server
