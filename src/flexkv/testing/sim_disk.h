// Drives in the simulated world, as the node sees them: what was written outlives the node, transfers take time,
// overtake each other and fail, and drives go off. The bytes and claims of the pool are the SimNode's. Owned by one
// thread.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "flexkv/node/disk_port.h"
#include "flexkv/testing/sim_plan.h"

namespace flexkv::testing {

// What lies on the drives, for as long as the world.
struct SimStore {
  struct Block {
    key::BlockKey key;
    key::BlockKey parent;
    std::uint64_t sequence = 0;
    std::vector<std::byte> bytes;
    bool torn = false;  // the node died while it was written
  };
  std::map<node::SpaceName, std::map<index::Slot, Block>> spaces;
  std::uint64_t next_sequence = 1;
};

class SimDisk final : public node::DiskPort {
 public:
  struct Callbacks {
    std::function<void(node::SpaceNumber, std::span<const node::RecoveredChain>)> recovered;
    std::function<void(node::SpaceNumber, std::span<const std::uint32_t>)> opened;
    std::function<void(const node::DiskResult&)> done;
    std::function<void(node::DiskOp)> overdue;
    std::function<void()> ready;
    // Of the pool, from begin() to end() of a transfer.
    std::function<std::span<std::byte>(std::uint64_t offset, std::uint64_t bytes)> pool;
    std::function<void(node::DiskOp, bool writes_host, std::uint64_t offset, std::uint64_t bytes)> claim;
    std::function<void(node::DiskOp)> release;
  };
  SimDisk(SimLoop& loop, const SimPlan& plan, SimStore& store, Callbacks callbacks);
  // The node dies: writes under way are lost, done or torn.
  ~SimDisk() override;

  unsigned drive_count() const override { return plan_.drives; }
  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  void reset_space(node::SpaceNumber space) override;
  void reset_closed_spaces(const std::optional<node::ModelName>& model) override;
  node::DiskAdmission write(const node::DiskTransfer& transfer) override;
  node::DiskAdmission read(const node::DiskTransfer& transfer) override;
  node::DiskAdmission verify(const node::DiskTransfer& transfer) override;
  void cancel(node::DiskOp op) override;
  bool can_read(unsigned drive) const override { return !off_.contains(drive); }
  double write_pressure() const override { return plan_.disk_pressure; }

  // A drive goes off, or serves again.
  void flip(unsigned drive);
  // A block somewhere goes bad.
  void rot();
  // From now on drives serve, and nothing fails but what is bad.
  void calm();
  // Bad blocks that were found so far by verify().
  std::uint64_t bad_found() const { return bad_found_; }
  bool idle() const { return flights_.empty(); }

 private:
  struct Space {
    node::SpaceName name{};
    std::uint64_t slot_bytes = 0;
    std::uint64_t resets = 0;
    bool opened = false;
  };
  enum class Kind : std::uint8_t { kRead, kWrite, kVerify };
  struct Flight {
    node::DiskTransfer transfer;
    std::uint64_t resets = 0;  // of its space when it began
    Kind kind = Kind::kRead;
    bool canceled = false;
  };

  // With block_times: what it does, and what waits for it: reads, writes, blocks to be verified.
  struct Line {
    bool busy = false;
    std::array<std::deque<node::DiskOp>, 3> waiting;
  };

  node::DiskAdmission begin(const node::DiskTransfer& transfer, Kind kind);
  void serve(unsigned drive);
  void end(node::DiskOp op);
  node::DiskOutcome carry_out(const Flight& flight);
  node::DiskOutcome carry_out_verify(const Flight& flight);
  void put(const Flight& flight, bool torn);
  void scan(node::SpaceNumber number);

  SimLoop& loop_;
  const SimPlan& plan_;
  SimStore& store_;
  const Callbacks callbacks_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::map<node::SpaceNumber, Space> spaces_;
  std::map<node::DiskOp, Flight> flights_;
  std::set<unsigned> off_;
  std::map<unsigned, Line> lines_;
  bool calm_ = false;
  std::uint64_t bad_found_ = 0;
};

}  // namespace flexkv::testing
