// The files of one directory that a drive has open. Thread-safe; its calls block in the file system, never under a
// lock.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>

#include "flexkv/base/fd.h"
#include "flexkv/file/drive.h"

namespace flexkv::file {

// Closed when the last holder lets go: an I/O holds its file.
struct OpenFile {
  Fd fd;
  bool direct = false;  // as asked for: transfers are aligned
  bool bypasses_cache = false;
  int ring_slot = -1;  // the lane's
  std::mutex allocating;
};

class DriveFiles {
 public:
  // As in DriveOptions.
  struct Options {
    std::optional<std::uint64_t> keep_free_bytes{};
    bool direct = true;
    bool reserve_by_writing = true;
  };
  // Creates the directory (0700) when it is missing.
  static Result<std::unique_ptr<DriveFiles>> open(const std::string& directory, const Options& options);

  Result<FileId> open_file(const std::string& name, bool direct);
  // Null: not open.
  std::shared_ptr<OpenFile> find(FileId file) const;
  // What find() gave; no longer found.
  std::shared_ptr<OpenFile> close_file(FileId file);
  Status remove(const std::string& name);
  Result<std::uint64_t> bytes(FileId file) const;
  // `step` is called before each call to the kernel of those that may hang.
  Status allocate(FileId file, std::uint64_t offset, std::uint64_t bytes, const std::function<void()>& step);
  Status truncate(FileId file, std::uint64_t bytes);

  // REQUIRES of Drive::submit().
  void check(std::span<const Request> requests) const;

  // "DIRECTORY (FILE SYSTEM)"
  const std::string& describe() const { return description_; }

 private:
  DriveFiles(std::string directory, Fd fd, const Options& options)
      : directory_(std::move(directory)), directory_fd_(std::move(fd)), options_(options) {}

  Error error(const std::string& what, const std::string& name, int error_number) const;
  Result<Fd> open_fd(const std::string& name, int flags) const;
  Result<Fd> create_or_open(const std::string& name) const;

  const std::string directory_;
  const Fd directory_fd_;
  const Options options_;
  std::string description_;
  std::uint64_t keep_free_bytes_ = 0;

  mutable std::mutex mutex_;
  std::unordered_map<std::uint32_t, std::shared_ptr<OpenFile>> files_;
  std::uint32_t next_id_ = 0;
};

// Grows a file to `bytes` with zeros that are written, where the file system cannot reserve space.
Status grow_by_writing(int fd, std::uint64_t bytes, const std::function<void()>& step);

}  // namespace flexkv::file
