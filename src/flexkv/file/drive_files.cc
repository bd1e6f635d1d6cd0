#include "flexkv/file/drive_files.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>

namespace flexkv::file {
namespace {

constexpr std::size_t kFillBytes = 1 << 20;

std::string file_system_name(int fd) {
  struct statfs info {};
  if (::fstatfs(fd, &info) != 0) return "unknown file system";
  switch (static_cast<unsigned long>(info.f_type)) {
    case EXT4_SUPER_MAGIC:
      return "ext4";
    case XFS_SUPER_MAGIC:
      return "xfs";
    case BTRFS_SUPER_MAGIC:
      return "btrfs";
    case TMPFS_MAGIC:
      return "tmpfs";
    case OVERLAYFS_SUPER_MAGIC:
      return "overlayfs";
    case NFS_SUPER_MAGIC:
      return "nfs";
    default: {
      char text[32];
      std::snprintf(text, sizeof(text), "file system %lx", static_cast<unsigned long>(info.f_type));
      return text;
    }
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Some file systems take the flag and refuse the transfers.
bool transfers_directly(int fd) {
  const Memory page(std::aligned_alloc(kDirectAlignment, kDirectAlignment));
  return ::pread(fd, page.get(), kDirectAlignment, 0) >= 0 || errno != EINVAL;
}

template <typename Call>
auto retry_interrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace

Result<std::unique_ptr<DriveFiles>> DriveFiles::open(const std::string& directory, const Options& options) {
  std::error_code failed;
  const std::filesystem::path parent = std::filesystem::path(directory).parent_path();
  if (!parent.empty()) std::filesystem::create_directories(parent, failed);
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) return errno_error("cannot create " + directory, errno);
  Fd fd(::open(directory.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return errno_error("cannot open " + directory, errno);
  struct statvfs space {};
  if (::fstatvfs(fd.get(), &space) != 0) return errno_error("cannot ask for the space of " + directory, errno);
  std::unique_ptr<DriveFiles> files(new DriveFiles(directory, std::move(fd), options));
  const std::uint64_t percent = std::uint64_t{space.f_blocks} * space.f_frsize / 100;
  files->keep_free_bytes_ = options.keep_free_bytes.value_or(std::min<std::uint64_t>(percent, 1ULL << 30));
  files->description_ = directory + " (" + file_system_name(files->directory_fd_.get()) + ")";
  return files;
}

Error DriveFiles::error(const std::string& what, const std::string& name, int error_number) const {
  Error error = errno_error(what + " " + directory_ + "/" + name, error_number);
  if (error_number == ENOENT) error.code = ErrorCode::kNotFound;
  if (error_number == ENOSPC || error_number == EDQUOT) error.code = ErrorCode::kNoSpace;
  return error;
}

Result<Fd> DriveFiles::open_fd(const std::string& name, int flags) const {
  // O_NONBLOCK: a FIFO in our place must not hold us up.
  const int all = flags | O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;
  Fd fd(retry_interrupted([&] { return ::openat(directory_fd_.get(), name.c_str(), all, 0600); }));
  if (!fd.valid()) return error("cannot open", name, errno);
  return fd;
}

Result<Fd> DriveFiles::create_or_open(const std::string& name) const {
  auto fd = open_fd(name, 0);
  if (fd.ok() || fd.error().code != ErrorCode::kNotFound) return fd;
  fd = open_fd(name, O_CREAT);
  // The name, too, survives a power cut from now on.
  if (fd.ok() && ::fsync(directory_fd_.get()) != 0) return error("cannot sync the directory of", name, errno);
  return fd;
}

Result<FileId> DriveFiles::open_file(const std::string& name, bool direct) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos) {
    return Error{ErrorCode::kInvalidArgument, "'" + name + "' is no file name"};
  }
  auto opened = create_or_open(name);
  if (!opened) return opened.error();
  struct stat info {};
  if (::fstat(opened.value().get(), &info) != 0) return error("cannot stat", name, errno);
  if (!S_ISREG(info.st_mode)) return Error{ErrorCode::kInvalidArgument, directory_ + "/" + name + ": no regular file"};
  if (info.st_uid != ::geteuid()) {
    return Error{ErrorCode::kInvalidArgument, directory_ + "/" + name + ": belongs to another user"};
  }
  auto file = std::make_shared<OpenFile>();
  file->direct = direct;
  file->fd = std::move(opened).value();
  if (direct && options_.direct && ::fcntl(file->fd.get(), F_SETFL, O_DIRECT) == 0) {
    file->bypasses_cache = transfers_directly(file->fd.get());
  }
  if (!file->bypasses_cache) (void)::fcntl(file->fd.get(), F_SETFL, 0);
  std::lock_guard lock(mutex_);
  const std::uint32_t id = next_id_++;
  files_.emplace(id, std::move(file));
  return FileId{id};
}

std::shared_ptr<OpenFile> DriveFiles::find(FileId file) const {
  std::lock_guard lock(mutex_);
  const auto found = files_.find(static_cast<std::uint32_t>(file));
  return found == files_.end() ? nullptr : found->second;
}

std::shared_ptr<OpenFile> DriveFiles::close_file(FileId file) {
  std::lock_guard lock(mutex_);
  auto taken = files_.extract(static_cast<std::uint32_t>(file));
  return taken.empty() ? nullptr : std::move(taken.mapped());
}

Status DriveFiles::remove(const std::string& name) {
  if (name.find('/') != std::string::npos) return Error{ErrorCode::kInvalidArgument, "'" + name + "' is no file name"};
  if (::unlinkat(directory_fd_.get(), name.c_str(), 0) != 0) return error("cannot remove", name, errno);
  return {};
}

Result<std::uint64_t> DriveFiles::bytes(FileId file) const {
  const auto open = find(file);
  if (open == nullptr) return Error{ErrorCode::kInvalidArgument, "the file is not open"};
  struct stat info {};
  if (::fstat(open->fd.get(), &info) != 0) return errno_error("cannot stat a file in " + directory_, errno);
  return static_cast<std::uint64_t>(info.st_size);
}

Status DriveFiles::truncate(FileId file, std::uint64_t bytes) {
  const auto open = find(file);
  if (open == nullptr) return Error{ErrorCode::kInvalidArgument, "the file is not open"};
  std::lock_guard lock(open->allocating);
  if (retry_interrupted([&] { return ::ftruncate(open->fd.get(), static_cast<off_t>(bytes)); }) != 0) {
    return errno_error("cannot cut a file in " + directory_ + " off", errno);
  }
  return {};
}

Status DriveFiles::allocate(FileId file, std::uint64_t offset, std::uint64_t bytes, const std::function<void()>& step) {
  const auto open = find(file);
  if (open == nullptr) return Error{ErrorCode::kInvalidArgument, "the file is not open"};
  const int fd = open->fd.get();
  std::lock_guard lock(open->allocating);
  struct stat info {};
  struct statvfs space {};
  if (::fstat(fd, &info) != 0) return errno_error("cannot stat a file in " + directory_, errno);
  if (info.st_nlink == 0) {
    return Error{ErrorCode::kNotFound, directory_ +
                                           ": its files were removed while they are in use, and what is "
                                           "written there is gone at the next start; restart to use it again"};
  }
  if (::fstatvfs(fd, &space) != 0) return errno_error("cannot ask for the space of " + directory_, errno);
  const std::uint64_t end = offset + bytes;
  // What a file with holes has lies somewhere; ours have none, and grow at their end.
  const std::uint64_t has = std::min(static_cast<std::uint64_t>(info.st_blocks) * 512, end);
  const std::uint64_t free = std::uint64_t{space.f_bavail} * space.f_frsize;
  const std::uint64_t wanted = std::min(end - has, bytes);
  if (wanted > 0 && (free < keep_free_bytes_ || wanted > free - keep_free_bytes_)) {
    return Error{ErrorCode::kNoSpace, directory_ + ": " + std::to_string(wanted >> 20) + " MiB wanted, " +
                                          std::to_string(free >> 20) + " MiB free, " +
                                          std::to_string(keep_free_bytes_ >> 20) + " MiB of them to be left"};
  }
  const auto reserve = [&] { return ::fallocate(fd, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)); };
  Status status;
  step();
  if (retry_interrupted(reserve) != 0) {
    const int failed = errno;
    if (failed != EOPNOTSUPP && failed != ENOSYS) {
      status = error("cannot reserve space in", "", failed);
    } else if (options_.reserve_by_writing) {
      status = grow_by_writing(fd, end, step);
    } else if (end > static_cast<std::uint64_t>(info.st_size) && ::ftruncate(fd, static_cast<off_t>(end)) != 0) {
      status = error("cannot make room in", "", errno);
    }
  }
  // So that the file has its length after a power cut, too.
  step();
  if (status && ::fsync(fd) != 0) status = errno_error("cannot sync a file in " + directory_, errno);
  if (!status) (void)!::ftruncate(fd, info.st_size);
  return status;
}

void DriveFiles::check(std::span<const Request> requests) const {
  std::lock_guard lock(mutex_);
  for (const Request& request : requests) {
    const auto found = files_.find(static_cast<std::uint32_t>(request.file));
    if (found == files_.end() || !found->second->direct) continue;
    const auto address = reinterpret_cast<std::uintptr_t>(request.data);
    FLEXKV_ASSERT((request.offset | request.bytes | address) % kDirectAlignment == 0);
  }
}

Status grow_by_writing(int fd, std::uint64_t bytes, const std::function<void()>& step) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return errno_error("cannot stat", errno);
  const auto align = [](std::uint64_t value) { return value / kDirectAlignment * kDirectAlignment; };
  const Memory zeros(std::aligned_alloc(kDirectAlignment, kFillBytes));
  std::fill_n(static_cast<std::byte*>(zeros.get()), kFillBytes, std::byte{0});
  std::uint64_t at = align(static_cast<std::uint64_t>(info.st_size) + kDirectAlignment - 1);
  // Through O_DIRECT only whole pages can be written; the rest of the last one is left to ftruncate.
  const std::uint64_t end = align(bytes);
  while (at < end) {
    const std::size_t count = std::min<std::uint64_t>(end - at, kFillBytes);
    step();
    const ssize_t written = retry_interrupted([&] { return ::pwrite(fd, zeros.get(), count, static_cast<off_t>(at)); });
    if (written <= 0) {
      Error error = errno_error("cannot fill a file", written < 0 ? errno : EIO);
      if (written < 0 && (errno == ENOSPC || errno == EDQUOT)) error.code = ErrorCode::kNoSpace;
      return error;
    }
    at += static_cast<std::uint64_t>(written);
  }
  if (bytes > static_cast<std::uint64_t>(info.st_size) && ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    return errno_error("cannot set the length of a file", errno);
  }
  return {};
}

}  // namespace flexkv::file
