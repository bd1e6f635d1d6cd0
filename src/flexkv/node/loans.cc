// Blocks that other nodes read from this one.

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: what is lent, and what precedes it, cannot be evicted.
constexpr std::uint64_t kLoanShare = 50;

}  // namespace

void Node::lend(LoanId id, const SpaceName& name, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys,
                std::uint32_t first, Nanos deadline, Nanos now) {
  tell_time(now);
  const auto [at, fresh] = loans_.emplace(id, std::make_unique<Lent>());
  FLEXKV_ASSERT(fresh);
  Lent& lent = *at->second;
  lent.deadline = deadline;
  loan_deadlines_.emplace(deadline, id);
  lent.first = lent.end = first;
  lent.limit = Loan::Limit::kMissing;
  if (!lends_) return answer(id, lent);
  const auto found = std::ranges::find_if(spaces_, [&](const auto& space) { return space->name == name; });
  if (found == spaces_.end() || (*found)->slots.slot_bytes() != slot_bytes) return answer(id, lent);
  Space& space = **found;
  const std::uint64_t most = options_.pool_bytes * kLoanShare / 100;
  const std::uint64_t room = (most - std::min(most, lent_bytes_)) / slot_bytes;
  std::uint32_t end = matching(space, keys);
  if (end == keys.size()) lent.limit = Loan::Limit::kNone;
  if (end > room) {
    end = static_cast<std::uint32_t>(room);
    lent.limit = Loan::Limit::kBusy;
  }
  if (end <= first) return answer(id, lent);
  lent.space = &space;
  lent.generation = space.generation;
  ++space.loans;
  lent.pin = space.index.match(keys.first(end), true, now_).pin;
  lent.end = lent.pinned = end;
  lent_bytes_ += lent.pinned * slot_bytes;
  lent.missing.resize(lent.count());
  std::vector<index::Slot> slots(lent.count());
  if (!slots.empty()) space.index.collect(lent.pin, kHostTier, first, slots);
  Path* path = nullptr;
  for (std::uint32_t i = 0; i < slots.size(); ++i) {
    if (slots[i] != index::kNoSlot) continue;
    // From a drive, behind what this node's own requests need.
    const key::BlockKey& key = keys[first + i];
    auto fetch = space.fetches.find(key);
    if (fetch == space.fetches.end()) {
      if (path == nullptr) path = hold(space, space.index.clone(lent.pin));
      add_fetch(space, path, first + i, key).prefetch = true;
      disk_->prefetches.emplace_back(space.number, key);
      fetch = space.fetches.find(key);
    }
    fetch->second.loans.push_back(id);
    lent.missing[i] = true;
    ++lent.missing_count;
  }
  if (path != nullptr) release(path);
  lent.missing_count == 0 ? answer(id, lent) : pump_disk();
}

// How many leading ones of `keys` are here. A stranger says them: each is compared, while match() takes it for granted
// that equal keys follow equal ones.
std::uint32_t Node::matching(Space& space, std::span<const key::BlockKey> keys) {
  auto match = space.index.match(keys, false, now_);
  std::vector<key::BlockKey> here(match.block_count);
  if (!here.empty()) space.index.collect_keys(match.pin, 0, here);
  drop_pin(space, match.pin);
  return static_cast<std::uint32_t>(std::ranges::mismatch(here, keys).in1 - here.begin());
}

void Node::end_loan(LoanId id, Nanos now) {
  tell_time(now);
  const auto found = loans_.find(id);
  if (found == loans_.end()) return;
  Lent& lent = *found->second;
  loan_deadlines_.erase({lent.deadline, id});
  if (lent.space != nullptr) {
    lent_bytes_ -= lent.pinned * lent.space->slots.slot_bytes();
    drop_pin(*lent.space, lent.pin);
    --lent.space->loans;
  }
  Space* const space = lent.space;
  loans_.erase(found);
  if (space != nullptr) give_back_damaged(*space);
  pump_disk();
}

// With what is there by now.
void Node::answer(LoanId id, Lent& lent) {
  lent.answered = true;
  loan_deadlines_.erase({lent.deadline, id});
  Loan loan{id, {}, lent.limit};
  if (lent.space != nullptr) {
    const Space& space = *lent.space;
    std::vector<index::Slot> slots(lent.count());
    if (!slots.empty()) space.index.collect(lent.pin, kHostTier, lent.first, slots);
    // What was reset is given to nobody.
    if (lent.generation != space.generation) slots.clear();
    const auto end = std::ranges::find(slots, index::kNoSlot);
    slots.erase(end, slots.end());
    for (const index::Slot slot : slots) {
      loan.host_offsets.push_back(space.slots.offset(slot));
      loan.sums.push_back(space.sums.of(slot));
    }
    lent.slots = std::move(slots);
    if (loan.host_offsets.size() < lent.count() && loan.limit == Loan::Limit::kNone) {
      loan.limit = Loan::Limit::kMissing;
    }
    shorten(lent, static_cast<std::uint32_t>(loan.host_offsets.size()));
  }
  ++stats_.loans;
  stats_.blocks_lent += loan.host_offsets.size();
  outbox_.lent(std::move(loan));
}

void Node::shorten(Lent& lent, std::uint32_t count) {
  lent.end = lent.first + count;
  lent.missing.resize(count);
  lent.missing_count = static_cast<std::uint32_t>(std::ranges::count(lent.missing, true));
}

bool Node::waits_for(LoanId id, const Fetch& fetch) const {
  const auto found = loans_.find(id);
  if (found == loans_.end() || found->second->answered) return false;
  const Lent& lent = *found->second;
  return fetch.at >= lent.first && fetch.at < lent.end && lent.missing[fetch.at - lent.first];
}

void Node::lend_arrived(const Fetch& fetch) {
  for (const LoanId id : fetch.loans) {
    if (!waits_for(id, fetch)) continue;
    Lent& lent = *loans_.at(id);
    lent.missing[fetch.at - lent.first] = false;
    if (--lent.missing_count == 0) answer(id, lent);
  }
}

// It does not come: what follows is of no use either.
void Node::lend_without(const Fetch& fetch, Reason reason) {
  for (const LoanId id : fetch.loans) {
    if (!waits_for(id, fetch)) continue;
    Lent& lent = *loans_.at(id);
    lent.limit = reason == Reason::kPoolFull ? Loan::Limit::kBusy : Loan::Limit::kMissing;
    shorten(lent, fetch.at - lent.first);
    if (lent.missing_count == 0) answer(id, lent);
  }
}

// For check_invariants().
std::uint32_t Node::loans_of(const Space& space) const {
  std::uint64_t bytes = 0;
  std::uint32_t count = 0;
  for (const auto& [id, lent] : loans_) {
    if (lent->space == nullptr) continue;
    bytes += lent->pinned * lent->space->slots.slot_bytes();
    count += lent->space == &space;
  }
  FLEXKV_ASSERT(bytes == lent_bytes_);
  return count;
}

}  // namespace flexkv::node
