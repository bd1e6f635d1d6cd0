#include "flexkv/disk/lane_calls.h"

#include <unistd.h>

namespace flexkv::disk {

class LaneCalls::Inside {
 public:
  explicit Inside(LaneCalls& calls) : calls_(calls) {
    std::lock_guard lock(calls_.mutex_);
    calls_.inside_ = true;
  }
  ~Inside() {
    std::unique_lock lock(calls_.mutex_);
    calls_.inside_ = false;
    if (!calls_.given_up_) return;
    lock.unlock();
    while (true) ::pause();
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  LaneCalls& calls_;
};

Result<file::FileId> LaneCalls::open(const std::string& name, bool direct) {
  const Inside inside(*this);
  return drive_->open(name, direct);
}

void LaneCalls::close_file(file::FileId file) {
  const Inside inside(*this);
  drive_->close_file(file);
}

Status LaneCalls::remove(const std::string& name) {
  const Inside inside(*this);
  return drive_->remove(name);
}

Result<std::uint64_t> LaneCalls::file_bytes(file::FileId file) {
  const Inside inside(*this);
  return drive_->file_bytes(file);
}

Status LaneCalls::allocate(file::FileId file, std::uint64_t offset, std::uint64_t bytes) {
  const Inside inside(*this);
  return drive_->allocate(file, offset, bytes);
}

Status LaneCalls::truncate(file::FileId file, std::uint64_t bytes) {
  const Inside inside(*this);
  return drive_->truncate(file, bytes);
}

void LaneCalls::call(const std::function<void()>& call) {
  const Inside inside(*this);
  call();
}

void LaneCalls::destroy(std::unique_ptr<file::Drive>& drive) {
  const Inside inside(*this);
  drive.reset();
}

bool LaneCalls::give_up() {
  std::lock_guard lock(mutex_);
  given_up_ = inside_;
  return given_up_;
}

}  // namespace flexkv::disk
