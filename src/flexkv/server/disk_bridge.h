// The node's drives: DiskPort over the SSD tier, in the terms of each.
//
// As a DiskPort it is called under the node's lock. What the tier says reaches the node through `Apply`, on the tier's
// threads. Owns the directories' locks, so that no other process uses them, and the tier.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/disk/tier.h"
#include "flexkv/file/open_drive.h"
#include "flexkv/node/node.h"
#include "flexkv/server/drive_budget.h"
#include "flexkv/server/resets_seen.h"

namespace flexkv::server {

struct DiskOptions {
  std::vector<std::string> directories;  // one per drive; empty: no SSD tier
  bool make_parents = false;             // those that are missing above a directory, too
  std::uint64_t bytes = 0;               // over all directories, never exceeded
  std::optional<disk::Secret> secret;    // of keys; none: that of the directories, or a new one
  bool strict = false;                   // a block counts as written when it is on stable storage
  bool direct = true;                    // false: through the page cache
  // Of each drive; several directories on one share it. Without a capacity it is the file system's size.
  admission::Endurance endurance{};
  std::function<Nanos()> now = monotonic_now;  // of the budgets
  using OpenDrive = std::function<Result<std::unique_ptr<file::Drive>>(const file::DriveOptions&, file::DriveSink&)>;
  OpenDrive open_drive = file::open_drive;
};

class DiskBridge final : public node::DiskPort, private disk::TierSink {
 public:
  // Runs a call on the node under its lock.
  using Apply = std::function<void(const std::function<void(node::Node&)>& call)>;

  // Fails when another process uses one of the directories. One that cannot be used at all only has no slots.
  // `pool`: where the blocks lie; stays mapped until close() has returned true. Blocks.
  static Result<std::unique_ptr<DiskBridge>> open(const DiskOptions& options, std::span<std::byte> pool, Apply apply);

  ~DiskBridge() override;

  // With it, and only with it, keys are those of the blocks that the directories hold.
  const disk::Secret& secret() const { return home_.secret; }
  // Of which resets all knows that was there at the start; none: nothing was.
  const std::optional<ResetsSeen>& resets_seen() const { return resets_seen_; }
  // The node has forgotten what is older: written down beside the blocks once that is durable, and not before. Under
  // the node's lock.
  void note_resets(const ResetsSeen& seen);
  // Begins with the first call of the node; apply is not called before that.
  // False: a drive hangs and may write to the pool for the rest of the process's life. The node is not told any more.
  bool close(Nanos patience);

  struct SpaceStatus {
    std::uint64_t recovered_blocks = 0;
    double seconds = 0;
    disk::Discarded discarded;
    std::vector<std::string> dropped_files;
  };
  struct DriveStatus {
    disk::VolumeStats volume;
    std::optional<DriveBudget::Status> budget;  // none: the directory cannot be used
  };
  struct Status {
    std::vector<DriveStatus> drives;
    double write_pressure = 0;
    std::vector<SpaceStatus> spaces;  // in the order in which they were opened
  };
  Status status() const;

  unsigned drive_count() const override { return tier_->drive_count(); }
  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  void reset_space(node::SpaceNumber space) override;
  void reset_closed_spaces(const std::optional<node::ModelName>& model) override;
  node::DiskAdmission write(const node::DiskTransfer& transfer) override;
  node::DiskAdmission read(const node::DiskTransfer& transfer) override;
  node::DiskAdmission verify(const node::DiskTransfer& transfer) override;
  void cancel(node::DiskOp op) override { tier_->cancel(op); }
  bool can_read(unsigned drive) const override { return readable_[drive].load(std::memory_order_relaxed); }
  double write_pressure() const override;

 private:
  DiskBridge(disk::Home home, std::span<std::byte> pool, Apply apply);
  void open_budgets(const DiskOptions& options);
  void read_resets();
  void tell_fresh_drives();
  void write_resets();

  void on_completions(std::span<const disk::Completion> completions) override;
  void on_overdue(disk::OpId id) override;
  void on_recovered(disk::SpaceHandle space, std::span<const disk::Chain> chains) override;
  void on_opened(disk::SpaceHandle space, const disk::Opened& opened) override;
  void on_health(unsigned drive, const disk::Health& health) override;

  std::span<std::byte> host(const node::DiskTransfer& transfer) const;

  disk::Home home_;                        // unchanged once it is open
  std::optional<ResetsSeen> resets_seen_;  // the same
  const std::span<std::byte> pool_;
  const Apply apply_;
  std::vector<std::atomic<bool>> readable_;
  std::vector<std::shared_ptr<DriveBudget>> budgets_;      // one per drive; null: it cannot be used
  std::map<node::SpaceNumber, std::uint64_t> slot_bytes_;  // of open spaces; guarded by the node's lock
  mutable std::mutex mutex_;
  // Guarded by mutex_
  std::vector<SpaceStatus> opened_;
  std::size_t resetting_ = 0;        // spaces whose reset is not durable yet
  bool reset_failed_ = false;        // one could not be written down
  std::optional<ResetsSeen> noted_;  // waits for these
  std::unique_ptr<disk::DiskTier> tier_;
  bool closed_ = false;
};

}  // namespace flexkv::server
