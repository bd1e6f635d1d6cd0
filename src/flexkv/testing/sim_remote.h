// What lies beyond the machine in the simulated world: blocks that others have, because they borrowed them from this
// node or its predecessors, and those that these have stored there. They come late, in part, wrong or not at all, and
// what is said of them may be out of date; a store may be off, fail, hang, or do what it then says that it did not do.
// The bytes and claims of the pool are the SimNode's. Owned by one thread.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "flexkv/node/store_port.h"
#include "flexkv/testing/sim_plan.h"

namespace flexkv::testing {

// What others have, for as long as the world.
struct SimElsewhere {
  struct KeyLess {
    bool operator()(const key::BlockKey& a, const key::BlockKey& b) const {
      return std::pair(a.high, a.low) < std::pair(b.high, b.low);
    }
  };
  std::map<node::SpaceName, std::map<key::BlockKey, std::vector<std::byte>, KeyLess>> spaces;
  std::uint64_t resets = 0;
};

class SimRemote final : public node::RemotePort, public node::StorePort {
 public:
  struct Callbacks {
    std::function<void(node::RemoteOp, std::uint32_t index)> block;
    std::function<void(node::RemoteOp, node::RemoteOutcome)> end;
    std::function<void(node::LoanId, const node::SpaceName&, std::uint64_t slot_bytes, std::span<const key::BlockKey>,
                       std::uint32_t first, Nanos deadline)>
        lend;
    std::function<void(node::LoanId, std::uint32_t index)> damaged;
    std::function<void(node::LoanId)> end_loan;
    std::function<void(node::RemoteOp, std::uint32_t index)> store_damaged;
    std::function<void(node::RemoteOp, node::RemoteOutcome)> written;
    // Of the pool, from claim() to release().
    std::function<std::span<std::byte>(std::uint64_t offset, std::uint64_t bytes)> pool;
    std::function<std::uint64_t(bool writes_host, std::uint64_t offset, std::uint64_t bytes)> claim;
    std::function<void(std::uint64_t claim)> release;
  };
  SimRemote(SimLoop& loop, const SimPlan& plan, SimElsewhere& elsewhere, Callbacks callbacks);
  // The node dies.
  ~SimRemote() override { *alive_ = false; }

  void open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) override;
  void close_space(node::SpaceNumber space) override;
  node::RemoteFound find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                         double block_nanos, Nanos now) override;
  void read(node::RemoteRead read) override;
  void cancel(node::RemoteOp op) override;
  void reset(node::ResetId) override;
  std::uint32_t write_blocks(node::SpaceNumber space) const override;
  bool has(node::SpaceNumber space, const key::BlockKey& key) const override;
  void write(node::StoreWrite write) override;
  // The answer to Callbacks::lend.
  void lent(const node::Loan& loan);

  // Somebody reads from this node, if anybody has asked for anything yet.
  void borrow();
  bool idle() const { return reads_.empty() && borrows_.empty() && writes_.empty(); }

 private:
  struct Space {
    node::SpaceName name{};
    std::uint64_t slot_bytes = 0;
  };
  struct Read {
    node::RemoteRead asked;
    std::vector<std::uint64_t> claims;
    std::uint32_t came = 0;
    bool canceled = false;
  };
  struct Chain {
    Space space;
    std::vector<key::BlockKey> keys;
  };
  struct Borrow {
    Chain chain;
    std::uint32_t first = 0;
    std::uint64_t resets = 0;
    std::vector<std::uint64_t> claims;
  };
  struct Write {
    node::StoreWrite asked;
    std::uint64_t resets = 0;
    std::vector<std::uint64_t> claims;
  };
  void end_write(node::RemoteOp op, bool stalled);
  void go_on(node::RemoteOp op);
  void end(node::RemoteOp op, node::RemoteOutcome outcome);
  void take(const node::Loan& loan);

  SimLoop& loop_;
  const SimPlan& plan_;
  SimElsewhere& elsewhere_;
  const Callbacks callbacks_;
  const std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::map<node::SpaceNumber, Space> spaces_;
  std::map<node::RemoteOp, Read> reads_;
  std::map<node::RemoteOp, Write> writes_;
  std::map<node::LoanId, Borrow> borrows_;
  std::vector<Chain> chains_;  // that were asked for lately
  node::LoanId next_loan_ = 1;
};

}  // namespace flexkv::testing
