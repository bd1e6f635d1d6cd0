// A drive in memory, on a virtual clock, with faults by seed or by script: the same seed and calls give the same run.
// Its queue is the real one (file::DriveQueue), so urgencies, deadlines, coalescing and the breaker are those of a real
// drive. One thread: nothing happens but in run_until() and step(), and sinks are called from there only.
//
// I/Os take random times and so overtake each other. A read's buffer is garbage until its completion; a write's buffer
// is checked to be unchanged until then. What power_cut() and kill() leave is for a new SimDrive on the same medium.
#pragma once

#include <memory>
#include <optional>

#include "flexkv/file/drive_queue.h"
#include "flexkv/testing/sim_medium.h"

namespace flexkv::testing {

// Of each I/O, in percent.
struct SimFaults {
  unsigned fail = 0;     // with one of EIO, ENOSPC (writes only) and ENXIO; a failed write may have written any sectors
  unsigned partial = 0;  // transfers a part
  unsigned retry = 0;    // EINTR or EAGAIN
  unsigned slow = 0;     // 100 times as long
};

struct SimDriveOptions {
  std::uint64_t seed = 1;
  file::DriveLimits limits{};
  Nanos start = kSecond;  // of the clock
  Nanos io_time_min = 20 * kMicrosecond;
  Nanos io_time_max = 500 * kMicrosecond;
  SimFaults faults{};
};

class SimDrive final : public file::Drive {
 public:
  SimDrive(const SimDriveOptions& options, std::shared_ptr<SimMedium> medium, file::DriveSink& sink);

  // ---- the clock
  Nanos now() const { return now_; }
  // When something happens next; empty: never, of its own.
  std::optional<Nanos> next_event() const;
  void run_until(Nanos time);
  // Goes to the next event. False: there is none.
  bool step();
  // Until every request is completed. False: some hang.
  bool run_until_idle();

  // ---- faults
  void set_faults(const SimFaults& faults) { faults_ = faults; }
  // The next `count` I/Os of that kind fail and transfer nothing.
  void fail_next(file::Op op, int error_number, std::uint32_t count = 1);
  // I/Os begun while it hangs end only after hang(false).
  void hang(bool hanging);
  // A call for a file, which somebody else keeps from going on, hangs.
  void hang_call(bool hanging);
  // Of stored bytes, now. REQUIRES: the file exists and is longer than `offset`.
  void flip_bit(const std::string& name, std::uint64_t offset);
  // Both end the drive: no callback comes any more, only the medium remains.
  void power_cut();
  void kill();

  // ---- file::Drive
  Result<file::FileId> open(const std::string& name, bool direct) override;
  void close_file(file::FileId file) override;
  Status remove(const std::string& name) override;
  Result<std::uint64_t> file_bytes(file::FileId file) override;
  Status allocate(file::FileId file, std::uint64_t offset, std::uint64_t bytes) override;
  Status truncate(file::FileId file, std::uint64_t bytes) override;
  void register_memory(std::span<std::byte>) override {}
  bool submit(std::span<const file::Request> requests) override;
  void cancel(std::uint64_t tag) override { queue_.cancel(tag, now_); }
  file::DriveStats stats() const override { return queue_.stats(); }
  std::string describe() const override { return "a simulated drive"; }
  // Runs the clock for at most `patience`.
  bool close(Nanos patience) override;

 private:
  struct OpenFile {
    std::shared_ptr<SimFile> file;
    bool direct = false;
  };
  // An I/O that has begun.
  struct Flight {
    const file::Io* io;
    std::shared_ptr<SimFile> file;
    Nanos end;
    std::int64_t result;     // if >= 0, the bytes still have to be moved
    std::uint64_t sequence;  // of the medium when it began
    std::uint64_t checksum;  // of the bytes to write
  };

  void begin_all();
  void begin(const file::Io& io);
  void finish(const Flight& flight);
  std::int64_t draw_result(const file::Io& io);
  void dispatch();
  void crash(bool power);

  const SimDriveOptions options_;
  const std::shared_ptr<SimMedium> medium_;
  file::DriveSink& sink_;
  Prng prng_;
  std::array<std::byte, file::kDirectAlignment> probe_page_{};
  file::DriveQueue queue_;
  Nanos now_;
  SimFaults faults_;
  int scripted_error_[3] = {};
  std::uint32_t scripted_count_[3] = {};
  bool hanging_ = false;
  std::optional<std::uint64_t> hanging_call_;
  bool dead_ = false;
  std::vector<OpenFile> files_;  // by FileId; the first one is the probe's
  std::vector<Flight> flights_;
};

}  // namespace flexkv::testing
