#include "flexkv/file/open_drive.h"

#include <algorithm>

#include "flexkv/file/lane_drive.h"
#include "flexkv/file/thread_engine.h"
#include "flexkv/file/uring_engine.h"

namespace flexkv::file {

Result<std::unique_ptr<Drive>> open_drive(const DriveOptions& options, DriveSink& sink) {
  auto drive = LaneDrive::open(options, make_uring_engine(), sink);
  if (drive.ok() || drive.error().code != ErrorCode::kUnsupported) return drive;
  DriveOptions few = options;
  few.limits.depth = std::min(few.limits.depth, kDriveThreadsMax);
  return LaneDrive::open(few, make_thread_engine(" (" + drive.error().message + ")"), sink);
}

}  // namespace flexkv::file
