// Objects as files below a directory, of a shared file system as a rule. Each is written under another name and
// renamed.
//
// A few threads do the I/O, through buffers of their own: file systems of the network can hang for as long as they
// like, so a thread touches a caller's memory only for a moment in which the operation cannot be abandoned. The
// destructor leaves threads that hang behind; they hold nothing of the caller's.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "flexkv/remote/store.h"

namespace flexkv::remote {

class FileJob;

class FileStore final : public Store {
 public:
  // `directory` has to exist when it is used; nothing is made where a file system is not mounted.
  FileStore(std::string directory, unsigned threads);
  ~FileStore() override;

  unsigned width() const override { return static_cast<unsigned>(threads_.size()); }
  void begin(OpId id, PutOp op) override;
  void begin(OpId id, GetOp op) override;
  void begin(OpId id, ListOp op) override;
  void abandon(OpId id) override;
  void wait(std::optional<Nanos> until, std::vector<Ended>& ended) override;
  void wake() override;

 private:
  struct Shared;

  void post(std::shared_ptr<FileJob> job);

  const std::shared_ptr<Shared> shared_;  // with the threads
  std::unordered_map<OpId, std::shared_ptr<FileJob>> jobs_;
  std::vector<std::thread> threads_;
};

}  // namespace flexkv::remote
