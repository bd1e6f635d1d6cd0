// A process that does something for this one that must not happen in it: what it breaks is its own, and it can be
// killed. The two talk in frames over a socket.
// Thread-compatible. Owns the process.
#pragma once

#include <sys/types.h>

#include <span>
#include <string>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc {

class HelperProcess {
 public:
  // The process begins with its end of the socket as descriptor 3, duplicates of `fds` as 4 and so on, and no other
  // but standard error (its standard output, too) and an empty standard input. It is in a process group of its own,
  // so that signals from a terminal do not reach it, and blocks none. argv[0] is looked for in PATH.
  // It should end when the socket closes, and ask for SIGKILL (PR_SET_PDEATHSIG) once the thread that called this has
  // ended.
  static Result<HelperProcess> start(std::span<const std::string> argv, std::span<const int> fds);

  HelperProcess(HelperProcess&&) = default;
  HelperProcess& operator=(HelperProcess&&) = delete;
  // Kills the process, and waits 2 s at most until it is gone. One that is not is remembered, see reap().
  ~HelperProcess();

  // Takes those out of the system's table that were not gone in time, and are now; returns how many are left. Waits for
  // nothing. start() and the destructor do it, too, so somebody who starts another one now and then need not. Any
  // thread.
  static std::size_t reap();

  Socket& socket() { return socket_; }
  pid_t pid() const { return pid_; }

 private:
  HelperProcess(pid_t pid, Fd process, Socket socket)
      : pid_(pid), process_(std::move(process)), socket_(std::move(socket)) {}

  pid_t pid_;
  Fd process_;  // names the process for as long as this is open, whoever waits for it; not valid: moved from
  Socket socket_;
};

}  // namespace flexkv::ipc
