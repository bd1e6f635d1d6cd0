// The calls to a drive that block, for a volume's lane: they may hang, and a volume is given up while one does.
//
// One thread calls, the lane; give_up() is for whoever ends the volume. A call that ends after that never returns to
// the lane: its thread goes no further, because what it would go on with is gone.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "flexkv/file/drive.h"

namespace flexkv::disk {

class LaneCalls {
 public:
  // `drive`: of the volume, which keeps it.
  explicit LaneCalls(const std::unique_ptr<file::Drive>& drive) : drive_(drive) {}

  Result<file::FileId> open(const std::string& name, bool direct);
  void close_file(file::FileId file);
  Status remove(const std::string& name);
  Result<std::uint64_t> file_bytes(file::FileId file);
  Status allocate(file::FileId file, std::uint64_t offset, std::uint64_t bytes);
  Status truncate(file::FileId file, std::uint64_t bytes);
  // Something else that may hang.
  void call(const std::function<void()>& call);
  // Closes its files, too. REQUIRES: it was closed
  void destroy(std::unique_ptr<file::Drive>& drive);

  // True: a call is under way, and the lane does nothing any more. False: none is, and nothing has changed.
  bool give_up();

 private:
  class Inside;

  const std::unique_ptr<file::Drive>& drive_;
  std::mutex mutex_;
  bool inside_ = false;
  bool given_up_ = false;
};

}  // namespace flexkv::disk
