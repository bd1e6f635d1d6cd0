#include "flexkv/disk/workers.h"

#include <pthread.h>

#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/thread.h"

namespace flexkv::disk {

ThreadWorkers::ThreadWorkers(const std::string& name, unsigned threads, std::size_t jobs_max) : jobs_max_(jobs_max) {
  for (unsigned i = 0; i < threads; ++i) {
    threads_.push_back(start_thread([this] { loop(); }));
    pthread_setname_np(threads_.back().native_handle(), name.c_str());
  }
}

ThreadWorkers::~ThreadWorkers() { stop(); }

void ThreadWorkers::post(Job job) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;
    FLEXKV_ASSERT(jobs_.size() < jobs_max_);
    jobs_.push_back(std::move(job));
  }
  change_.notify_one();
}

void ThreadWorkers::stop() {
  std::deque<Job> dropped;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    dropped.swap(jobs_);
  }
  change_.notify_all();
  for (auto& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void ThreadWorkers::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    change_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    job();
    job = nullptr;  // what it owns may take a lock
    lock.lock();
  }
}

}  // namespace flexkv::disk
