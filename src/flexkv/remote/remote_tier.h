// The remote tier of a node: blocks in a shared file system or an object store. A lane of its own drives the engine and
// its store. Thread-safe.
//
// Every request that is taken ends once, by its deadline, whatever the store does; no call blocks. The destructor ends
// those that are left with kCanceled.
#pragma once

#include <functional>
#include <memory>
#include <thread>
#include <unordered_set>
#include <vector>

#include "flexkv/base/mutex.h"
#include "flexkv/remote/engine.h"

namespace flexkv::remote {

struct TierOptions {
  EngineOptions engine;
  std::size_t requests_max = 1024;  // that have not ended
};

class RemoteTier final : private RemoteSink {
 public:
  // `sink` outlives the tier; it may be called before this returns.
  RemoteTier(const TierOptions& options, std::unique_ptr<Store> store, RemoteSink& sink);
  ~RemoteTier() override;
  RemoteTier(const RemoteTier&) = delete;
  RemoteTier& operator=(const RemoteTier&) = delete;

  // Blocks of a space are found once it is open and the store has been looked through, those written at once.
  void open_space(const SpaceName& space, std::uint64_t slot_bytes);
  void close_space(const SpaceName& space);
  // How many leading ones of `keys` can be read, as far as is known. Never asks the store.
  std::size_t contains(const SpaceName& space, std::span<const key::BlockKey> keys) const;
  // REQUIRES: problem_of(request) is empty. False (Outcome::kBusy): too many requests wait, and nothing will come.
  [[nodiscard]] bool read(ReadRequest request);
  [[nodiscard]] bool write(WriteRequest request);
  // It ends soon, also if it has just ended otherwise.
  void cancel(RequestId id);
  RemoteStats stats() const;

 private:
  using Command = std::function<void(Nanos now)>;

  void on_block(RequestId id, std::uint32_t index) override;
  void on_end(RequestId id, Outcome outcome) override;
  void on_written(RequestId id, Outcome outcome) override;

  bool admit(RequestId id, std::uint64_t& refused, Command command);
  void post(Command command);
  void forget(RequestId id);
  void run();

  const std::size_t requests_max_;
  RemoteSink& sink_;
  const std::unique_ptr<Store> store_;
  Engine engine_;

  mutable Mutex mutex_;
  std::vector<Command> commands_ FLEXKV_GUARDED_BY(mutex_);
  std::unordered_set<RequestId> open_ FLEXKV_GUARDED_BY(mutex_);  // that have not ended, and are not canceled
  std::size_t requests_ FLEXKV_GUARDED_BY(mutex_) = 0;            // that have not ended
  std::uint64_t reads_refused_ FLEXKV_GUARDED_BY(mutex_) = 0;
  std::uint64_t writes_refused_ FLEXKV_GUARDED_BY(mutex_) = 0;
  bool stop_ FLEXKV_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace flexkv::remote
