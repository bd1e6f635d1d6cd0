// Threads that carry out jobs in the order in which they come. The seam that lets a simulation run them by hand.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/time.h"

namespace flexkv::disk {

using Job = std::function<void()>;

class Workers {
 public:
  virtual ~Workers() = default;
  // Thread-safe, never blocks, never runs the job itself. After stop() the job is dropped.
  virtual void post(Job job) = 0;
  // Drops jobs that wait, runs `last` instead (if it is not empty), and returns once no job runs; false: after
  // `patience` one still does, and goes on. Then it may be called again. Not to be called from a job.
  virtual bool stop(Nanos patience, Job last) = 0;
  // The same, for jobs that do not hang.
  virtual void stop() = 0;
};

class ThreadWorkers final : public Workers {
 public:
  // `name`: of each thread, at most 15 characters. More than `jobs_max` jobs that wait are a programmer's error:
  // callers bound what they have in flight.
  ThreadWorkers(const std::string& name, unsigned threads, std::size_t jobs_max);
  ~ThreadWorkers() override;

  void post(Job job) override;
  bool stop(Nanos patience, Job last) override;
  void stop() override;

 private:
  struct State;

  const std::unique_ptr<State> state_;
  std::vector<std::thread> threads_;  // empty once stopped
};

}  // namespace flexkv::disk
