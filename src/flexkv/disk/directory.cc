#include "flexkv/disk/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>

#include "flexkv/base/bounded_call.h"
#include "flexkv/base/log.h"

namespace flexkv::disk {
namespace {

constexpr const char* kOwnPrefix = "node.";  // of what is ours besides the files of spaces
constexpr const char* kLockName = "node.lock";
constexpr const char* kSecretName = "node.secret";

std::string lock_owner(int fd) {
  std::array<char, 32> text{};
  const ssize_t size = ::pread(fd, text.data(), text.size(), 0);
  pid_t pid = 0;
  if (size <= 0 || std::from_chars(text.data(), text.data() + size, pid).ec != std::errc{}) return "another process";
  return "the process " + std::to_string(pid);
}

Result<Fd> lock(int directory, const std::string& path, const char* advice) {
  Fd fd(::openat(directory, kLockName, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.valid()) return errno_error("open " + path + "/" + kLockName, errno);
  while (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) {
      return Error{ErrorCode::kPeer,
                   "the SSD cache directory " + path + " is in use by " + lock_owner(fd.get()) + "; " + advice};
    }
    if (errno != EINTR) return errno_error("lock " + path + "/" + kLockName, errno);
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(fd.get(), 0) != 0 || ::pwrite(fd.get(), pid.data(), pid.size(), 0) != std::ssize(pid)) {
    return errno_error("write " + path + "/" + kLockName, errno);
  }
  return fd;
}

Result<Secret> random_secret() {
  Secret secret{};
  // Up to 256 bytes come whole.
  if (::getrandom(secret.data(), secret.size(), 0) != std::ssize(secret)) return errno_error("getrandom", errno);
  return secret;
}

// Whose files may be believed: checksums keep out errors, not other users. Only of a directory of ours do we say that
// its mode should change.
Status check_owner(int fd, const std::string& path, bool ours) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return errno_error("stat " + path, errno);
  if (info.st_uid != ::geteuid()) {
    return Error{ErrorCode::kInvalidArgument, "the SSD cache directory " + path + " belongs to uid " +
                                                  std::to_string(info.st_uid) + ", not to uid " +
                                                  std::to_string(::geteuid())};
  }
  if ((info.st_mode & 022) != 0) {
    return Error{ErrorCode::kInvalidArgument,
                 "the SSD cache directory " + path + " can be written by others; " +
                     (ours ? "run: chmod go-w " + path : "name one of its own below it, such as " + path + "/flexkv")};
  }
  return {};
}

bool is_space_file(std::string_view name, SpaceId& space) {
  const std::size_t dot = name.find('.');
  if (dot == std::string_view::npos || (name.substr(dot) != ".blocks" && name.substr(dot) != ".records")) return false;
  return parse_space_name(name.substr(0, dot), space);
}

// Of what begins as records do, whatever its slots.
HeaderFault header_fault(int directory, const char* name, const SpaceId& space) {
  HeaderPage page{};
  Header header;
  // O_NONBLOCK: whatever has that name, opening it does not wait.
  const Fd file(::openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file.valid() || ::pread(file.get(), page.data(), page.size(), 0) != std::ssize(page)) {
    return HeaderFault::kDamaged;
  }
  return decode_header(page, space, 0, header);
}

}  // namespace

Result<Directory> Directory::open(const std::string& path, bool make_parents) {
  for (std::size_t end = path.find('/', 1); make_parents && end != std::string::npos; end = path.find('/', end + 1)) {
    const std::string parent = path.substr(0, end);
    // One that is there may say so with another error where it cannot be written.
    if (::mkdir(parent.c_str(), 0700) != 0 && errno != EEXIST && ::access(parent.c_str(), F_OK) != 0) {
      return errno_error("create " + parent, errno);
    }
  }
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) return errno_error("create " + path, errno);
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return errno_error("open " + path, errno);
  Directory directory(path, std::move(fd), Fd());
  if (auto taken = directory.take("give each node a directory of its own"); !taken) return taken.error();
  return directory;
}

Result<Directory> Directory::open_existing(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return errno_error("open " + path, errno);
  Directory directory(path, std::move(fd), Fd());
  if (!directory.has_marker()) {
    return Error{ErrorCode::kInvalidArgument, "not an SSD cache directory (there is no " + std::string(kSecretName) +
                                                  " of a node in it, and no file of blocks)"};
  }
  if (auto taken = directory.take("stop that node first"); !taken) return taken.error();
  return directory;
}

Status Directory::take(const char* advice) {
  if (auto checked = check_owner(fd_.get(), path_, has_marker()); !checked) return checked;
  auto locked = lock(fd_.get(), path_, advice);
  if (!locked) return locked.error();
  lock_ = std::move(locked).value();
  return {};
}

bool Directory::has_marker() const {
  struct stat info {};
  if (::fstatat(fd_.get(), kSecretName, &info, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(info.st_mode) &&
      info.st_size == static_cast<off_t>(sizeof(Secret))) {
    return true;
  }
  bool found = false;
  (void)visit([&](const char* name, const SpaceId& space) -> Status {
    found = found || header_fault(fd_.get(), name, space) != HeaderFault::kDamaged;
    return {};
  });
  return found;
}

Status Directory::check_version() const {
  return visit([&](const char* name, const SpaceId& space) -> Status {
    if (header_fault(fd_.get(), name, space) != HeaderFault::kVersion) return {};
    return Error{ErrorCode::kUnsupported, version_refusal(path_ + "/" + name)};
  });
}

Status Directory::visit(const std::function<Status(const char*, const SpaceId&)>& visit) const {
  return visit_all([&](const char* name) -> Status {
    SpaceId space{};
    return is_space_file(name, space) ? visit(name, space) : Status{};
  });
}

Status Directory::visit_all(const std::function<Status(const char*)>& visit) const {
  // A descriptor of its own: reading moves the position that duplicates share.
  const int fd = ::openat(fd_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(fd < 0 ? nullptr : ::fdopendir(fd), &::closedir);
  if (!listing) return errno_error("list " + path_, errno);
  while (const dirent* entry = ::readdir(listing.get())) {
    if (auto status = visit(entry->d_name); !status) return status;
  }
  return {};
}

Result<FoundSpaces> Directory::list() const {
  FoundSpaces found;
  auto status = visit([&](const char* name, const SpaceId& space) -> Status {
    struct stat info {};
    if (::fstatat(fd_.get(), name, &info, AT_SYMLINK_NOFOLLOW) != 0) return errno_error("stat " + path_, errno);
    FoundSpace& entry = found[space];
    entry.bytes += static_cast<std::uint64_t>(info.st_size);
    entry.last_use = std::max<std::int64_t>(entry.last_use, info.st_mtim.tv_sec);
    return {};
  });
  if (!status) return status.error();
  return found;
}

Result<Contents> Directory::contents() const {
  Contents contents;
  auto status = visit_all([&](const char* entry) -> Status {
    const std::string_view name = entry;
    SpaceId space{};
    struct stat info {};
    if (is_space_file(name, space)) {
      if (::fstatat(fd_.get(), entry, &info, AT_SYMLINK_NOFOLLOW) != 0) return errno_error("stat " + path_, errno);
      contents.bytes += static_cast<std::uint64_t>(info.st_size);
    } else if (name != "." && name != ".." && !name.starts_with(kOwnPrefix)) {
      ++contents.foreign_count;
      if (contents.foreign.size() < Contents::kForeignMax) contents.foreign.emplace_back(name);
    }
    return {};
  });
  if (!status) return status.error();
  return contents;
}

Result<std::uint64_t> Directory::clear() const {
  std::uint64_t bytes = 0;
  auto status = visit([&](const char* name, const SpaceId&) -> Status {
    struct stat info {};
    if (::fstatat(fd_.get(), name, &info, AT_SYMLINK_NOFOLLOW) == 0) bytes += static_cast<std::uint64_t>(info.st_size);
    if (::unlinkat(fd_.get(), name, 0) != 0) return errno_error("remove " + path_ + "/" + name, errno);
    return {};
  });
  if (!status) return status.error();
  return bytes;
}

Result<std::vector<std::byte>> Directory::read(const std::string& name, std::size_t bytes_max) const {
  const std::string path = path_ + "/" + name;
  const Fd fd(::openat(fd_.get(), name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd.valid() && errno == ENOENT) return Error{ErrorCode::kNotFound, "there is no " + path};
  if (!fd.valid()) return errno_error("open " + path, errno);
  std::vector<std::byte> bytes(bytes_max);
  const ssize_t size = ::pread(fd.get(), bytes.data(), bytes.size(), 0);
  if (size < 0) return errno_error("read " + path, errno);
  // Whoever may read the secret could tell keys: not worth losing the cache, but no more of that.
  if (::fchmod(fd.get(), 0600) != 0) return errno_error("chmod " + path, errno);
  bytes.resize(static_cast<std::size_t>(size));
  return bytes;
}

Status Directory::replace(const std::string& name, std::span<const std::byte> bytes) const {
  const std::string fresh = name + ".new";
  const std::string path = path_ + "/" + fresh;
  if (::unlinkat(fd_.get(), fresh.c_str(), 0) != 0 && errno != ENOENT) return errno_error("remove " + path, errno);
  const Fd fd(::openat(fd_.get(), fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.valid()) return errno_error("create " + path, errno);
  const ssize_t written = ::pwrite(fd.get(), bytes.data(), bytes.size(), 0);
  if (written >= 0 && written != std::ssize(bytes)) return errno_error("write " + path, ENOSPC);
  if (written < 0 || ::fsync(fd.get()) != 0 || ::renameat(fd_.get(), fresh.c_str(), fd_.get(), name.c_str()) != 0 ||
      ::fsync(fd_.get()) != 0) {
    return errno_error("write " + path, errno);
  }
  return {};
}

Result<Secret> Directory::read_secret() const {
  auto bytes = read(kSecretName, sizeof(Secret) + 1);
  if (!bytes) return bytes.error();
  Secret secret{};
  if (bytes.value().size() != secret.size()) {
    return Error{ErrorCode::kNotFound, path_ + "/" + kSecretName + " is not 32 bytes long"};
  }
  std::memcpy(secret.data(), bytes.value().data(), secret.size());
  return secret;
}

Status Directory::write_secret(const Secret& secret) const {
  return replace(kSecretName, std::as_bytes(std::span(secret)));
}

namespace {

// A directory that does not answer by then is not used; nor does one that hangs keep those waiting who let go of it.
constexpr Nanos kOpenPatience = 10 * kSecond;
constexpr Nanos kClosePatience = kSecond;

std::string hangs(Nanos patience) { return "it hangs: no answer in " + std::to_string(patience / kSecond) + " s"; }

struct Opened {
  explicit Opened(const std::string& path, std::string why_not = {}) {
    place.path = path;
    place.why_not = std::move(why_not);
  }
  Home::Place place;
  std::optional<Secret> secret;
};

std::shared_ptr<const Directory> share(Directory directory) {
  return {new const Directory(std::move(directory)), [](const Directory* last) {
            const auto close = [last] {
              delete last;
              return true;
            };
            try {
              (void)within(kClosePatience, close);
            } catch (const std::system_error&) {  // there is no thread to be had
              (void)close();
            }
          }};
}

// An error only when another process has it.
Result<Opened> open_place(const std::string& path, bool make_parents) {
  Opened opened(path);
  const auto unusable = [&](const Error& error) {
    opened.place.why_not = error.message;
    return opened;
  };
  auto directory = Directory::open(path, make_parents);
  if (!directory && directory.error().code == ErrorCode::kPeer) return directory.error();
  if (!directory) return unusable(directory.error());
  if (auto known = directory.value().check_version(); !known) return unusable(known.error());
  auto found = directory.value().list();
  if (!found) return unusable(found.error());
  auto stored = directory.value().read_secret();
  if (!stored && stored.error().code != ErrorCode::kNotFound) return unusable(stored.error());
  if (stored) opened.secret = stored.value();
  struct stat info {};
  struct statvfs space {};
  if (::fstat(directory.value().fd(), &info) == 0) opened.place.device = info.st_dev;
  if (::fstatvfs(directory.value().fd(), &space) == 0) {
    opened.place.capacity_bytes = std::uint64_t{space.f_blocks} * space.f_frsize;
  }
  opened.place.found = std::move(found).value();
  opened.place.fresh = opened.place.found.empty() && !stored;
  opened.place.directory = share(std::move(directory).value());
  return opened;
}

// What must be there already, or is written now.
Status keep_secret(const Directory& directory, const Secret& secret) {
  const auto stored = directory.read_secret();
  if (stored.ok() && stored.value() == secret) return {};
  if (stored.ok()) {
    log_warning("SSD cache: " + directory.path() + " belonged to another node or cluster: its blocks are of no use");
  }
  return directory.write_secret(secret);
}

}  // namespace

Result<Home> Home::open(const std::vector<std::string>& paths, bool make_parents, std::optional<Secret> wanted) {
  Home home;
  std::optional<Secret> secret = wanted;
  for (const std::string& path : paths) {
    auto answer = within(kOpenPatience, [path, make_parents] { return open_place(path, make_parents); });
    if (answer && !answer->ok()) return answer->error();
    Opened opened = answer ? std::move(*answer).value() : Opened(path, hangs(kOpenPatience));
    if (!secret) secret = opened.secret;
    home.places.push_back(std::move(opened.place));
  }
  if (!secret) {
    auto made = random_secret();
    if (!made) return made.error();
    secret = made.value();
  }
  home.secret = *secret;
  for (Place& place : home.places) {
    if (place.directory == nullptr) continue;
    const auto kept = within(
        kOpenPatience, [directory = place.directory, secret = home.secret] { return keep_secret(*directory, secret); });
    if (kept && kept->ok()) continue;
    place.why_not = kept ? kept->error().message : hangs(kOpenPatience);
    place.directory = nullptr;
  }
  return home;
}

Result<Contents> inspect(const std::string& directory) {
  auto opened = Directory::open_existing(directory);
  if (!opened) return opened.error();
  return opened.value().contents();
}

Result<std::uint64_t> clear(const std::string& directory) {
  auto opened = Directory::open_existing(directory);
  if (!opened) return opened.error();
  return opened.value().clear();
}

}  // namespace flexkv::disk
