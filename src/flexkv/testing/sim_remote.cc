#include "flexkv/testing/sim_remote.h"

#include <algorithm>

#include "flexkv/testing/sim_kv.h"

namespace flexkv::testing {
namespace {

constexpr std::size_t kChainsKept = 16;
constexpr std::uint32_t kWriteBlocks = 3;
constexpr Nanos kStall = 5 * kSecond;  // until a write that hangs is given up

}  // namespace

SimRemote::SimRemote(SimLoop& loop, const SimPlan& plan, SimElsewhere& elsewhere, Callbacks callbacks)
    : loop_(loop), plan_(plan), elsewhere_(elsewhere), callbacks_(std::move(callbacks)) {}

void SimRemote::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  SIM_CHECK(spaces_.emplace(space, Space{name, slot_bytes}).second);
}

void SimRemote::close_space(node::SpaceNumber space) {
  for (const auto& [op, read] : reads_) SIM_CHECK(read.asked.space != space);
  for (const auto& [op, write] : writes_) SIM_CHECK(write.asked.space != space);
  SIM_CHECK(spaces_.erase(space) == 1);
}

node::RemoteFound SimRemote::find(node::SpaceNumber number, std::span<const key::BlockKey> keys, std::uint32_t first,
                                  double /*block_nanos*/, Nanos) {
  SIM_CHECK(first < keys.size());
  const Space& space = spaces_.at(number);
  const Chain chain{space, {keys.begin(), keys.end()}};
  chains_.size() < kChainsKept ? chains_.push_back(chain)
                               : void(chains_[static_cast<std::size_t>(loop_.below(kChainsKept))] = chain);
  const auto& blocks = elsewhere_.spaces[space.name];
  node::RemoteFound found;
  while (first + found.blocks < keys.size() && blocks.contains(keys[first + found.blocks])) ++found.blocks;
  // Out of date, in either direction.
  const auto rest = static_cast<std::uint32_t>(keys.size()) - first;
  if (loop_.chance(plan_.remote_stale)) found.blocks = static_cast<std::uint32_t>(loop_.below(rest + 1));
  found.bytes_per_second = loop_.chance(500) ? 0 : static_cast<double>(loop_.between(1, 1 << 30));
  found.wait = loop_.delay(plan_.remote_time);
  return found;
}

void SimRemote::read(node::RemoteRead read) {
  const Space& space = spaces_.at(read.space);
  SIM_CHECK(read.first + read.host_offsets.size() == read.keys.size() && !read.host_offsets.empty());
  loop_.note("remote: read", read.op, read.first, read.host_offsets.size());
  Read& begun = reads_[read.op];
  for (const std::uint64_t offset : read.host_offsets) {
    begun.claims.push_back(callbacks_.claim(true, offset, space.slot_bytes));
  }
  const node::RemoteOp op = read.op;
  begun.asked = std::move(read);
  const auto later = [this, op, alive = alive_](Nanos time, auto action) {
    loop_.after(time, [this, op, alive, action] {
      if (*alive && reads_.contains(op)) action(this, op);
    });
  };
  const Nanos left = begun.asked.deadline - loop_.now();
  later(left, [](SimRemote* self, node::RemoteOp one) { self->end(one, node::RemoteOutcome::kDeadline); });
  if (!loop_.chance(plan_.remote_stalls)) {
    later(loop_.delay(plan_.remote_time), [](SimRemote* self, node::RemoteOp one) { self->go_on(one); });
  }
}

// The next block of it.
void SimRemote::go_on(node::RemoteOp op) {
  Read& read = reads_.at(op);
  const node::RemoteRead& asked = read.asked;
  if (read.canceled) return end(op, node::RemoteOutcome::kCanceled);
  if (read.came == asked.host_offsets.size()) return end(op, node::RemoteOutcome::kDone);
  const Space& space = spaces_.at(asked.space);
  const auto& blocks = elsewhere_.spaces[space.name];
  const auto found = blocks.find(asked.keys[asked.first + read.came]);
  const std::span<std::byte> host = callbacks_.pool(asked.host_offsets[read.came], space.slot_bytes);
  if (found == blocks.end()) return end(op, node::RemoteOutcome::kMissing);
  if (loop_.chance(plan_.remote_stalls)) {
    // In the middle of a block. It is given up after a while, and not when the read's time is over.
    for (std::size_t i = 0; i < host.size() / 2; ++i) host[i] = static_cast<std::byte>(loop_.below(256));
    loop_.after(loop_.delay(plan_.load_timeout), [this, op, alive = alive_] {
      if (*alive && reads_.contains(op)) end(op, node::RemoteOutcome::kDeadline);
    });
    return;
  }
  if (loop_.chance(plan_.remote_fails)) {
    for (auto& byte : host) byte = static_cast<std::byte>(loop_.below(256));
    constexpr node::RemoteOutcome kOutcomes[] = {node::RemoteOutcome::kBusy, node::RemoteOutcome::kUnreachable,
                                                 node::RemoteOutcome::kChecksum};
    return end(op, kOutcomes[loop_.below(std::size(kOutcomes))]);
  }
  std::ranges::copy(found->second, host.begin());
  callbacks_.release(read.claims[read.came]);
  const std::uint32_t index = read.came++;
  loop_.after(loop_.delay(plan_.remote_time), [this, op, alive = alive_] {
    if (*alive && reads_.contains(op)) go_on(op);
  });
  callbacks_.block(op, index);
}

void SimRemote::end(node::RemoteOp op, node::RemoteOutcome outcome) {
  const Read read = std::move(reads_.extract(op).mapped());
  loop_.note("remote: ended", op, read.came, static_cast<std::uint64_t>(outcome));
  for (std::size_t i = read.came; i < read.claims.size(); ++i) callbacks_.release(read.claims[i]);
  callbacks_.end(op, outcome);
}

void SimRemote::cancel(node::RemoteOp op) {
  SIM_CHECK(reads_.contains(op));
  reads_.at(op).canceled = loop_.chance(500);
}

void SimRemote::reset(node::ResetId) {
  loop_.note("remote: reset");
  elsewhere_.spaces.clear();
  ++elsewhere_.resets;
}

// ---- as a store ----------------------------------------------------------------------------------------------------

std::uint32_t SimRemote::write_blocks(node::SpaceNumber) const {
  return loop_.chance(plan_.store_off) ? 0 : kWriteBlocks;
}

bool SimRemote::has(node::SpaceNumber space, const key::BlockKey& key) const {
  return elsewhere_.spaces[spaces_.at(space).name].contains(key) != loop_.chance(plan_.remote_stale);
}

void SimRemote::write(node::StoreWrite write) {
  const Space& space = spaces_.at(write.space);
  SIM_CHECK(!write.keys.empty() && write.keys.size() <= kWriteBlocks && write.keys.size() == write.host_offsets.size());
  loop_.note("store: write", write.op, write.keys.size());
  const node::RemoteOp op = write.op;
  Write& begun = writes_[op];
  begun.resets = elsewhere_.resets;
  for (const std::uint64_t offset : write.host_offsets) {
    begun.claims.push_back(callbacks_.claim(false, offset, space.slot_bytes));
  }
  begun.asked = std::move(write);
  const bool stalls = loop_.chance(plan_.remote_stalls);
  loop_.after(stalls ? kStall : loop_.delay(plan_.remote_time), [this, op, stalls, alive = alive_] {
    if (*alive) end_write(op, stalls);
  });
}

void SimRemote::end_write(node::RemoteOp op, bool stalled) {
  const Write write = std::move(writes_.extract(op).mapped());
  const Space& space = spaces_.at(write.asked.space);
  const bool fails = stalled || loop_.chance(plan_.remote_fails);
  // One that failed may have brought some all the same.
  const std::size_t count = fails ? loop_.below(write.claims.size() + 1) : write.claims.size();
  bool right = true;
  for (std::size_t i = 0; i < write.claims.size(); ++i) {
    const auto bytes = callbacks_.pool(write.asked.host_offsets[i], space.slot_bytes);
    if (right && i < count && !check_sums(bytes, write.asked.sums[i])) {
      right = false;
      callbacks_.store_damaged(op, static_cast<std::uint32_t>(i));
    }
    if (right && i < count && write.resets == elsewhere_.resets) {
      elsewhere_.spaces[space.name][write.asked.keys[i]] = {bytes.begin(), bytes.end()};
    }
    callbacks_.release(write.claims[i]);
  }
  loop_.note("store: written", op, count, fails);
  callbacks_.written(op, !right    ? node::RemoteOutcome::kDamaged
                         : stalled ? node::RemoteOutcome::kDeadline
                         : fails   ? node::RemoteOutcome::kStoreFailed
                                   : node::RemoteOutcome::kDone);
}

// ---- as others who borrow ------------------------------------------------------------------------------------------

void SimRemote::borrow() {
  if (chains_.empty()) return;
  const node::LoanId id = next_loan_++;
  Borrow& wish = borrows_[id];
  wish.chain = chains_[static_cast<std::size_t>(loop_.below(chains_.size()))];
  wish.first = static_cast<std::uint32_t>(loop_.below(wish.chain.keys.size()));
  wish.resets = elsewhere_.resets;
  loop_.note("remote: borrows", id, wish.first, wish.chain.keys.size());
  const Chain chain = wish.chain;
  callbacks_.lend(id, chain.space.name, chain.space.slot_bytes, chain.keys, wish.first,
                  loop_.now() + loop_.delay(plan_.load_timeout));
}

void SimRemote::lent(const node::Loan& loan) {
  Borrow& borrow = borrows_.at(loan.id);
  loop_.note("remote: lent", loan.id, loan.host_offsets.size());
  SIM_CHECK(borrow.first + loan.host_offsets.size() <= borrow.chain.keys.size());
  for (const std::uint64_t offset : loan.host_offsets) {
    borrow.claims.push_back(callbacks_.claim(false, offset, borrow.chain.space.slot_bytes));
  }
  loop_.after(loop_.delay(plan_.remote_time), [this, loan, alive = alive_] {
    if (*alive) take(loan);
  });
}

void SimRemote::take(const node::Loan& loan) {
  const Borrow borrow = std::move(borrows_.extract(loan.id).mapped());
  const Space& space = borrow.chain.space;
  bool right = true;
  for (std::uint32_t i = 0; i < loan.host_offsets.size(); ++i) {
    const auto bytes = callbacks_.pool(loan.host_offsets[i], space.slot_bytes);
    if (right && !check_sums(bytes, loan.sums[i])) {
      right = false;
      callbacks_.damaged(loan.id, i);
    }
    if (right && borrow.resets == elsewhere_.resets) {
      elsewhere_.spaces[space.name][borrow.chain.keys[borrow.first + i]] = {bytes.begin(), bytes.end()};
    }
    callbacks_.release(borrow.claims[i]);
  }
  callbacks_.end_loan(loan.id);
}

}  // namespace flexkv::testing
