// The seam to one drive: asynchronous reads and writes of files in one directory. Forms: real drives (open_drive.h),
// and a simulated one that loses power, tears, delays and fails (sim_drive.h, for tests).
//
// Ownership of a buffer passes to the drive with submit() and comes back with Completion: until then the kernel may
// read or write it, whatever else was said about the request. That is the only promise that never has an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::file {

// Offsets, lengths and addresses of transfers on a direct file are multiples of this.
constexpr std::size_t kDirectAlignment = 4096;

enum class FileId : std::uint32_t {};

enum class Op : std::uint8_t { kRead, kWrite, kSync };

// What is served first while the drive is busy. What waits longest gets a turn now and then all the same.
enum class Urgency : std::uint8_t { kLoad, kSave, kScrub };
constexpr std::size_t kUrgencyCount = 3;

struct Request {
  std::uint64_t tag = 0;  // chosen by the caller; comes back with whatever is said about the request
  Op op = Op::kRead;
  Urgency urgency = Urgency::kLoad;
  FileId file{};
  std::uint64_t offset = 0;
  std::byte* data = nullptr;  // null for kSync
  std::size_t bytes = 0;
  Nanos deadline = 0;  // monotonic_now() scale; 0: none
};

enum class Outcome : std::uint8_t {
  kDone,      // every byte
  kFailed,    // `error_number` says why; a read past the file's end is ENODATA
  kDeadline,  // not begun in time; no byte was touched
  kCanceled,  // cancel() came before it began; no byte was touched
};

struct Completion {
  std::uint64_t tag = 0;
  Outcome outcome = Outcome::kDone;
  int error_number = 0;
  Nanos latency = 0;  // since submit()
};

// Called on the drive's own thread, one call at a time, never from inside submit(). Must not block. May call submit().
class DriveSink {
 public:
  virtual ~DriveSink() = default;
  virtual void on_completions(std::span<const Completion> completions) = 0;
  // The deadline of a request passed after it had begun: whoever waits should give up, but the buffer is still the
  // drive's. Its Completion follows, however late.
  virtual void on_overdue(std::uint64_t tag) = 0;
  // The drive stopped serving (`available` false: it stalls or failed too often; `why` for people), or serves again.
  virtual void on_availability(bool available, const std::string& why) = 0;
};

struct DriveStats {
  struct Flow {
    std::uint64_t requests = 0;
    std::uint64_t bytes = 0;
    std::uint64_t failed = 0;
  };
  Flow read;
  Flow write;
  std::uint64_t queued_bytes = 0;  // submitted, not completed
  std::uint32_t queued = 0;
  bool available = true;
  std::string why;  // not available
};

// Thread-safe, but for close(), which one thread calls once. Outlives no sink.
class Drive {
 public:
  virtual ~Drive() = default;

  // Opens or creates `name` in the drive's directory (0600, no path separators, not through a symbolic link). A direct
  // file bypasses the page cache where the file system can (else it does not, and describe() says so); others are for
  // small unaligned records. Blocks.
  virtual Result<FileId> open(const std::string& name, bool direct) = 0;
  // What is in flight goes on; requests that wait fail with EBADF. The descriptor is closed before this returns or, if
  // an I/O has it, when the last one has ended. Blocks.
  virtual void close_file(FileId file) = 0;
  virtual Status remove(const std::string& name) = 0;         // blocks
  virtual Result<std::uint64_t> file_bytes(FileId file) = 0;  // blocks
  // Space on the drive for [offset, offset + bytes) of the file, so that later writes there do not fail for lack of it.
  // kNoSpace when less than that and what is to be left free is there; the file is then as before. Blocks; slow where
  // the file system cannot reserve. Not while requests write past the file's end.
  virtual Status allocate(FileId file, std::uint64_t offset, std::uint64_t bytes) = 0;
  // Cuts the file off and gives its space back. Blocks.
  virtual Status truncate(FileId file, std::uint64_t bytes) = 0;

  // Memory that transfers will use, once, before the first submit: makes them cheaper. May be refused by the system
  // (locked-memory limit); transfers work all the same.
  virtual void register_memory(std::span<std::byte> memory) = 0;

  // Queues all requests or, when that would exceed the queue's bound or the drive is not available, none (false).
  // They are served in any order, but for a sync: it covers the writes to its file that were submitted before.
  // REQUIRES: aligned on direct files; bytes > 0 but for kSync.
  virtual bool submit(std::span<const Request> requests) = 0;
  // Asks: the request's Completion comes as soon as nothing touches the buffer any more, whatever its outcome.
  virtual void cancel(std::uint64_t tag) = 0;

  virtual DriveStats stats() const = 0;
  // One line for people: directory, file system, how it is read and written and, where that is not as good as it could
  // be, why; how much memory is registered so far.
  virtual std::string describe() const = 0;

  // Takes no more requests and waits until all are completed, at most `patience`. False: some never ended (a drive that
  // hangs); their buffers must stay mapped for the rest of the process's life. The sink is not called any more.
  virtual bool close(Nanos patience) = 0;
};

}  // namespace flexkv::file
