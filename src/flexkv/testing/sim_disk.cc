#include "flexkv/testing/sim_disk.h"

#include <algorithm>

#include "flexkv/testing/sim_kv.h"

namespace flexkv::testing {
namespace {

struct KeyLess {
  bool operator()(const key::BlockKey& a, const key::BlockKey& b) const {
    return std::pair(a.high, a.low) < std::pair(b.high, b.low);
  }
};

}  // namespace

SimDisk::SimDisk(SimLoop& loop, const SimPlan& plan, SimStore& store, Callbacks callbacks)
    : loop_(loop), plan_(plan), store_(store), callbacks_(std::move(callbacks)) {}

SimDisk::~SimDisk() {
  *alive_ = false;
  for (const auto& [op, flight] : flights_) {
    if (flight.kind == Kind::kWrite && loop_.chance(700)) put(flight, loop_.chance(500));
  }
}

// ---- spaces --------------------------------------------------------------------------------------------------------

void SimDisk::open_space(node::SpaceNumber number, const node::SpaceName& name, std::uint64_t slot_bytes) {
  for (const auto& [other, space] : spaces_) SIM_CHECK(space.name != name);
  SIM_CHECK(spaces_.emplace(number, Space{name, slot_bytes, 0, false}).second);
  loop_.after(loop_.delay(plan_.open_time), [this, number, alive = alive_] {
    if (*alive) scan(number);
  });
}

void SimDisk::scan(node::SpaceNumber number) {
  Space& space = spaces_.at(number);
  auto& blocks = store_.spaces[space.name];
  // The newest of each key; parents first.
  std::map<std::uint64_t, index::Slot> by_sequence;
  for (const auto& [slot, block] : blocks) by_sequence.emplace(block.sequence, slot);
  std::map<key::BlockKey, index::Slot, KeyLess> newest;
  for (const auto& [sequence, slot] : by_sequence) newest[blocks.at(slot).key] = slot;
  std::set<key::BlockKey, KeyLess> told;
  std::vector<node::RecoveredChain> chains;
  std::vector<std::pair<key::BlockKey, index::Slot>> found;
  for (bool more = true; more;) {
    more = false;
    for (const auto& [key, slot] : newest) {
      const key::BlockKey& parent = blocks.at(slot).parent;
      if (told.contains(key) || (parent != key::BlockKey{} && !told.contains(parent))) continue;
      told.insert(key);
      found.emplace_back(key, slot);
      more = true;
    }
  }
  for (const auto& [key, slot] : found) chains.push_back({blocks.at(slot).parent, {&key, 1}, {&slot, 1}});
  std::erase_if(blocks, [&](const auto& entry) { return newest.at(entry.second.key) != entry.first; });
  loop_.note("disk: recovered", number, found.size());
  callbacks_.recovered(number, chains);
  std::vector<std::uint32_t> slots(plan_.drives);
  for (auto& count : slots) count = plan_.drive_slots;
  if (loop_.chance(plan_.disk_fails)) slots[loop_.below(slots.size())] = 0;
  // Between the two, blocks are looked up and read.
  loop_.after(loop_.delay(plan_.disk_time), [this, number, slots, alive = alive_] {
    if (!*alive) return;
    spaces_.at(number).opened = true;
    callbacks_.opened(number, slots);
  });
}

void SimDisk::close_space(node::SpaceNumber number) {
  SIM_CHECK(spaces_.at(number).opened);
  for (const auto& [op, flight] : flights_) SIM_CHECK(flight.transfer.space != number);
  spaces_.erase(number);
}

void SimDisk::reset_space(node::SpaceNumber number) {
  Space& space = spaces_.at(number);
  ++space.resets;
  store_.spaces.erase(space.name);
}

void SimDisk::reset_closed_spaces(const std::optional<node::ModelName>& model) {
  std::erase_if(store_.spaces, [&](const auto& entry) {
    if (model && !std::equal(model->begin(), model->end(), entry.first.begin())) return false;
    return std::ranges::none_of(spaces_, [&](const auto& open) { return open.second.name == entry.first; });
  });
}

// ---- transfers -----------------------------------------------------------------------------------------------------

void SimDisk::flip(unsigned drive) {
  loop_.note("disk: flips", drive);
  if (off_.erase(drive) > 0) return;
  off_.insert(drive);
  std::vector<node::DiskOp> reads;
  for (const auto& [op, flight] : flights_) {
    if (flight.kind != Kind::kWrite && flight.transfer.slot % plan_.drives == drive) reads.push_back(op);
  }
  for (const node::DiskOp op : reads) callbacks_.overdue(op);
}

node::DiskAdmission SimDisk::write(const node::DiskTransfer& transfer) {
  if (loop_.chance(plan_.disk_bad_slot)) return node::DiskAdmission::kBadSlot;
  if (loop_.chance(plan_.disk_budget)) return node::DiskAdmission::kBudget;
  if (loop_.chance(plan_.disk_budget)) {
    loop_.after(loop_.delay(plan_.disk_time), [this, alive = alive_] {
      if (*alive) callbacks_.ready();
    });
    return node::DiskAdmission::kLater;
  }
  return begin(transfer, Kind::kWrite);
}

node::DiskAdmission SimDisk::read(const node::DiskTransfer& transfer) { return begin(transfer, Kind::kRead); }
node::DiskAdmission SimDisk::verify(const node::DiskTransfer& transfer) { return begin(transfer, Kind::kVerify); }

node::DiskAdmission SimDisk::begin(const node::DiskTransfer& transfer, Kind kind) {
  const Space& space = spaces_.at(transfer.space);
  const bool write = kind == Kind::kWrite;
  SIM_CHECK(space.opened || !write);
  SIM_CHECK(transfer.slot / plan_.drives < plan_.drive_slots);
  if (off_.contains(transfer.slot % plan_.drives)) return node::DiskAdmission::kUnavailable;
  if (flights_.size() >= plan_.disk_depth) return node::DiskAdmission::kBusy;
  for (const auto& [op, flight] : flights_) {
    const bool same = flight.transfer.space == transfer.space && flight.transfer.slot == transfer.slot;
    SIM_CHECK(!same || (!write && flight.kind != Kind::kWrite));  // never a write beside anything else
  }
  SIM_CHECK(flights_.emplace(transfer.op, Flight{transfer, space.resets, kind}).second);
  if (kind != Kind::kVerify) callbacks_.claim(transfer.op, !write, transfer.host_offset, space.slot_bytes);
  constexpr const char* kNotes[] = {"disk: read", "disk: write", "disk: verify"};
  loop_.note(kNotes[static_cast<std::size_t>(kind)], transfer.op, transfer.slot, transfer.host_offset / 4096);
  if (!plan_.block_times.empty()) {
    const auto drive = transfer.slot % plan_.drives;
    lines_[drive].waiting[static_cast<std::size_t>(kind)].push_back(transfer.op);
    serve(drive);
    return node::DiskAdmission::kQueued;
  }
  const Nanos time = loop_.delay(plan_.disk_time) + (loop_.chance(plan_.disk_stalls) ? plan_.stall_time : 0);
  loop_.after(time, [this, op = transfer.op, alive = alive_] {
    if (*alive) end(op);
  });
  return node::DiskAdmission::kQueued;
}

// Half of them have not begun yet.
void SimDisk::cancel(node::DiskOp op) {
  const auto found = flights_.find(op);
  if (found == flights_.end()) return;
  SIM_CHECK(found->second.kind != Kind::kWrite);
  loop_.note("disk: cancel", op);
  if (!loop_.chance(500)) return;
  found->second.canceled = true;
  loop_.after(loop_.delay(plan_.disk_time), [this, op, alive = alive_] {
    if (*alive) end(op);
  });
}

void SimDisk::serve(unsigned drive) {
  Line& line = lines_[drive];
  const auto next = std::ranges::find_if(line.waiting, [](const auto& queue) { return !queue.empty(); });
  if (line.busy || next == line.waiting.end()) return;
  line.busy = true;
  const node::DiskOp op = next->front();
  next->pop_front();
  loop_.after(plan_.block_times[drive], [this, op, drive, alive = alive_] {
    if (!*alive) return;
    end(op);
    lines_[drive].busy = false;
    serve(drive);
  });
}

void SimDisk::end(node::DiskOp op) {
  const auto node = flights_.extract(op);
  if (node.empty()) return;  // canceled, and ended before
  const Flight& flight = node.mapped();
  const auto outcome = carry_out(flight);
  loop_.note("disk: ended", op, static_cast<std::uint64_t>(outcome));
  if (flight.kind != Kind::kVerify) callbacks_.release(op);
  callbacks_.done({op, outcome});
}

// What is verified is what the node knows there, whatever became of others meanwhile.
node::DiskOutcome SimDisk::carry_out_verify(const Flight& flight) {
  const auto& transfer = flight.transfer;
  const Space& space = spaces_.at(transfer.space);
  if (flight.canceled) return node::DiskOutcome::kCanceled;
  if (off_.contains(transfer.slot % plan_.drives)) return node::DiskOutcome::kUnavailable;
  if (!calm_ && loop_.chance(plan_.disk_fails)) {
    return loop_.chance(500) ? node::DiskOutcome::kFailed : node::DiskOutcome::kDeadline;
  }
  if (flight.resets != space.resets) return node::DiskOutcome::kChecksum;
  const auto& block = store_.spaces[space.name].at(transfer.slot);
  SIM_CHECK(block.key == transfer.key);
  bad_found_ += block.torn;
  return block.torn ? node::DiskOutcome::kChecksum : node::DiskOutcome::kDone;
}

void SimDisk::rot() {
  if (store_.spaces.empty()) return;
  auto space = store_.spaces.begin();
  std::advance(space, static_cast<std::ptrdiff_t>(loop_.below(store_.spaces.size())));
  if (space->second.empty()) return;
  auto block = space->second.begin();
  std::advance(block, static_cast<std::ptrdiff_t>(loop_.below(space->second.size())));
  loop_.note("disk: a block goes bad", block->first);
  block->second.torn = true;
}

void SimDisk::calm() {
  calm_ = true;
  off_.clear();
}

node::DiskOutcome SimDisk::carry_out(const Flight& flight) {
  if (flight.kind == Kind::kVerify) return carry_out_verify(flight);
  const auto& transfer = flight.transfer;
  const Space& space = spaces_.at(transfer.space);
  const bool stale = flight.resets != space.resets;
  const std::span<std::byte> host = callbacks_.pool(transfer.host_offset, space.slot_bytes);
  if (flight.canceled) return node::DiskOutcome::kCanceled;
  if (off_.contains(transfer.slot % plan_.drives)) return node::DiskOutcome::kUnavailable;
  if (flight.kind == Kind::kWrite) {
    if (!check_sums(host, transfer.sums)) return node::DiskOutcome::kDamaged;
    if (!calm_ && loop_.chance(plan_.disk_fails)) {
      if (loop_.chance(500)) return node::DiskOutcome::kNoRoom;
      if (!stale) put(flight, true);
      return node::DiskOutcome::kFailed;
    }
    if (!stale) put(flight, false);
    return node::DiskOutcome::kDone;
  }
  if (!calm_ && loop_.chance(plan_.disk_fails)) {
    for (auto& byte : host) byte = static_cast<std::byte>(loop_.below(256));
    constexpr node::DiskOutcome kOutcomes[] = {node::DiskOutcome::kFailed, node::DiskOutcome::kDeadline,
                                               node::DiskOutcome::kChecksum};
    return kOutcomes[loop_.below(std::size(kOutcomes))];
  }
  const auto& blocks = store_.spaces[space.name];
  const auto found = blocks.find(transfer.slot);
  if (found == blocks.end()) return node::DiskOutcome::kChecksum;
  const SimStore::Block& block = found->second;
  std::ranges::copy(block.bytes, host.begin());
  return block.torn || block.key != transfer.key ? node::DiskOutcome::kChecksum : node::DiskOutcome::kDone;
}

void SimDisk::put(const Flight& flight, bool torn) {
  const Space& space = spaces_.at(flight.transfer.space);
  if (flight.resets != space.resets) return;
  const auto host = callbacks_.pool(flight.transfer.host_offset, space.slot_bytes);
  store_.spaces[space.name][flight.transfer.slot] = {
      flight.transfer.key, flight.transfer.parent, store_.next_sequence++, {host.begin(), host.end()}, torn};
}

}  // namespace flexkv::testing
