// A real drive: DriveQueue's decisions, DriveFiles' files and an IoEngine, run by one thread ("lane") that sleeps in
// the engine while nothing is to be done.
#pragma once

#include <memory>
#include <thread>

#include "flexkv/file/io_engine.h"
#include "flexkv/file/open_drive.h"

namespace flexkv::file {

class LaneDrive final : public Drive {
 public:
  // Fails when the directory cannot be used or the engine cannot start (with the engine's error).
  static Result<std::unique_ptr<Drive>> open(const DriveOptions& options, std::unique_ptr<IoEngine> engine,
                                             DriveSink& sink);
  // Closes, without a bound on its patience, if close() was not called.
  ~LaneDrive() override;

  Result<FileId> open(const std::string& name, bool direct) override;
  void close_file(FileId file) override;
  Status remove(const std::string& name) override;
  Result<std::uint64_t> file_bytes(FileId file) override;
  Status allocate(FileId file, std::uint64_t offset, std::uint64_t bytes) override;
  Status truncate(FileId file, std::uint64_t bytes) override;
  void register_memory(std::span<std::byte> memory) override;
  bool submit(std::span<const Request> requests) override;
  void cancel(std::uint64_t tag) override;
  DriveStats stats() const override;
  std::string describe() const override;
  bool close(Nanos patience) override;

 private:
  // Shared with the lane's thread, which outlives the drive when an I/O hangs.
  class Lane;

  explicit LaneDrive(std::shared_ptr<Lane> lane) : lane_(std::move(lane)) {}

  const std::shared_ptr<Lane> lane_;
  std::thread thread_;  // not joinable once closed
};

}  // namespace flexkv::file
