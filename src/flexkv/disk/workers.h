// Threads that carry out jobs in the order in which they come. The seam that lets a simulation run them by hand.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace flexkv::disk {

using Job = std::function<void()>;

class Workers {
 public:
  virtual ~Workers() = default;
  // Thread-safe, never blocks, never runs the job itself. After stop() the job is dropped.
  virtual void post(Job job) = 0;
  // Drops jobs that wait and returns once none runs. Not to be called from a job.
  virtual void stop() = 0;
};

class ThreadWorkers final : public Workers {
 public:
  // `name`: of each thread, at most 15 characters. More than `jobs_max` jobs that wait are a programmer's error:
  // callers bound what they have in flight.
  ThreadWorkers(const std::string& name, unsigned threads, std::size_t jobs_max);
  ~ThreadWorkers() override;

  void post(Job job) override;
  void stop() override;

 private:
  void loop();

  const std::size_t jobs_max_;
  std::mutex mutex_;
  std::condition_variable change_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace flexkv::disk
