// The directories of the tier in the file system: who owns them, the node's secret, which spaces have files there.
// Blocking system calls; for start-up and for the command line. Thread-compatible.
//
// In a directory lie `node.lock` (held with flock while a node uses the directory; names its pid), `node.secret` (32
// random bytes; keys are made with it, so blocks are found again only with the same one), `node.writes` (how much the
// drive was written to), `node.resets` (of which resets the blocks know) and, per space, a `.blocks` and a `.records`
// file.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/disk/record.h"

namespace flexkv::disk {

using Secret = std::array<std::uint8_t, 32>;

struct FoundSpace {
  std::uint64_t bytes = 0;    // of both files
  std::int64_t last_use = 0;  // seconds since 1970, the later of both files
};
using FoundSpaces = std::map<SpaceId, FoundSpace>;

// What lies in a directory, ours and not.
struct Contents {
  static constexpr std::size_t kForeignMax = 5;
  std::uint64_t bytes = 0;  // of the files of all spaces
  std::uint64_t foreign_count = 0;
  std::vector<std::string> foreign;  // the first of their names
};

// One directory, locked. Created (0700) if it does not exist, its parents only if that is asked for: where a drive
// should be mounted and is not, nothing must be written instead.
// Errors: kPeer: another process has it; others: it cannot be used.
class Directory {
 public:
  static Result<Directory> open(const std::string& path, bool make_parents = false);

  // Of a directory that a node has used: nothing is made in any other. kInvalidArgument: it is none.
  static Result<Directory> open_existing(const std::string& path);

  const std::string& path() const { return path_; }
  Result<Contents> contents() const;
  Result<FoundSpaces> list() const;
  // Removes the files of every space and returns the bytes that this frees.
  Result<std::uint64_t> clear() const;
  // A small file beside those of spaces. kNotFound: there is none. Longer than `bytes_max`: cut off there.
  Result<std::vector<std::byte>> read(const std::string& name, std::size_t bytes_max) const;
  // Atomically; on stable storage on return.
  Status replace(const std::string& name, std::span<const std::byte> bytes) const;
  // kNotFound: there is none, or not a whole one.
  Result<Secret> read_secret() const;
  // Replaces the one that is there. On stable storage on return.
  Status write_secret(const Secret& secret) const;
  // kUnsupported: there are files of another version of the format.
  Status check_version() const;
  int fd() const { return fd_.get(); }

 private:
  Directory(std::string path, Fd fd, Fd lock) : path_(std::move(path)), fd_(std::move(fd)), lock_(std::move(lock)) {}
  // Checks whose it is and locks it. `advice`: what to do when another process has it.
  Status take(const char* advice);
  // A secret, or a file that begins as records do.
  bool has_marker() const;
  Status visit_all(const std::function<Status(const char*)>& visit) const;
  // Calls `visit` with the name of every file of a space and the space's id.
  Status visit(const std::function<Status(const char*, const SpaceId&)>& visit) const;

  std::string path_;
  Fd fd_;
  Fd lock_;
};

// All directories of a node.
struct Home {
  struct Place {
    std::string path;
    std::shared_ptr<const Directory> directory;  // null: `why_not`
    std::string why_not;
    bool fresh = false;  // no node has used it before
    // Of the file system: which one, and its size (0: it tells none).
    std::uint64_t device = 0;
    std::uint64_t capacity_bytes = 0;
    FoundSpaces found;
  };
  std::vector<Place> places;
  Secret secret;  // the same in every place; random, and gone with the process, if there is no usable place

  // An error only when another process has one of the directories. One that hangs counts as unusable after 10 s; then,
  // and when the last user lets go of one that hangs by then, it is left to a thread of its own. `wanted`: the secret
  // that all places get; none: that of the first that has one.
  static Result<Home> open(const std::vector<std::string>& paths, bool make_parents = false,
                           std::optional<Secret> wanted = std::nullopt);
};

// What these open, they lock: a node that uses the directory makes them fail (kPeer). A directory that is none of the
// tier's is refused, and stays as it is.
Result<Contents> inspect(const std::string& directory);
Result<std::uint64_t> clear(const std::string& directory);

}  // namespace flexkv::disk
