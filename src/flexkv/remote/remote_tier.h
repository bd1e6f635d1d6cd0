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
  // Not while it is left alone because writes failed or hung.
  bool takes_writes() const { return engine_.takes_writes(); }
  // So many blocks make an object.
  std::uint64_t object_blocks(std::uint64_t slot_bytes) const { return engine_.object_blocks(slot_bytes); }
  // REQUIRES: problem_of(request) is empty. False (Outcome::kBusy): too many requests wait, and nothing will come.
  [[nodiscard]] bool read(ReadRequest request);
  [[nodiscard]] bool write(WriteRequest request);
  // From now on RemoteSink::on_marks tells of the marks in the store.
  void watch_marks();
  // It is put there, however often that has to be tried. REQUIRES: watch_marks()
  void put_mark(const Mark& mark);
  // Runs it on the lane, soon; not after the destructor has begun.
  void post(std::function<void()> call);
  // It ends soon, also if it has just ended otherwise.
  void cancel(RequestId id);
  // As if its deadline were now: that speaks against the store.
  void give_up(RequestId id);
  RemoteStats stats() const;

 private:
  using Command = std::function<void(Nanos now)>;

  void on_block(RequestId id, std::uint32_t index) override;
  void on_end(RequestId id, Outcome outcome) override;
  void on_written(RequestId id, Outcome outcome) override;
  void on_marks(const std::set<Mark>& marks) override { sink_.on_marks(marks); }
  void on_no_marks() override { sink_.on_no_marks(); }

  bool admit(RequestId id, std::uint64_t& refused, Command command);
  void order(Command command);
  void end_early(RequestId id, Command command);
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
