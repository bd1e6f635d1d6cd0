#include "flexkv/remote/remote_tier.h"

#include <pthread.h>

#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/thread.h"

namespace flexkv::remote {

RemoteTier::RemoteTier(const TierOptions& options, std::unique_ptr<Store> store, RemoteSink& sink)
    : requests_max_(options.requests_max),
      sink_(sink),
      store_(std::move(store)),
      engine_(options.engine, *store_, *this),
      thread_(start_thread([this] { run(); })) {
  pthread_setname_np(thread_.native_handle(), "flexkv-remote");
}

RemoteTier::~RemoteTier() {
  {
    const MutexLock lock(mutex_);
    stop_ = true;
  }
  store_->wake();
  thread_.join();
}

void RemoteTier::open_space(const SpaceName& space, std::uint64_t slot_bytes) {
  order([this, space, slot_bytes](Nanos now) { engine_.open_space(space, slot_bytes, now); });
}

void RemoteTier::close_space(const SpaceName& space) {
  order([this, space](Nanos) { engine_.close_space(space); });
}

void RemoteTier::watch_marks() {
  order([this](Nanos now) { engine_.watch_marks(now); });
}

void RemoteTier::put_mark(const Mark& mark) {
  order([this, mark](Nanos now) { engine_.put_mark(mark, now); });
}

void RemoteTier::post(std::function<void()> call) {
  order([call = std::move(call)](Nanos) { call(); });
}

std::size_t RemoteTier::contains(const SpaceName& space, std::span<const key::BlockKey> keys) const {
  return engine_.contains(space, keys);
}

bool RemoteTier::read(ReadRequest request) {
  FLEXKV_ASSERT(problem_of(request).empty());
  const RequestId id = request.id;
  return admit(id, reads_refused_,
               [this, request = std::move(request)](Nanos now) mutable { engine_.read(std::move(request), now); });
}

bool RemoteTier::write(WriteRequest request) {
  FLEXKV_ASSERT(problem_of(request).empty());
  const RequestId id = request.id;
  return admit(id, writes_refused_,
               [this, request = std::move(request)](Nanos now) mutable { engine_.write(std::move(request), now); });
}

bool RemoteTier::admit(RequestId id, std::uint64_t& refused, Command command) {
  {
    const MutexLock lock(mutex_);
    if (requests_ >= requests_max_) {
      ++refused;
      return false;
    }
    FLEXKV_ASSERT(open_.insert(id).second);
    ++requests_;
    commands_.push_back(std::move(command));
  }
  store_->wake();
  return true;
}

void RemoteTier::cancel(RequestId id) {
  end_early(id, [this, id](Nanos) { engine_.cancel(id); });
}

void RemoteTier::give_up(RequestId id) {
  end_early(id, [this, id](Nanos now) { engine_.give_up(id, now); });
}

void RemoteTier::end_early(RequestId id, Command command) {
  {
    const MutexLock lock(mutex_);
    if (open_.erase(id) == 0) return;
    commands_.push_back(std::move(command));
  }
  store_->wake();
}

RemoteStats RemoteTier::stats() const {
  RemoteStats stats = engine_.stats();
  const MutexLock lock(mutex_);
  stats.reads[static_cast<std::size_t>(Outcome::kBusy)] = reads_refused_;
  stats.writes[static_cast<std::size_t>(Outcome::kBusy)] = writes_refused_;
  return stats;
}

void RemoteTier::order(Command command) {
  {
    const MutexLock lock(mutex_);
    commands_.push_back(std::move(command));
  }
  store_->wake();
}

void RemoteTier::run() {
  std::vector<Ended> ended;
  std::vector<Command> commands;
  while (true) {
    bool stop = false;
    {
      const MutexLock lock(mutex_);
      commands.swap(commands_);
      stop = stop_;
    }
    const Nanos now = monotonic_now();
    engine_.take(ended, now);
    for (Command& command : commands) command(now);
    commands.clear();
    if (stop) break;
    engine_.on_time(now);
    store_->wait(engine_.next_time(), ended);
  }
  engine_.end_all();
}

void RemoteTier::forget(RequestId id) {
  const MutexLock lock(mutex_);
  open_.erase(id);
  --requests_;
}

void RemoteTier::on_block(RequestId id, std::uint32_t index) { sink_.on_block(id, index); }

void RemoteTier::on_end(RequestId id, Outcome outcome) {
  forget(id);
  sink_.on_end(id, outcome);
}

void RemoteTier::on_written(RequestId id, Outcome outcome) {
  forget(id);
  sink_.on_written(id, outcome);
}

}  // namespace flexkv::remote
