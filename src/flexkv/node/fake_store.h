// A store that has what a test says, and has written it when the test says so.
#pragma once

#include <set>
#include <vector>

#include "flexkv/node/import_fixture.h"
#include "flexkv/node/store_port.h"

namespace flexkv::node {

class FakeStore : public StorePort {
 public:
  std::uint32_t write_blocks(SpaceNumber) const override { return group; }
  bool has(SpaceNumber, const key::BlockKey& key) const override { return stored.contains(key); }
  void write(StoreWrite write) override { writes.push_back(std::move(write)); }

  std::uint32_t group = 4;  // 0: it takes nothing
  std::set<key::BlockKey, KeyLess> stored;
  std::vector<StoreWrite> writes;
};

// A node with such a store.
class NodeWithStoreTest : public NodeImportTest {
 protected:
  NodeWithStoreTest() { storage = &shared; }

  void pass(Nanos time) {
    now += time;
    node->on_time(now);
    node->check_invariants();
  }
  // The oldest write.
  void end_write(RemoteOutcome outcome = RemoteOutcome::kDone) {
    const StoreWrite write = shared.writes.front();
    shared.writes.erase(shared.writes.begin());
    if (outcome == RemoteOutcome::kDone) shared.stored.insert(write.keys.begin(), write.keys.end());
    node->on_store_written(write.op, outcome, now);
    node->check_invariants();
  }
  static Keys part(const Keys& keys, std::size_t begin, std::size_t end) {
    return {keys.begin() + static_cast<std::ptrdiff_t>(begin), keys.begin() + static_cast<std::ptrdiff_t>(end)};
  }

  FakeStore shared;
};

}  // namespace flexkv::node
