// Waiting for descriptors until a deadline of the monotonic clock. Private to the module.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::ipc {

// `timeout` from now; a timeout too long for the clock means never.
inline Nanos deadline_after(Nanos timeout) {
  const Nanos now = monotonic_now();
  return timeout > std::numeric_limits<Nanos>::max() - now ? std::numeric_limits<Nanos>::max() : now + timeout;
}

inline Nanos time_left(Nanos deadline) { return std::max<Nanos>(deadline - monotonic_now(), 0); }

// True when a descriptor has an event, false at the deadline. Negative descriptors are ignored.
inline Result<bool> poll_until(std::span<pollfd> fds, Nanos deadline) {
  while (true) {
    const Nanos left = time_left(deadline);
    const timespec timeout{.tv_sec = left / kSecond, .tv_nsec = left % kSecond};
    const int ready = ::ppoll(fds.data(), fds.size(), &timeout, nullptr);
    if (ready >= 0) return ready > 0;
    if (errno != EINTR) return errno_error("ppoll", errno);
  }
}

}  // namespace flexkv::ipc
