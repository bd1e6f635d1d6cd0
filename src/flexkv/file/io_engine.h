// How the I/Os of a drive reach the kernel. Owned and used by a drive's lane; wake() and describe() by any thread.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/file/drive_files.h"
#include "flexkv/file/drive_queue.h"

namespace flexkv::file {

struct EndedIo {
  std::uint32_t slot;
  std::int64_t result;  // as DriveQueue::end() takes it
};

class IoEngine {
 public:
  virtual ~IoEngine() = default;

  // First call, on the lane's thread like all that follow. I/Os have slots below `slot_count`.
  virtual Status start(std::uint32_t slot_count) = 0;
  // The I/O and the file stay until it has ended. May wait for flush() or wait() before it really begins.
  virtual void begin(const Io& io, OpenFile& file) = 0;
  virtual void flush() = 0;
  // Flushes, then sleeps until an I/O has ended, `until` has come (empty: never) or wake() was called since the last
  // wait(). Appends what has ended.
  virtual void wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) = 0;
  virtual void wake() = 0;
  // No I/O uses the file any more.
  virtual void forget(OpenFile& file) = 0;
  // Makes transfers of that memory cheaper, if it can. At most kRegisterBytesMax.
  virtual Status register_memory(std::span<std::byte> memory) = 0;
  // Last call. REQUIRES: no I/O is in flight.
  virtual void stop() = 0;
  virtual std::string describe() const = 0;
};

constexpr std::size_t kRegisterBytesMax = 1ULL << 30;

}  // namespace flexkv::file
