// Waiting for a process that has not started yet, or is restarting. Thread-safe; blocks the calling thread.
#pragma once

#include <string>
#include <string_view>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc {

// Connects to NAME in `dir` as soon as someone listens there. Creates the directory (ensure_private_dir) when missing.
// Event driven. kCanceled: `stop_fd` became readable (-1: nothing stops it); kTimeout; other codes: cannot work.
Result<Socket> wait_for_socket(const std::string& dir, std::string_view name, int stop_fd, Nanos timeout);

}  // namespace flexkv::ipc
