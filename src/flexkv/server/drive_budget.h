// A drive's write budget with its record on that drive, in the file `node.writes`: what was written survives restarts,
// kills and power cuts, and is never counted too low while there is a limit.
//
// Thread-safe. take() and charge() never block; records are written on a thread of the budget's own, because a drive
// may hang.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "flexkv/admission/write_budget.h"
#include "flexkv/disk/directory.h"
#include "flexkv/disk/types.h"

namespace flexkv::server {

class DriveBudget final : public disk::WriteMeter {
 public:
  struct Options {
    admission::Endurance endurance;
    bool fresh = false;  // no node has used the directory before: an hour's budget to begin with
    std::function<Nanos()> now = monotonic_now;
  };
  // Reads the record and makes the first reservation durable. Blocks.
  // `ready`: after a take() was told kLater, it may be asked again; called on the budget's thread, without a lock.
  DriveBudget(std::shared_ptr<const disk::Directory> directory, const Options& options, std::function<void()> ready);
  // As when the process is killed, unless it was closed.
  ~DriveBudget() override;

  Answer take(std::uint64_t bytes) override;
  void charge(std::uint64_t bytes) override;

  double pressure() const;
  struct Status {
    admission::WriteBudget::Report report;
    double pressure = 0;
    std::string why;  // not empty: what is wrong with the record
  };
  Status status() const;

  // The last record; `ready` is not called any more. Waits at most `patience`. REQUIRES: nothing is written after it
  void close(Nanos patience);

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;  // with the thread, which may outlive this when the drive hangs
  std::thread thread_;
};

}  // namespace flexkv::server
