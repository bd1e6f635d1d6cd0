// Blocks in host memory that are not what the device held when they were saved (docs/decisions/0028).

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {

// For a block that the caller fills.
index::Slot Node::take_slot(Space& space) {
  const index::Slot slot = space.slots.take();
  space.sums.forget(slot);
  return slot;
}

// What a rank says of its slice of a save.
void Node::note_sums(JobKey key, const Job& job, std::uint32_t number, std::span<const std::uint64_t> sums) {
  const Engine& engine = *find_engine(key.first);
  const auto [begin, end] = save_slice(key, job, engine, number);
  // A job whose engine has other ranks by now publishes nothing.
  if (job.failed || engine.space != job.space || sums.size() > end - begin) return;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] != kNoSum) job.space->sums.set(job.slots[begin + i], engine.ranks[number].shard_place, sums[i]);
  }
}

// `host`: where the block lay that was found to be damaged.
void Node::drop_damaged(Space& space, index::PinId pin, std::uint32_t at, index::Slot host) {
  index::Slot current = index::kNoSlot;
  space.index.collect(pin, kHostTier, at, {&current, 1});
  if (current != host) return;  // gone already
  space.index.drop(pin, kHostTier, at, index::MissReason::kDamaged);
  space.damaged.push_back({host, now_});
  ++space.drops;
  ++stats_.blocks_damaged;
}

// Slots of damaged blocks are free once nobody who was told of them can still read them.
void Node::give_back_damaged(Space& space) {
  const auto may_be_read = [&](const Space::Damaged& damaged) {
    const auto began_before = [&](const auto& job) {
      return job.second->space == &space && job.second->started_at <= damaged.found_at;
    };
    const auto lent = [&](const auto& loan) {
      return loan.second->space == &space &&
             std::ranges::find(loan.second->slots, damaged.slot) != loan.second->slots.end();
    };
    const auto written = [&](const auto& io) {
      return io.second.space == &space && io.second.kind == DiskIo::Kind::kWrite && io.second.host == damaged.slot;
    };
    const auto stored = [&](const auto& write) {
      const auto& slots = write.second.slots;
      return write.second.space == &space && std::ranges::find(slots, damaged.slot) != slots.end();
    };
    if (store_ != nullptr && std::ranges::any_of(store_->writes, stored)) return true;
    return std::ranges::any_of(jobs_, began_before) || std::ranges::any_of(loans_, lent) ||
           (disk_ != nullptr && std::ranges::any_of(disk_->ios, written));
  };
  std::erase_if(space.damaged, [&](const Space::Damaged& damaged) {
    if (may_be_read(damaged)) return false;
    space.slots.give_back(damaged.slot);
    return true;
  });
}

void Node::on_loan_damaged(LoanId id, std::uint32_t index, Nanos now) {
  tell_time(now);
  const auto found = loans_.find(id);
  if (found == loans_.end()) return;
  const Lent& lent = *found->second;
  if (lent.space == nullptr || lent.generation != lent.space->generation || index >= lent.slots.size()) return;
  drop_damaged(*lent.space, lent.pin, lent.first + index, lent.slots[index]);
}

}  // namespace flexkv::node
