// Two drives that do what a test says.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "flexkv/node/disk_port.h"

namespace flexkv::node {

class FakeDrives : public DiskPort {
 public:
  unsigned drive_count() const override { return 2; }
  void open_space(SpaceNumber space, const SpaceName& name, std::uint64_t) override { spaces[space] = name; }
  void close_space(SpaceNumber space) override { spaces.erase(space); }
  void reset_space(SpaceNumber space) override { resets.push_back(space); }
  void reset_closed_spaces(const std::optional<ModelName>& model) override { closed_resets.push_back(model); }
  DiskAdmission write(const DiskTransfer& transfer) override { return take(writes, transfer); }
  DiskAdmission read(const DiskTransfer& transfer) override { return take(reads, transfer); }
  DiskAdmission verify(const DiskTransfer& transfer) override { return take(checks, transfer); }
  void cancel(DiskOp op) override { canceled.push_back(op); }
  bool can_read(unsigned drive) const override { return drive != off; }
  double write_pressure() const override { return pressure; }

  DiskAdmission take(std::vector<DiskTransfer>& list, const DiskTransfer& transfer) {
    if (admission == DiskAdmission::kQueued) list.push_back(transfer);
    return admission;
  }

  std::map<SpaceNumber, SpaceName> spaces;
  std::vector<SpaceNumber> resets;
  std::vector<std::optional<ModelName>> closed_resets;
  std::vector<DiskTransfer> writes;
  std::vector<DiskTransfer> reads;
  std::vector<DiskTransfer> checks;
  std::vector<DiskOp> canceled;
  DiskAdmission admission = DiskAdmission::kQueued;
  unsigned off = 99;
  double pressure = 0;
};

}  // namespace flexkv::node
