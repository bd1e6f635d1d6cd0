#include "flexkv/remote/file_store.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "flexkv/base/thread.h"
#include "flexkv/remote/file_job.h"

namespace flexkv::remote {
namespace {

constexpr std::size_t kBufferBytes = 1 << 20;
constexpr auto kEndingTime = std::chrono::seconds(2);  // for what the threads are doing; then they are left behind

}  // namespace

struct FileStore::Shared {
  explicit Shared(std::string directory) : root(std::move(directory)) {}

  void work(std::size_t number);

  const std::string root;
  std::mutex mutex;
  std::condition_variable jobs_changed;
  std::condition_variable lane_wanted;
  std::deque<std::shared_ptr<FileJob>> jobs;
  std::vector<Ended> ended;
  std::vector<bool> finished;  // threads
  bool woken = false;
  bool stopping = false;
};

FileStore::FileStore(std::string directory, unsigned threads)
    : shared_(std::make_shared<Shared>(std::move(directory))) {
  shared_->finished.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    threads_.push_back(start_thread([shared = shared_, i] { shared->work(i); }));
    pthread_setname_np(threads_.back().native_handle(), "flexkv-files");
  }
}

FileStore::~FileStore() {
  for (const auto& [id, job] : jobs_) job->abandon();
  std::unique_lock lock(shared_->mutex);
  shared_->stopping = true;
  shared_->jobs_changed.notify_all();
  shared_->lane_wanted.wait_for(lock, kEndingTime, [&] { return std::ranges::count(shared_->finished, false) == 0; });
  const std::vector<bool> finished = shared_->finished;
  lock.unlock();
  for (std::size_t i = 0; i < threads_.size(); ++i) {
    if (finished[i]) {
      threads_[i].join();
    } else {
      threads_[i].detach();
    }
  }
}

void FileStore::begin(OpId id, PutOp op) { post(std::make_shared<FileJob>(id, std::move(op))); }
void FileStore::begin(OpId id, GetOp op) { post(std::make_shared<FileJob>(id, std::move(op))); }
void FileStore::begin(OpId id, ListOp op) { post(std::make_shared<FileJob>(id, std::move(op))); }

void FileStore::post(std::shared_ptr<FileJob> job) {
  jobs_[job->id()] = job;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->jobs.push_back(std::move(job));
  }
  shared_->jobs_changed.notify_one();
}

void FileStore::abandon(OpId id) {
  const auto found = jobs_.extract(id);
  if (found.empty()) return;
  found.mapped()->abandon();
  const std::lock_guard lock(shared_->mutex);
  std::erase(shared_->jobs, found.mapped());
}

void FileStore::wait(std::optional<Nanos> until, std::vector<Ended>& ended) {
  {
    std::unique_lock lock(shared_->mutex);
    const auto wanted = [&] { return shared_->woken || !shared_->ended.empty(); };
    if (until) {
      const Nanos left = std::max<Nanos>(*until - monotonic_now(), 0);
      shared_->lane_wanted.wait_for(lock, std::chrono::nanoseconds(left), wanted);
    } else {
      shared_->lane_wanted.wait(lock, wanted);
    }
    shared_->woken = false;
    ended.swap(shared_->ended);
  }
  // What was abandoned may have ended as well.
  std::erase_if(ended, [&](const Ended& one) { return jobs_.erase(one.id) == 0; });
}

void FileStore::wake() {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->woken = true;
  }
  shared_->lane_wanted.notify_all();
}

void FileStore::Shared::work(std::size_t number) {
  std::vector<std::byte> buffer(kBufferBytes);
  std::unique_lock lock(mutex);
  while (true) {
    jobs_changed.wait(lock, [&] { return stopping || !jobs.empty(); });
    if (stopping) break;
    const std::shared_ptr<FileJob> job = std::move(jobs.front());
    jobs.pop_front();
    lock.unlock();
    Ended one = job->run(root, buffer);
    lock.lock();
    ended.push_back(std::move(one));
    lane_wanted.notify_all();
  }
  finished[number] = true;
  lane_wanted.notify_all();
}

}  // namespace flexkv::remote
