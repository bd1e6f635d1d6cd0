// One operation on a directory's files, carried out by the thread that calls run(). Used by FileStore.
#pragma once

#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "flexkv/remote/store.h"

namespace flexkv::remote {

using FileOp = std::variant<PutOp, GetOp, ListOp>;

class FileJob {
 public:
  FileJob(OpId id, FileOp op) : id_(id), op_(std::move(op)) {}

  OpId id() const { return id_; }
  // Thread-safe, also while run() hangs: the operation's memory is not touched any more.
  void abandon();
  // Blocks for as long as the file system does. `buffer`: for as much as is moved at once.
  Ended run(const std::string& root, std::span<std::byte> buffer);

 private:
  Ended put(const PutOp& op, const std::string& root, std::span<std::byte> buffer);
  Ended get(const GetOp& op, const std::string& root, std::span<std::byte> buffer);
  Ended list(const ListOp& op, const std::string& root);
  Ended failed(const std::string& what, int error_number) const;
  Ended given_up() const { return {id_, StoreOutcome::kFailed, "abandoned", {}, {}}; }
  // Copy between `buffer` and the parts, of which it is the bytes from `at` on. False: abandoned.
  bool gather(const std::vector<std::span<const std::byte>>& parts, std::uint64_t at, std::span<std::byte> buffer);
  bool scatter(const std::vector<std::span<std::byte>>& parts, std::uint64_t at, std::span<const std::byte> buffer);

  const OpId id_;
  const FileOp op_;
  std::mutex mutex_;  // held while the operation's memory is touched
  bool abandoned_ = false;
};

}  // namespace flexkv::remote
