// The private directory in which the processes of one user on one machine find each other's sockets. An owner NAME has
//   NAME.lock  held with flock for as long as the owner lives; holds the owner's pid as text
//   NAME.sock  listens from the moment that it exists
//   NAME.tmp   the socket while its owner starts
// The kernel drops the lock of a killed owner, so what can be locked is stale. All creating and removing of these files
// happens under DirLock; whoever holds it and gets NAME.lock may therefore treat the lock file's name as stable.
// Thread-safe: free functions over the file system.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <string_view>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"

namespace flexkv::ipc {

// `configured` if not empty, else $XDG_RUNTIME_DIR/flexkv, else /run/flexkv (root, or where that can be created), else
// /tmp/flexkv-<uid>. The directory is private as by ensure_private_dir. A default that cannot be created gives way to
// the next, as does a /run/flexkv of another user; one that exists but is not private is an error, since someone may
// have planted it.
Result<std::string> runtime_dir(std::string_view configured);

// Creates `dir` with mode 0700 (its parent must exist) unless it exists, and checks that it is a directory, no symbolic
// link, owned by this user, without rights for group or others.
Status ensure_private_dir(const std::string& dir);

// Removes the sockets of owners that are gone and returns how many. Files with neither NAME.sock nor NAME.tmp stay.
Result<std::size_t> sweep_stale(const std::string& dir);

// 1 to 64 characters of A-Z a-z 0-9 _ . -, not starting with a dot.
bool valid_socket_name(std::string_view name);
std::string socket_path(const std::string& dir, std::string_view name);

// Serialises creation and removal of owners in a directory. Waits for another holder, which needs a few system calls
// and loses the lock when it dies. Released by the destructor.
class DirLock {
 public:
  static Result<DirLock> acquire(const std::string& dir);

 private:
  explicit DirLock(Fd fd) : fd_(std::move(fd)) {}
  Fd fd_;
};

enum class OwnerLockMode { kCreate, kExisting };

// Takes NAME.lock without waiting; holds this process's pid afterwards. An invalid Fd: a live owner has it (or, for
// kExisting, there is no such file). REQUIRES: the directory's DirLock is held.
Result<Fd> try_owner_lock(const DirLock&, const std::string& dir, std::string_view name, OwnerLockMode mode);

// The pid in NAME.lock, for messages.
std::optional<pid_t> owner_pid(const std::string& dir, std::string_view name);

// Unlinks NAME's socket files and then its lock. REQUIRES: DirLock and NAME.lock are held.
void remove_owner_files(const DirLock&, const std::string& dir, std::string_view name);

}  // namespace flexkv::ipc
