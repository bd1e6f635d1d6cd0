// For tests: a sink that other threads wait on.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>

#include "flexkv/file/drive.h"

namespace flexkv::file {

class WaitingSink final : public DriveSink {
 public:
  void on_completions(std::span<const Completion> completions) override {
    std::lock_guard lock(mutex_);
    for (const Completion& completion : completions) FLEXKV_ASSERT(done_.emplace(completion.tag, completion).second);
    changed_.notify_all();
  }
  void on_overdue(std::uint64_t tag) override {
    std::lock_guard lock(mutex_);
    overdue_.insert(tag);
    changed_.notify_all();
  }
  void on_availability(bool available, const std::string&) override {
    std::lock_guard lock(mutex_);
    available_ = available;
    changed_.notify_all();
  }

  // Blocks; taken out, so that the tag may be used again.
  Completion completion(std::uint64_t tag) {
    std::unique_lock lock(mutex_);
    wait(lock, [&] { return done_.contains(tag); });
    return done_.extract(tag).mapped();
  }
  void wait_overdue(std::uint64_t tag) {
    std::unique_lock lock(mutex_);
    wait(lock, [&] { return overdue_.contains(tag); });
  }
  void wait_available(bool available) {
    std::unique_lock lock(mutex_);
    wait(lock, [&] { return available_ == available; });
  }
  std::size_t done_count() {
    std::lock_guard lock(mutex_);
    return done_.size();
  }

 private:
  // What takes a minute never comes.
  template <typename Condition>
  void wait(std::unique_lock<std::mutex>& lock, Condition condition) {
    FLEXKV_ASSERT(changed_.wait_for(lock, std::chrono::minutes(1), condition));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::uint64_t, Completion> done_;
  std::set<std::uint64_t> overdue_;
  bool available_ = true;
};

}  // namespace flexkv::file
