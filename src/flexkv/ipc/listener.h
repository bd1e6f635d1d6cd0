// The listening end of NAME in a runtime directory (runtime_dir.h). Owns NAME.lock and NAME.sock: at most one live
// process per name; the destructor unlinks both. Owned by one thread.
// A child made by fork() shares lock and socket but unlinks nothing; it must not outlive its parent without exec, or
// the name stays taken.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/ipc/socket.h"

namespace flexkv::ipc {

class Listener {
 public:
  // Fails, naming the pid, when a live process has NAME. REQUIRES: `dir` is private (runtime_dir()).
  static Result<Listener> listen(const std::string& dir, std::string_view name);
  // The same, but nobody sees it before show(): for whoever may still fail and wants no clients then.
  static Result<Listener> claim(const std::string& dir, std::string_view name);
  Status show();

  Listener(Listener&&) = default;
  Listener& operator=(Listener&& other);
  ~Listener() { close(); }

  // The next client, or nothing when none waits. Never blocks. Clients of other users, and those for which no
  // descriptor is left, are closed and counted.
  std::optional<Socket> accept();

  // Readable when a client waits.
  int fd() const { return socket_.get(); }
  std::uint64_t rejected() const { return rejected_; }

 private:
  Listener(std::string dir, std::string_view name, Fd lock, Fd socket, Fd spare);
  void close();
  void shed();

  std::string dir_;
  std::string name_;
  pid_t owner_;
  Fd lock_;
  Fd socket_;
  // Given up for a moment when descriptors run out: a client that cannot be accepted must still leave the queue, or
  // the descriptor stays readable and the lane spins.
  Fd spare_;
  std::uint64_t rejected_ = 0;
};

}  // namespace flexkv::ipc
