#include "flexkv/testing/faulty_drive.h"

#include <vector>

#include "flexkv/file/lane_drive.h"
#include "flexkv/file/thread_engine.h"
#include "flexkv/file/uring_engine.h"

namespace flexkv::testing {

using file::FileId;

// ---- I/Os ----------------------------------------------------------------------------------------------------------

class DriveFaults::Engine final : public file::IoEngine {
 public:
  explicit Engine(std::shared_ptr<DriveFaults> faults) : faults_(std::move(faults)) {}

  Status start(std::uint32_t slot_count) override {
    Status status = inner_->start(slot_count);
    if (!status && status.error().code == ErrorCode::kUnsupported) {
      inner_ = file::make_thread_engine();
      status = inner_->start(slot_count);
    }
    std::lock_guard lock(faults_->mutex_);
    if (status) faults_->engines_.insert(this);
    return status;
  }

  void begin(const file::Io& io, file::OpenFile& file) override {
    {
      std::lock_guard lock(faults_->mutex_);
      if (faults_->hangs(io.op != file::Op::kRead)) {
        held_.push_back({&io, &file});
        ++faults_->held_;
        faults_->changed_.notify_all();
        return;
      }
    }
    pass(io, file);
  }

  void flush() override { inner_->flush(); }

  void wait(std::optional<Nanos> until, std::vector<file::EndedIo>& ended) override {
    std::vector<Held> released;
    {
      std::lock_guard lock(faults_->mutex_);
      std::erase_if(held_, [&](const Held& held) {
        if (faults_->hangs(held.io->op != file::Op::kRead)) return false;
        released.push_back(held);
        return true;
      });
      faults_->held_ -= released.size();
    }
    for (const Held& held : released) pass(*held.io, *held.file);
    inner_->wait(failed_.empty() ? until : 0, ended);
    ended.insert(ended.end(), failed_.begin(), failed_.end());
    failed_.clear();
  }

  void wake() override { inner_->wake(); }
  void forget(file::OpenFile& file) override { inner_->forget(file); }
  Status register_memory(std::span<std::byte> memory) override { return inner_->register_memory(memory); }
  void stop() override {
    {
      std::lock_guard lock(faults_->mutex_);
      faults_->engines_.erase(this);
    }
    inner_->stop();
  }
  std::string describe() const override { return inner_->describe(); }

 private:
  struct Held {
    const file::Io* io;
    file::OpenFile* file;
  };

  void pass(const file::Io& io, file::OpenFile& file) {
    int error_number = 0;
    {
      std::lock_guard lock(faults_->mutex_);
      error_number = faults_->error_number_;
    }
    if (error_number != 0) {
      failed_.push_back({io.slot, -error_number});
    } else {
      inner_->begin(io, file);
    }
  }

  const std::shared_ptr<DriveFaults> faults_;
  std::unique_ptr<file::IoEngine> inner_ = file::make_uring_engine();
  std::vector<Held> held_;  // guarded by the script's mutex; the next is the lane's
  std::vector<file::EndedIo> failed_;
};

// ---- calls ---------------------------------------------------------------------------------------------------------

class DriveFaults::FaultyDrive final : public file::Drive {
 public:
  FaultyDrive(std::unique_ptr<file::Drive> inner, std::shared_ptr<DriveFaults> faults)
      : inner_(std::move(inner)), faults_(std::move(faults)) {}

  Result<FileId> open(const std::string& name, bool direct) override {
    if (const int failed = faults_->pass(true)) return errno_error("cannot open " + name, failed);
    return inner_->open(name, direct);
  }
  void close_file(FileId file) override { inner_->close_file(file); }
  Status remove(const std::string& name) override {
    if (const int failed = faults_->pass(true)) return errno_error("cannot remove " + name, failed);
    return inner_->remove(name);
  }
  Result<std::uint64_t> file_bytes(FileId file) override {
    if (const int failed = faults_->pass(false)) return errno_error("cannot stat a file", failed);
    return inner_->file_bytes(file);
  }
  Status allocate(FileId file, std::uint64_t offset, std::uint64_t bytes) override {
    if (const int failed = faults_->pass(true)) return errno_error("cannot reserve space", failed);
    return inner_->allocate(file, offset, bytes);
  }
  Status truncate(FileId file, std::uint64_t bytes) override {
    if (const int failed = faults_->pass(true)) return errno_error("cannot cut a file off", failed);
    return inner_->truncate(file, bytes);
  }
  void register_memory(std::span<std::byte> memory) override { inner_->register_memory(memory); }
  bool submit(std::span<const file::Request> requests) override { return inner_->submit(requests); }
  void cancel(std::uint64_t tag) override { inner_->cancel(tag); }
  file::DriveStats stats() const override { return inner_->stats(); }
  std::string describe() const override { return inner_->describe(); }
  bool close(Nanos patience) override { return inner_->close(patience); }

 private:
  const std::unique_ptr<file::Drive> inner_;
  const std::shared_ptr<DriveFaults> faults_;
};

// ---- the script ----------------------------------------------------------------------------------------------------

void DriveFaults::hang(Hang what) {
  std::lock_guard lock(mutex_);
  hang_ = what;
  changed_.notify_all();
  for (Engine* engine : engines_) engine->wake();
}

void DriveFaults::fail(int error_number) {
  std::lock_guard lock(mutex_);
  error_number_ = error_number;
}

std::size_t DriveFaults::held() const {
  std::lock_guard lock(mutex_);
  return held_;
}

int DriveFaults::pass(bool changes) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !hangs(changes); });
  return error_number_;
}

Result<std::unique_ptr<file::Drive>> DriveFaults::open(const std::shared_ptr<DriveFaults>& faults,
                                                       const file::DriveOptions& options, file::DriveSink& sink) {
  auto drive = file::LaneDrive::open(options, std::make_unique<Engine>(faults), sink);
  if (!drive) return drive.error();
  return Result<std::unique_ptr<file::Drive>>(std::make_unique<FaultyDrive>(std::move(drive).value(), faults));
}

}  // namespace flexkv::testing
