#include "flexkv/ipc/listener.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdio>

#include "flexkv/ipc/runtime_dir.h"

namespace flexkv::ipc {
namespace {

constexpr int kBacklog = 64;

Fd open_spare() { return Fd(::open("/dev/null", O_RDONLY | O_CLOEXEC)); }

std::string hidden_path(const std::string& dir, std::string_view name) {
  return dir + "/" + std::string(name) + ".tmp";
}

Result<Fd> listen_at(const std::string& temporary) {
  const auto address = UnixAddress::of(temporary);
  if (!address) return address.error();
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return errno_error("socket", errno);
  ::unlink(temporary.c_str());
  if (::bind(fd.get(), address.value().get(), UnixAddress::size()) != 0) {
    return errno_error("bind " + temporary, errno);
  }
  if (::chmod(temporary.c_str(), 0600) != 0) return errno_error("chmod " + temporary, errno);
  if (::listen(fd.get(), kBacklog) != 0) return errno_error("listen on " + temporary, errno);
  return fd;
}

}  // namespace

Result<Listener> Listener::listen(const std::string& dir, std::string_view name) {
  auto listener = claim(dir, name);
  if (!listener) return listener.error();
  if (Status shown = listener.value().show(); !shown) return shown.error();
  return listener;
}

Result<Listener> Listener::claim(const std::string& dir, std::string_view name) {
  if (!valid_socket_name(name)) {
    return Error{ErrorCode::kInvalidArgument, "no valid name of a socket: " + std::string(name)};
  }
  const auto dir_lock = DirLock::acquire(dir);
  if (!dir_lock) return dir_lock.error();
  auto lock = try_owner_lock(dir_lock.value(), dir, name, OwnerLockMode::kCreate);
  if (!lock) return lock.error();
  if (!lock.value().valid()) {
    const auto pid = owner_pid(dir, name);
    return Error{ErrorCode::kPeer, "node '" + std::string(name) + "' already runs (process " +
                                       (pid ? std::to_string(*pid) : "unknown") + "); stop it or give another --name"};
  }
  auto socket = listen_at(hidden_path(dir, name));
  if (!socket) {
    remove_owner_files(dir_lock.value(), dir, name);
    return socket.error();
  }
  return Listener(dir, name, std::move(lock).value(), std::move(socket).value(), open_spare());
}

// The socket listens before it gets its name, so that whoever sees the name can connect; the rename replaces what a
// killed owner left.
Status Listener::show() {
  const std::string path = socket_path(dir_, name_);
  if (std::rename(hidden_path(dir_, name_).c_str(), path.c_str()) != 0) return errno_error("rename to " + path, errno);
  return {};
}

Listener::Listener(std::string dir, std::string_view name, Fd lock, Fd socket, Fd spare)
    : dir_(std::move(dir)),
      name_(name),
      owner_(::getpid()),
      lock_(std::move(lock)),
      socket_(std::move(socket)),
      spare_(std::move(spare)) {}

Listener& Listener::operator=(Listener&& other) {
  if (this != &other) {
    close();
    dir_ = std::move(other.dir_);
    name_ = std::move(other.name_);
    owner_ = other.owner_;
    lock_ = std::move(other.lock_);
    socket_ = std::move(other.socket_);
    spare_ = std::move(other.spare_);
    rejected_ = other.rejected_;
  }
  return *this;
}

void Listener::close() {
  if (!lock_.valid() || owner_ != ::getpid()) return;
  if (const auto dir_lock = DirLock::acquire(dir_)) {
    remove_owner_files(dir_lock.value(), dir_, name_);
    // Said explicitly, because a forked child may still have a copy of the descriptor.
    ::flock(lock_.get(), LOCK_UN);
  }
  lock_.reset();
}

std::optional<Socket> Listener::accept() {
  while (true) {
    Fd fd(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd.valid()) {
      auto socket = Socket::adopt(std::move(fd));
      if (socket) return std::move(socket).value();
      ++rejected_;
    } else if (errno == EMFILE || errno == ENFILE) {
      shed();
      return std::nullopt;
    } else if (errno != EINTR && errno != ECONNABORTED) {
      return std::nullopt;
    }
  }
}

void Listener::shed() {
  spare_.reset();
  Fd victim(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (victim.valid()) ++rejected_;
  victim.reset();
  spare_ = open_spare();
}

}  // namespace flexkv::ipc
