// The SSD tier of a node: blocks in numbered slots of spaces (one per model and layout), striped over directories, each
// on a drive of its own. What was written is found again after any stop, and nothing else is ever served: a read is
// done only if the bytes are those that were written under its key since the space's last reset.
//
// Who calls owns the slots. REQUIRES: no write of a slot while another transfer of it is under way. (Otherwise either
// may fail, or the block be lost; the bytes of a read that is done are right all the same.)
//
// Thread-safe; nothing blocks, but for the constructor, register_memory() and close(). May be called under the caller's
// locks: the sink is called from other threads, with no lock held. Health is for people: a drive that takes no writes
// is tried again by write() itself.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "flexkv/disk/opening.h"
#include "flexkv/disk/types.h"
#include "flexkv/disk/volume.h"
#include "flexkv/disk/workers.h"

namespace flexkv::disk {

using MakeWorkers =
    std::function<std::unique_ptr<Workers>(const std::string& name, unsigned threads, std::size_t jobs_max)>;
std::unique_ptr<Workers> make_thread_workers(const std::string& name, unsigned threads, std::size_t jobs_max);

class DiskTier {
 public:
  // A directory that cannot be used is not an error: on_health() says so, and its drive has no slots.
  // REQUIRES: at least one volume
  DiskTier(TierOptions options, std::span<const VolumeSpec> volumes, TierSink& sink,
           const MakeWorkers& make_workers = make_thread_workers);
  ~DiskTier();  // closes with a patience of 0 if that was not done

  unsigned drive_count() const { return static_cast<unsigned>(volumes_.size()); }

  // on_recovered() any number of times, then on_opened(). REQUIRES: the handle was never used; slot_bytes is a multiple
  // of 4 KiB. A space that is open under another handle gets no slots.
  void open_space(SpaceHandle space, const SpaceId& id, std::uint64_t slot_bytes);
  // What is there stays. A call of on_recovered() or on_opened() for it may be under way still. REQUIRES: no transfer
  // of it is under way
  void close_space(SpaceHandle space);
  // All that was written before is not served any more, from this call on; nor after a restart, once `then` was called
  // with true (false: a drive could not write it down yet, and will try again).
  void reset_space(SpaceHandle space, std::function<void(bool durable)> then = {});

  // Removes what lies there of spaces that are not open and whose ids begin with these bytes.
  void remove_closed(std::span<const std::uint8_t> id_prefix);
  // Runs it on a thread of the drive's own, which it may block, once that is done there, as far as it was asked for.
  // Never if something could not be removed, or the drive is off. What it captured may live on when the drive hangs.
  void when_removed(unsigned drive, Job then) { volumes_.at(drive)->when_removed(std::move(then)); }

  // Before on_opened() and after close_space(): kUnavailable. REQUIRES: the slot is below Opened::slots of its drive.
  Admission write(const WriteOp& op);
  // After close_space(): kUnavailable. REQUIRES: the same; before on_opened(), that on_recovered() told of the slot.
  Admission read(const ReadOp& op);
  // Asks. The completion comes in any case.
  void cancel(OpId id);

  std::uint32_t queue_depth(unsigned drive) const { return volumes_.at(drive)->queued(); }
  std::vector<VolumeStats> stats() const;
  // Memory that transfers will use; before the first of them.
  void register_memory(std::span<std::byte> memory);

  // Waits at most `patience` for transfers under way, and a second or two for each drive that hangs; what waits is
  // canceled, calls to a file system that hang are left behind. The sink is not called afterwards. False: a drive
  // hangs, and may write to buffers of reads for the rest of the process's life: they must stay mapped.
  bool close(Nanos patience);

 private:
  struct Space {
    Space(const SpaceId& id, std::uint64_t slot_bytes) : codec(id, slot_bytes) {}
    const SpaceCodec codec;
    std::shared_ptr<Opening> opening;  // null: open
    bool closing = false;              // once it is open
    bool reset = false;
    std::vector<std::function<void(bool)>> reset_waiting;  // once it is open
    std::uint64_t epoch = 0;
    std::uint64_t sequence = 0;  // of the last write
  };

  void opened(SpaceHandle space, Opening::Result result);
  void close_volumes(SpaceHandle space);
  void reset_volumes(SpaceHandle space, Space& entry);

  const TierOptions options_;
  TierSink& sink_;
  std::unique_ptr<Workers> checksums_;
  std::vector<std::shared_ptr<Volume>> volumes_;
  bool closed_ = false;

  std::mutex mutex_;
  std::map<SpaceHandle, Space> spaces_;
};

}  // namespace flexkv::disk
