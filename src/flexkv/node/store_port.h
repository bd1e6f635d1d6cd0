// The node's view of a store beyond its machine that keeps blocks for all who share it. The node says which of its
// blocks are worth keeping there; whoever implements this moves the bytes. What is kept is read through a RemotePort.
#pragma once

#include <cstdint>
#include <vector>

#include "flexkv/node/remote_port.h"

namespace flexkv::node {

// Blocks of a chain, in its order.
struct StoreWrite {
  RemoteOp op = 0;  // never used twice
  SpaceNumber space = 0;
  key::BlockKey parent;  // of the first one; zero: it begins a chain
  std::vector<key::BlockKey> keys;
  std::vector<std::uint64_t> host_offsets;  // of slot_bytes each in the pool; they do not change until on_store_written
  // What must be in each, or nothing from there on is written; see Node::on_store_damaged.
  std::vector<std::vector<SummedExtent>> sums;
  Nanos deadline = 0;  // by which it has ended
};

// Called under the node's lock; must not call back and must not block.
class StorePort {
 public:
  virtual ~StorePort() = default;
  // How many blocks of the space make a write of the best size; 0: it takes none for now.
  virtual std::uint32_t write_blocks(SpaceNumber space) const = 0;
  // Whether the store has the block, as far as is known. From memory.
  virtual bool has(SpaceNumber space, const key::BlockKey& key) const = 0;
  // Node::on_store_written follows, once.
  virtual void write(StoreWrite write) = 0;
};

}  // namespace flexkv::node
