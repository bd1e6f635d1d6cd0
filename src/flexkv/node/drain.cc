// A node that is to end without a loss: it takes nothing more, and finishes what it has begun.

#include "flexkv/node/node_state.h"

namespace flexkv::node {

void Node::drain(Nanos now) {
  tell_time(now);
  draining_ = true;
  stop_scrub(now);
  flush_store(now);
}

Node::Undone Node::undone() const { return {jobs_.size(), loans_.size(), disk_queues().writes, store_queue(), lends_}; }

Node::Lookup Node::miss_by_drain(Sequence& sequence) {
  if (!std::exchange(sequence.counted, true)) {
    ++stats_.lookups;
    stats_.blocks_queried += sequence.keys.size();
    stats_.missed_blocks[slot_of(Reason::kDraining)] += sequence.keys.size();
  }
  return {0, Reason::kDraining, 0, 0};
}

}  // namespace flexkv::node
