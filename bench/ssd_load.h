// Reads and writes of one large file, at most 32 at a time: through a drive as the SSD tier uses it, or by a plain loop of
// threads. What is read is compared with what the file was filled with, what was written is read back: a few blocks of
// each run.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/file/open_drive.h"

namespace flexkv::bench {

constexpr std::size_t kSsdFlights = 32;         // blocks under way at once, at most
constexpr std::size_t kSsdBlockMax = 4U << 20;  // bytes
constexpr std::size_t kSsdMemoryBytes = kSsdFlights * kSsdBlockMax;

struct Traffic {
  bool write = false;
  bool random = false;
  std::size_t block_bytes = 0;
  Nanos duration = 0;
  std::uint64_t seed = 0;  // of the random order, in which each block comes once before any comes again
  std::size_t flights = kSsdFlights;  // blocks under way at once, at most kSsdFlights
};

struct Moved {
  std::uint64_t bytes = 0;
  Nanos ended = 0;    // when the last block was done
  std::string error;  // the first one; empty: none
};

class SsdLoad final : public file::DriveSink {
 public:
  // `memory`: kSsdMemoryBytes of `pool`, which is registered with the drive.
  static Result<std::unique_ptr<SsdLoad>> open(const std::string& directory, std::uint64_t file_bytes,
                                               std::span<std::byte> pool, std::byte* memory);
  // Removes the file.
  ~SsdLoad() override;

  // Writes the whole file. Blocks.
  Status fill();
  void start_drive(const Traffic& traffic);
  void start_threads(const Traffic& traffic);
  // Ends what was started last.
  Moved wait();

  const std::string& path() const { return path_; }
  std::string describe() const { return drive_->describe(); }

  void on_completions(std::span<const file::Completion> completions) override;
  void on_overdue(std::uint64_t) override {}
  void on_availability(bool available, const std::string& why) override;

 private:
  struct Flight {
    std::uint64_t turn = 0;  // the block of which the memory is full, or that it is of
    bool done = false;       // any block yet
  };

  SsdLoad(std::string path, std::uint64_t file_bytes, std::byte* memory)
      : path_(std::move(path)), file_bytes_(file_bytes), memory_(memory) {}

  void prepare(const Traffic& traffic);
  std::uint64_t offset_of(std::uint64_t turn) const;
  // Takes the next block for the flight and stamps what is to be written.
  std::uint64_t board(std::size_t flight);
  std::span<std::byte> memory_of(std::size_t flight) const;
  void land(std::size_t flight, Nanos now);
  void fail(std::string error);
  void work(std::size_t flight, int fd);
  std::string check();

  const std::string path_;
  const std::uint64_t file_bytes_;
  std::byte* const memory_;
  std::unique_ptr<file::Drive> drive_;
  file::FileId file_{};
  Fd fd_;  // of the threads, and for what is read back

  Traffic traffic_;
  std::vector<std::uint32_t> order_;  // of random blocks
  std::uint64_t blocks_ = 0;
  Nanos until_ = 0;
  std::atomic<std::uint64_t> turns_ = 0;
  std::vector<Flight> flights_;
  std::vector<file::Request> requests_;  // the sink's

  std::atomic<std::uint64_t> bytes_ = 0;
  std::atomic<Nanos> ended_ = 0;
  std::atomic<std::size_t> running_ = 0;  // flights
  std::mutex mutex_;
  std::string error_;  // guarded by mutex_
  std::vector<std::thread> threads_;
};

}  // namespace flexkv::bench
