// How a real drive is opened.
#pragma once

#include <optional>

#include "flexkv/file/drive_queue.h"

namespace flexkv::file {

struct DriveOptions {
  std::string directory;  // created (0700) when missing
  DriveLimits limits{};
  std::optional<std::uint64_t>
      keep_free_bytes{};  // left to others by allocate(); default 1 % of the file system, <= 1 GiB
  bool direct = true;     // false: direct files go through the page cache, too
  // Where the file system cannot reserve space, allocate() writes zeros. False: it only makes the file longer, so that
  // each byte is written once, but a later write may find no space.
  bool reserve_by_writing = true;
};

// A drive over io_uring where the system lets us, else over threads (at most kDriveThreadsMax I/Os at once);
// describe() says which, and why. `sink` is called from now on until close() has returned, and stays until then.
// Fails when the directory cannot be made, opened or written in. Needs no privilege. Blocks.
Result<std::unique_ptr<Drive>> open_drive(const DriveOptions& options, DriveSink& sink);

constexpr std::uint32_t kDriveThreadsMax = 32;

}  // namespace flexkv::file
