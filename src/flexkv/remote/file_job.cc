#include "flexkv/remote/file_job.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>

#include "flexkv/base/fd.h"

namespace flexkv::remote {
namespace {

constexpr std::string_view kTemporary = ".tmp-";
constexpr std::time_t kTemporarySeconds = 3600;  // who began it is gone by then
constexpr const char* kNotThere = ": is not there; FlexKV does not make it (is it mounted?)";
constexpr unsigned kShards = 256;  // folders of a space's folder

// Calls move(bytes of a part, offset in `size`) for each part that the bytes [at, at + size) lie in.
template <typename Part, typename Move>
void for_each_piece(const std::vector<std::span<Part>>& parts, std::uint64_t at, std::size_t size, Move move) {
  std::size_t done = 0;
  for (const auto part : parts) {
    if (done == size) return;
    if (at >= part.size()) {
      at -= part.size();
      continue;
    }
    const auto piece = part.subspan(at, std::min<std::size_t>(part.size() - at, size - done));
    move(piece, done);
    done += piece.size();
    at = 0;
  }
}

std::string temporary_name() {
  std::array<unsigned char, 12> random{};
  if (::getrandom(random.data(), random.size(), 0) != static_cast<ssize_t>(random.size())) return {};
  std::string name(kTemporary);
  for (const unsigned char byte : random) {
    std::array<char, 3> hex{};
    std::snprintf(hex.data(), hex.size(), "%02x", byte);
    name += hex.data();
  }
  return name;
}

// Those of `path` below `root`, which itself is not made: where a file system is not mounted, nothing is to be written.
// Not empty: the one that could not be made, and errno says why.
std::string make_folders(const std::string& root, const std::string& path) {
  for (std::size_t slash = path.find('/'); slash != std::string::npos; slash = path.find('/', slash + 1)) {
    std::string folder = root + '/' + path.substr(0, slash);
    if (::mkdir(folder.c_str(), 0777) != 0 && errno != EEXIST) return folder;
  }
  return {};
}

}  // namespace

void FileJob::abandon() {
  const std::lock_guard lock(mutex_);
  abandoned_ = true;
}

Ended FileJob::run(const std::string& root, std::span<std::byte> buffer) {
  {
    const std::lock_guard lock(mutex_);
    if (abandoned_) return given_up();
  }
  if (const auto* const op = std::get_if<PutOp>(&op_)) return put(*op, root, buffer);
  if (const auto* const op = std::get_if<GetOp>(&op_)) return get(*op, root, buffer);
  return list(std::get<ListOp>(op_), root);
}

Ended FileJob::failed(const std::string& what, int error_number) const {
  StoreOutcome outcome = StoreOutcome::kFailed;
  if (error_number == ENOENT || error_number == ENOTDIR) outcome = StoreOutcome::kMissing;
  if (error_number == EACCES || error_number == EPERM || error_number == EROFS) outcome = StoreOutcome::kRefused;
  return {id_, outcome, what + ": " + std::strerror(error_number), {}, {}};
}

bool FileJob::gather(const std::vector<std::span<const std::byte>>& parts, std::uint64_t at,
                     std::span<std::byte> buffer) {
  const std::lock_guard lock(mutex_);
  if (abandoned_) return false;
  for_each_piece(parts, at, buffer.size(),
                 [&](auto piece, std::size_t done) { std::memcpy(buffer.data() + done, piece.data(), piece.size()); });
  return true;
}

bool FileJob::scatter(const std::vector<std::span<std::byte>>& parts, std::uint64_t at,
                      std::span<const std::byte> buffer) {
  const std::lock_guard lock(mutex_);
  if (abandoned_) return false;
  for_each_piece(parts, at, buffer.size(),
                 [&](auto piece, std::size_t done) { std::memcpy(piece.data(), buffer.data() + done, piece.size()); });
  return true;
}

Ended FileJob::put(const PutOp& op, const std::string& root, std::span<std::byte> buffer) {
  const std::string path = root + '/' + op.path;
  const std::string temporary = path.substr(0, path.rfind('/') + 1) + temporary_name();
  constexpr int kFlags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
  Fd fd(::open(temporary.c_str(), kFlags, 0666));
  if (!fd.valid() && errno == ENOENT) {
    if (const std::string folder = make_folders(root, op.path); !folder.empty()) {
      if (errno == ENOENT) return {id_, StoreOutcome::kFailed, root + kNotThere, {}, {}};
      return failed(folder, errno);
    }
    fd = Fd(::open(temporary.c_str(), kFlags, 0666));
  }
  if (!fd.valid()) {
    // A directory that is not there is no missing object.
    Ended ended = failed(temporary, errno);
    if (ended.outcome == StoreOutcome::kMissing) ended.outcome = StoreOutcome::kFailed;
    return ended;
  }
  const auto give_up = [&](Ended ended) {
    ::unlink(temporary.c_str());
    return ended;
  };
  const std::uint64_t bytes = bytes_of(op.parts);
  for (std::uint64_t at = 0; at < bytes;) {
    const auto chunk = buffer.first(std::min<std::size_t>(buffer.size(), bytes - at));
    if (!gather(op.parts, at, chunk)) return give_up(given_up());
    for (std::size_t written = 0; written < chunk.size();) {
      const ssize_t count = ::write(fd.get(), chunk.data() + written, chunk.size() - written);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return give_up(failed(temporary, errno));
      written += static_cast<std::size_t>(count);
    }
    at += chunk.size();
  }
  // NFS tells only now what it could not write.
  if (::close(fd.release()) != 0) return give_up(failed(temporary, errno));
  if (::rename(temporary.c_str(), path.c_str()) != 0) return give_up(failed(path, errno));
  return {id_, StoreOutcome::kDone, {}, {}, {}};
}

Ended FileJob::get(const GetOp& op, const std::string& root, std::span<std::byte> buffer) {
  const std::string path = root + '/' + op.path;
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) {
    const int error_number = errno;
    // Is it the object that is missing, or the file system?
    if (error_number == ENOENT && ::access(root.c_str(), F_OK) != 0)
      return {id_, StoreOutcome::kFailed, root + kNotThere, {}, {}};
    return failed(path, error_number);
  }
  const std::uint64_t bytes = bytes_of(op.parts);
  for (std::uint64_t at = 0; at < bytes;) {
    const auto chunk = buffer.first(std::min<std::size_t>(buffer.size(), bytes - at));
    const ssize_t count = ::pread(fd.get(), chunk.data(), chunk.size(), static_cast<off_t>(op.offset + at));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return failed(path, errno);
    if (count == 0) return {id_, StoreOutcome::kShort, path + ": ends early", {}, {}};
    if (!scatter(op.parts, at, chunk.first(static_cast<std::size_t>(count)))) return given_up();
    at += static_cast<std::uint64_t>(count);
  }
  return {id_, StoreOutcome::kDone, {}, {}, {}};
}

// A page is one of the folders that objects are spread over: 00 to ff.
Ended FileJob::list(const ListOp& op, const std::string& root) {
  if (::access(root.c_str(), F_OK) != 0) return {id_, StoreOutcome::kFailed, root + kNotThere, {}, {}};
  Ended ended{id_, StoreOutcome::kDone, {}, {}, {}};
  if (::access((root + '/' + op.folder).c_str(), F_OK) != 0 && errno == ENOENT) return ended;
  unsigned shard = 0;
  if (!op.from.empty()) std::sscanf(op.from.c_str(), "%x", &shard);
  std::array<char, 4> shard_name{};
  std::snprintf(shard_name.data(), shard_name.size(), "%02x", shard % kShards);
  if (shard + 1 < kShards) {
    std::array<char, 4> next{};
    std::snprintf(next.data(), next.size(), "%02x", (shard + 1) % kShards);
    ended.next = next.data();
  }
  const std::string folder = op.folder + shard_name.data() + '/';
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir((root + '/' + folder).c_str()), ::closedir);
  if (directory == nullptr) {
    if (errno == ENOENT) return ended;
    return failed(root + '/' + folder, errno);
  }
  while (true) {
    errno = 0;
    const dirent* const entry = ::readdir(directory.get());
    if (entry == nullptr) break;
    const std::string_view name(entry->d_name);
    struct stat info {};
    if (::fstatat(::dirfd(directory.get()), entry->d_name, &info, AT_SYMLINK_NOFOLLOW) != 0)
      continue;  // gone meanwhile
    if (!S_ISREG(info.st_mode)) continue;
    if (name.starts_with(kTemporary)) {
      if (std::time(nullptr) - info.st_mtime > kTemporarySeconds)
        ::unlinkat(::dirfd(directory.get()), entry->d_name, 0);
      continue;
    }
    ended.objects.push_back({folder + entry->d_name, static_cast<std::uint64_t>(info.st_size)});
  }
  if (errno != 0) return failed(root + '/' + folder, errno);
  return ended;
}

}  // namespace flexkv::remote
