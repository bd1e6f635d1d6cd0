#include "flexkv/file/thread_engine.h"

#include <pthread.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "flexkv/base/thread.h"

namespace flexkv::file {
namespace {

class ThreadEngine final : public IoEngine {
 public:
  explicit ThreadEngine(std::string why) : why_(std::move(why)) {}
  ~ThreadEngine() override { stop(); }

  Status start(std::uint32_t slot_count) override;
  void begin(const Io& io, OpenFile& file) override;
  void flush() override {}
  void wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) override;
  void wake() override;
  void forget(OpenFile&) override {}
  Status register_memory(std::span<std::byte>) override {
    return Error{ErrorCode::kUnsupported, "of no use to threads"};
  }
  void stop() override;
  std::string describe() const override { return "threads" + why_; }

 private:
  struct Job {
    const Io* io;
    int fd;
  };

  void work();
  static std::int64_t transfer(const Job& job);

  const std::string why_;
  std::mutex mutex_;
  std::condition_variable jobs_changed_;
  std::condition_variable lane_wanted_;
  std::deque<Job> jobs_;
  std::vector<EndedIo> ended_;
  bool woken_ = false;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// A thread per slot: an I/O that hangs holds up its own thread only, not even the probe.
Status ThreadEngine::start(std::uint32_t slot_count) {
  for (std::uint32_t i = 0; i < slot_count; ++i) {
    try {
      threads_.push_back(start_thread([this] { work(); }));
    } catch (const std::system_error& error) {
      stop();
      return Error{ErrorCode::kNoSpace, std::string("cannot start a thread: ") + error.what()};
    }
  }
  return {};
}

void ThreadEngine::begin(const Io& io, OpenFile& file) {
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back({&io, file.fd.get()});
  }
  jobs_changed_.notify_one();
}

void ThreadEngine::wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) {
  std::unique_lock lock(mutex_);
  const auto wanted = [&] { return woken_ || !ended_.empty(); };
  if (until) {
    const Nanos left = std::max<Nanos>(*until - monotonic_now(), 0);
    lane_wanted_.wait_for(lock, std::chrono::nanoseconds(left), wanted);
  } else {
    lane_wanted_.wait(lock, wanted);
  }
  woken_ = false;
  ended.insert(ended.end(), ended_.begin(), ended_.end());
  ended_.clear();
}

void ThreadEngine::wake() {
  {
    std::lock_guard lock(mutex_);
    woken_ = true;
  }
  lane_wanted_.notify_one();
}

void ThreadEngine::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  jobs_changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void ThreadEngine::work() {
  pthread_setname_np(pthread_self(), "flexkv-io");
  std::unique_lock lock(mutex_);
  while (true) {
    jobs_changed_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    const std::uint32_t slot = job.io->slot;
    const std::int64_t result = transfer(job);
    lock.lock();
    ended_.push_back({slot, result});
    lane_wanted_.notify_one();
  }
}

std::int64_t ThreadEngine::transfer(const Job& job) {
  const Io& io = *job.io;
  const auto offset = static_cast<off_t>(io.offset);
  const int count = static_cast<int>(io.parts.size());
  std::int64_t result = 0;
  if (io.op == Op::kRead) result = ::preadv(job.fd, io.parts.data(), count, offset);
  if (io.op == Op::kWrite) result = ::pwritev(job.fd, io.parts.data(), count, offset);
  if (io.op == Op::kSync) result = ::fdatasync(job.fd);
  return result < 0 ? -errno : result;
}

}  // namespace

std::unique_ptr<IoEngine> make_thread_engine(std::string why) { return std::make_unique<ThreadEngine>(std::move(why)); }

}  // namespace flexkv::file
