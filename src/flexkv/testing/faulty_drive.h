// Real drives, with real files and threads, that hang, fail and come back when a test says so. What hangs has not
// touched its buffer yet and does so when it is released, however late: as a kernel does.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>

#include "flexkv/file/io_engine.h"
#include "flexkv/file/open_drive.h"

namespace flexkv::testing {

// The script of one drive. Thread-safe; shared with the drive, whose lane may outlive whoever opened it.
class DriveFaults {
 public:
  enum class Hang : std::uint8_t { kNothing, kWrites, kAll };  // writes: also syncs, and calls that change files

  // Of what begins from now on; kNothing also lets go what is held.
  void hang(Hang what);
  // I/Os and calls that begin from now on, and what is let go, fail with this error; 0: no more.
  void fail(int error_number);
  // I/Os that hang.
  std::size_t held() const;

  // A real drive under this script.
  static Result<std::unique_ptr<file::Drive>> open(const std::shared_ptr<DriveFaults>& faults,
                                                   const file::DriveOptions& options, file::DriveSink& sink);

 private:
  class Engine;
  class FaultyDrive;

  bool hangs(bool changes) const { return hang_ == Hang::kAll || (hang_ == Hang::kWrites && changes); }
  // For a blocking call: waits as long as such calls hang. An error number, or 0.
  int pass(bool changes);

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Hang hang_ = Hang::kNothing;
  int error_number_ = 0;
  std::size_t held_ = 0;
  std::set<Engine*> engines_;  // to be woken
};

}  // namespace flexkv::testing
