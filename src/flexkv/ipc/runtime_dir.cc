#include "flexkv/ipc/runtime_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <memory>
#include <set>

namespace flexkv::ipc {
namespace {

constexpr std::size_t kMaxNameLength = 64;
constexpr std::string_view kSocketSuffix = ".sock";
constexpr std::string_view kHiddenSuffix = ".tmp";

std::string file_path(const std::string& dir, std::string_view name, std::string_view suffix) {
  return dir + "/" + std::string(name) + std::string(suffix);
}

// Waits unless LOCK_NB is given. False: would have to wait.
Result<bool> lock_file(int fd, int operation, const std::string& path) {
  while (::flock(fd, operation) != 0) {
    if (errno == EWOULDBLOCK) return false;
    if (errno != EINTR) return errno_error("flock " + path, errno);
  }
  return true;
}

bool creatable(const std::string& dir) { return ::mkdir(dir.c_str(), 0700) == 0 || errno == EEXIST; }

}  // namespace

Status ensure_private_dir(const std::string& dir) {
  if (!dir.starts_with('/')) {
    return Error{ErrorCode::kInvalidArgument, "runtime directory '" + dir + "' is not an absolute path"};
  }
  if (!creatable(dir)) {
    return errno_error("create runtime directory " + dir + " (make the one above it, or set FLEXKV_RUNTIME_DIR)",
                       errno);
  }
  const Fd fd(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd.valid()) return errno_error("open runtime directory " + dir, errno);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return errno_error("stat runtime directory " + dir, errno);
  if (info.st_uid != ::geteuid()) {
    return Error{ErrorCode::kInvalidArgument, "runtime directory " + dir + " belongs to uid " +
                                                  std::to_string(info.st_uid) + ", not to uid " +
                                                  std::to_string(::geteuid()) + "; configure another one"};
  }
  if ((info.st_mode & 077) != 0) {
    return Error{ErrorCode::kInvalidArgument,
                 "runtime directory " + dir + " is open to group or others; run: chmod 700 " + dir};
  }
  return {};
}

Result<std::string> runtime_dir(std::string_view configured) {
  std::string dir(configured);
  if (!dir.empty()) {
    // With a trailing slash, O_NOFOLLOW would follow.
    while (dir.size() > 1 && dir.ends_with('/')) dir.pop_back();
  } else {
    const char* xdg = std::getenv("XDG_RUNTIME_DIR");
    const std::string user_dir = xdg != nullptr && *xdg == '/' ? std::string(xdg) + "/flexkv" : "";
    const std::string system_dir = "/run/flexkv";
    struct stat info {};
    // Another user's /run/flexkv is that user's service, not an attack: only there ownership decides.
    const auto ours = [&] { return ::lstat(system_dir.c_str(), &info) == 0 && info.st_uid == ::geteuid(); };
    if (!user_dir.empty() && creatable(user_dir)) {
      dir = user_dir;
    } else if (creatable(system_dir) && (::geteuid() == 0 || ours())) {
      dir = system_dir;
    } else {
      dir = "/tmp/flexkv-" + std::to_string(::geteuid());
    }
  }
  if (auto status = ensure_private_dir(dir); !status) return status.error();
  return dir;
}

bool valid_socket_name(std::string_view name) {
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' ||
           c == '-';
  };
  return !name.empty() && name.size() <= kMaxNameLength && name.front() != '.' && std::ranges::all_of(name, allowed);
}

std::string socket_path(const std::string& dir, std::string_view name) { return file_path(dir, name, kSocketSuffix); }

Result<DirLock> DirLock::acquire(const std::string& dir) {
  Fd fd(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd.valid()) return errno_error("open " + dir, errno);
  if (auto locked = lock_file(fd.get(), LOCK_EX, dir); !locked) return locked.error();
  return DirLock(std::move(fd));
}

Result<Fd> try_owner_lock(const DirLock&, const std::string& dir, std::string_view name, OwnerLockMode mode) {
  const std::string path = file_path(dir, name, ".lock");
  const int create = mode == OwnerLockMode::kCreate ? O_CREAT : 0;
  Fd fd(::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC | create, 0600));
  if (!fd.valid()) {
    if (errno == ENOENT && mode == OwnerLockMode::kExisting) return Fd();
    return errno_error("open " + path, errno);
  }
  auto locked = lock_file(fd.get(), LOCK_EX | LOCK_NB, path);
  if (!locked) return locked.error();
  if (!locked.value()) return Fd();
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(fd.get(), 0) != 0 || ::pwrite(fd.get(), pid.data(), pid.size(), 0) != std::ssize(pid)) {
    return errno_error("write " + path, errno);
  }
  return fd;
}

std::optional<pid_t> owner_pid(const std::string& dir, std::string_view name) {
  const Fd fd(::open(file_path(dir, name, ".lock").c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  std::array<char, 32> text{};
  const ssize_t size = fd.valid() ? ::read(fd.get(), text.data(), text.size()) : -1;
  pid_t pid = 0;
  if (size <= 0 || std::from_chars(text.data(), text.data() + size, pid).ec != std::errc{}) return std::nullopt;
  return pid;
}

void remove_owner_files(const DirLock&, const std::string& dir, std::string_view name) {
  // The lock goes last: a process killed in between leaves no socket that looks unowned.
  for (const std::string_view suffix : {kHiddenSuffix, kSocketSuffix, std::string_view(".lock")}) {
    ::unlink(file_path(dir, name, suffix).c_str());
  }
}

Result<std::size_t> sweep_stale(const std::string& dir) {
  auto dir_lock = DirLock::acquire(dir);
  if (!dir_lock) return dir_lock.error();
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(dir.c_str()), &::closedir);
  if (!listing) return errno_error("list " + dir, errno);
  std::set<std::string> names;
  while (const dirent* entry = ::readdir(listing.get())) {
    for (const std::string_view suffix : {kSocketSuffix, kHiddenSuffix}) {
      std::string_view name = entry->d_name;
      if (!name.ends_with(suffix)) continue;
      name.remove_suffix(suffix.size());
      struct stat info {};
      const bool is_socket = ::lstat(file_path(dir, name, suffix).c_str(), &info) == 0 && S_ISSOCK(info.st_mode);
      if (is_socket && valid_socket_name(name)) names.emplace(name);
    }
  }
  std::size_t removed = 0;
  for (const std::string& name : names) {
    const auto lock = try_owner_lock(dir_lock.value(), dir, name, OwnerLockMode::kExisting);
    if (!lock || !lock.value().valid()) continue;
    remove_owner_files(dir_lock.value(), dir, name);
    ++removed;
  }
  return removed;
}

}  // namespace flexkv::ipc
