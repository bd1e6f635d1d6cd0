#include "flexkv/ipc/wait.h"

#include <sys/inotify.h>

#include <array>
#include <cerrno>

#include "flexkv/ipc/poll.h"
#include "flexkv/ipc/runtime_dir.h"

namespace flexkv::ipc {
namespace {

// One attempt to connect waits this long for room in the listener's queue before it looks at the stop descriptor again.
constexpr Nanos kConnectSlice = 200 * kMillisecond;

Status watch(int inotify, const std::string& dir) {
  constexpr std::uint32_t kEvents = IN_CREATE | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR;
  if (auto status = ensure_private_dir(dir); !status) return status;
  if (::inotify_add_watch(inotify, dir.c_str(), kEvents) < 0) return errno_error("watch " + dir, errno);
  return {};
}

void discard_events(int inotify) {
  alignas(inotify_event) std::array<char, 4096> events;
  while (::read(inotify, events.data(), events.size()) > 0) {
  }
}

}  // namespace

Result<Socket> wait_for_socket(const std::string& dir, std::string_view name, int stop_fd, Nanos timeout) {
  const Nanos deadline = deadline_after(timeout);
  const Fd inotify(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  if (!inotify.valid()) return errno_error("inotify_init1", errno);
  const std::string path = socket_path(dir, name);
  std::array<pollfd, 2> fds{pollfd{.fd = inotify.get(), .events = POLLIN, .revents = 0},
                            pollfd{.fd = stop_fd, .events = POLLIN, .revents = 0}};
  while (true) {
    // Before every look, so that nothing that happens after it is missed. Adding a watch again costs nothing, and
    // finds the directory that replaced one that was removed.
    if (auto status = watch(inotify.get(), dir); !status) return status.error();
    auto socket = Socket::connect(path, std::min(time_left(deadline), kConnectSlice));
    if (socket) return socket;
    // Listening precedes the name (Listener), so a refusal means that the owner is gone, and a new one will be seen.
    const bool absent = socket.error().code == ErrorCode::kNotFound;
    const bool busy = socket.error().code == ErrorCode::kTimeout;
    if (!absent && !busy) return socket;
    const auto event = poll_until(fds, busy ? 0 : deadline);
    if (!event) return event.error();
    if (fds[1].revents != 0) return Error{ErrorCode::kCanceled, "stopped while waiting for " + path};
    if (time_left(deadline) == 0) return Error{ErrorCode::kTimeout, "nobody answered in time at " + path};
    discard_events(inotify.get());
  }
}

}  // namespace flexkv::ipc
