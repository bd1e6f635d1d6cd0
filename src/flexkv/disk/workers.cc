#include "flexkv/disk/workers.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/thread.h"

namespace flexkv::disk {

struct ThreadWorkers::State {
  explicit State(std::size_t most) : jobs_max(most) {}

  void loop();
  void begin_stop(Job last);

  const std::size_t jobs_max;
  std::mutex mutex;
  std::condition_variable change;
  std::deque<Job> jobs;
  bool stopping = false;
  std::size_t running = 0;  // threads
};

void ThreadWorkers::State::loop() {
  std::unique_lock lock(mutex);
  while (true) {
    change.wait(lock, [&] { return stopping || !jobs.empty(); });
    if (jobs.empty()) break;
    Job job = std::move(jobs.front());
    jobs.pop_front();
    lock.unlock();
    job();
    job = nullptr;  // what it owns may take a lock
    lock.lock();
  }
  --running;
  change.notify_all();
}

void ThreadWorkers::State::begin_stop(Job last) {
  std::deque<Job> dropped;
  {
    std::lock_guard lock(mutex);
    if (std::exchange(stopping, true)) return;
    dropped.swap(jobs);
    if (last) jobs.push_back(std::move(last));
  }
  change.notify_all();
}

ThreadWorkers::ThreadWorkers(const std::string& name, unsigned threads, std::size_t jobs_max)
    : state_(std::make_unique<State>(jobs_max)) {
  state_->running = threads;
  for (unsigned i = 0; i < threads; ++i) {
    threads_.push_back(start_thread([state = state_.get()] { state->loop(); }));
    pthread_setname_np(threads_.back().native_handle(), name.c_str());
  }
}

ThreadWorkers::~ThreadWorkers() { stop(); }

void ThreadWorkers::post(Job job) {
  {
    std::lock_guard lock(state_->mutex);
    if (state_->stopping) return;
    FLEXKV_ASSERT(state_->jobs.size() < state_->jobs_max);
    state_->jobs.push_back(std::move(job));
  }
  state_->change.notify_one();
}

bool ThreadWorkers::stop(Nanos patience, Job last) {
  state_->begin_stop(std::move(last));
  {
    std::unique_lock lock(state_->mutex);
    const auto over = [&] { return state_->running == 0; };
    if (!state_->change.wait_for(lock, std::chrono::nanoseconds(patience), over)) return false;
  }
  stop();
  return true;
}

void ThreadWorkers::stop() {
  state_->begin_stop({});
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace flexkv::disk
