// A node and what lies beyond its machine, in the hands of a test.
#pragma once

#include <map>
#include <set>

#include "flexkv/node/node_fixture.h"

namespace flexkv::node {

struct KeyLess {
  bool operator()(const key::BlockKey& a, const key::BlockKey& b) const {
    return std::pair(a.high, a.low) < std::pair(b.high, b.low);
  }
};

// Has what the test says, and brings it when the test says so.
class FakeRemote : public RemotePort {
 public:
  void open_space(SpaceNumber space, const SpaceName& name, std::uint64_t bytes) override {
    spaces[space] = name;
    slot_bytes = bytes;
  }
  void close_space(SpaceNumber space) override { spaces.erase(space); }
  RemoteFound find(SpaceNumber, std::span<const key::BlockKey> keys, std::uint32_t first, double block_nanos,
                   Nanos) override {
    block_worth = block_nanos;
    RemoteFound found{0, bytes_per_second, wait};
    while (first + found.blocks < keys.size() && stored.contains(keys[first + found.blocks])) ++found.blocks;
    return found;
  }
  void read(RemoteRead read) override { reads.emplace_back(std::move(read)); }
  void cancel(RemoteOp op) override { canceled.insert(op); }
  void reset(ResetId) override { stored.clear(); }
  std::optional<Nanos> next_time() const override { return time; }
  void on_time(Nanos now) override {
    if (time && *time <= now) time.reset();
  }

  std::map<SpaceNumber, SpaceName> spaces;
  std::uint64_t slot_bytes = 0;
  std::set<key::BlockKey, KeyLess> stored;
  double bytes_per_second = 0;
  Nanos wait = 0;
  double block_worth = 0;  // as it was told last
  std::vector<RemoteRead> reads;
  std::set<RemoteOp> canceled;
  std::optional<Nanos> time;
};

class NodeImportTest : public NodeTest {
 protected:
  NodeImportTest() { beyond = &remote; }

  void store(const Keys& keys) { remote.stored.insert(keys.begin(), keys.end()); }
  // Of the oldest read that is under way: so many blocks, and the end.
  void bring(std::uint32_t blocks, RemoteOutcome outcome = RemoteOutcome::kDone) {
    const RemoteRead read = remote.reads.front();
    remote.reads.erase(remote.reads.begin());
    for (std::uint32_t i = 0; i < blocks; ++i) {
      node->on_remote_block(read.op, i, now);
      node->check_invariants();
    }
    node->on_remote_end(read.op, outcome, now);
    node->check_invariants();
  }
  void lent(Loan loan) override { loans[loan.id] = std::move(loan); }
  const Loan& lend(LoanId id, const Keys& keys, std::uint32_t first = 0) {
    node->lend(id, remote.spaces.begin()->second, remote.slot_bytes, keys, first, now + kSecond, now);
    node->check_invariants();
    return loans[id];
  }

  FakeRemote remote;
  std::map<LoanId, Loan> loans;
};

}  // namespace flexkv::node
