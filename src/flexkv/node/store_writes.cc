// From host memory to a store beyond the machine, which all share: what is worth it, in pieces of the size that the
// store likes.

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: blocks that are gathered or written cannot be evicted.
constexpr std::uint64_t kStoreShare = 25;
// Fewer blocks than make a good write wait so long for those that follow them.
constexpr Nanos kGatherTime = 2 * kSecond;
constexpr std::size_t kWritesMax = 8;  // under way
constexpr Nanos kWriteTime = 60 * kSecond;

}  // namespace

Reason reason_of(RemoteOutcome outcome) {
  switch (outcome) {
    case RemoteOutcome::kBusy:
      return Reason::kPeerBusy;
    case RemoteOutcome::kUnreachable:
      return Reason::kPeerUnreachable;
    case RemoteOutcome::kDeadline:
      return Reason::kDeadline;
    case RemoteOutcome::kChecksum:
      return Reason::kChecksum;
    case RemoteOutcome::kCanceled:
      return Reason::kCanceled;
    case RemoteOutcome::kStoreOff:
      return Reason::kStoreOff;
    case RemoteOutcome::kStoreFailed:
      return Reason::kStoreFailed;
    case RemoteOutcome::kDamaged:
      return Reason::kDamaged;
    case RemoteOutcome::kDone:
    case RemoteOutcome::kMissing:
      break;
  }
  return Reason::kGone;
}

// ---- what is to be written -----------------------------------------------------------------------------------------

// The first block of the pinned path that nobody has given to the store, as far as is known; its end: there is none, or
// none that could be found there.
std::uint32_t Node::first_unstored(Space& space, index::PinId pin) {
  const std::uint32_t end = space.index.depth(pin);
  auto& slots = store_->slots;
  auto& keys = store_->keys;
  slots.resize(end);
  keys.resize(end);
  space.index.collect(pin, kHostTier, 0, slots);
  space.index.collect_keys(pin, 0, keys);
  for (std::uint32_t i = 0; i < end; ++i) {
    const bool here = slots[i] != index::kNoSlot;
    if (here && space.slots.marked(slots[i])) continue;
    if (!store_->port.has(space.number, keys[i])) return here ? i : end;
    if (here) space.slots.mark(slots[i], true);
  }
  return end;
}

// Has those of the pinned path's blocks kept beyond the machine that are not and are worth it.
void Node::store_beyond(Space& space, index::PinId pin) {
  const std::uint32_t write_blocks = store_ == nullptr ? 0 : store_->port.write_blocks(space.number);
  if (write_blocks == 0) return;
  const std::uint32_t begin = first_unstored(space, pin);
  auto& slots = store_->slots;
  const auto in_host = std::find(slots.begin() + begin, slots.end(), index::kNoSlot) - slots.begin();
  const auto keys = std::span(store_->keys).first(static_cast<std::size_t>(in_host)).subspan(begin);
  if (keys.empty()) return;
  const auto verdict = space.store_admission->admit(keys, 0);
  stats_.unstored_blocks[slot_of(Reason::kUnlikely)] += keys.size() - verdict.count;
  const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(verdict.count, store_room(space)));
  stats_.unstored_blocks[slot_of(Reason::kQueueFull)] += verdict.count - count;
  if (count == 0) return;
  queue_for_store(space, pin, begin, begin + count, write_blocks);
  pump_store();
}

// Blocks [begin, end) of the pinned path, of which store_->keys and store_->slots tell.
void Node::queue_for_store(Space& space, index::PinId pin, std::uint32_t begin, std::uint32_t end,
                           std::uint32_t write_blocks) {
  for (std::uint32_t i = begin; i < end; ++i) space.slots.mark(store_->slots[i], true);
  store_->blocks += end - begin;
  store_->bytes += (end - begin) * space.slots.slot_bytes();
  gather(space, pin, begin, end, write_blocks);
}

std::uint64_t Node::store_room(const Space& space) const {
  const std::uint64_t most = options_.pool_bytes * kStoreShare / 100;
  return (most - std::min(most, store_->bytes)) / space.slots.slot_bytes();
}

// More would only wait, and be no hotter by then.
bool Node::store_is_busy() const {
  return store_->gathering.size() + store_->ready.size() + store_->writes.size() >= 2 * kWritesMax;
}

// Blocks [begin, end) of the pinned path; store_->keys has their keys. They join what they continue; so many make a
// write.
void Node::gather(Space& space, index::PinId pin, std::uint32_t begin, std::uint32_t end, std::uint32_t write_blocks) {
  auto& gathering = store_->gathering;
  auto run = gathering.end();
  if (begin > 0) {
    const auto before = space.storing_ends.find(store_->keys[begin - 1]);
    if (before != space.storing_ends.end()) run = before->second;
  }
  if (run == gathering.end()) {
    run = gathering.insert(run, StoreRun{&space, space.generation, space.index.clone(pin), begin, end, {}, now_});
    ++space.storing;
  } else {
    space.storing_ends.erase(run->last);
    drop_pin(space, run->pin);
    run->pin = space.index.clone(pin);
    run->end = end;
  }
  while (run->end - run->begin > write_blocks) {
    StoreRun part = *run;
    part.pin = space.index.clone(run->pin);
    part.end = run->begin = part.begin + write_blocks;
    ++space.storing;
    store_->ready.push_back(part);
  }
  run->last = store_->keys[end - 1];
  if (run->end - run->begin == write_blocks) {
    store_->ready.splice(store_->ready.end(), gathering, run);
  } else {
    // Of two that end alike, because what the first one has was found damaged and saved anew, the second may go on.
    space.storing_ends[run->last] = run;
  }
}

// ---- writing -------------------------------------------------------------------------------------------------------

// Nothing continues it any more.
void Node::forget_end(std::list<StoreRun>::iterator run) {
  auto& ends = run->space->storing_ends;
  const auto found = ends.find(run->last);
  if (found != ends.end() && found->second == run) ends.erase(found);
}

void Node::pump_store() {
  if (store_ == nullptr) return;
  if (store_->offers) pump_offers();
  auto& gathering = store_->gathering;
  while (!gathering.empty() && (store_->flushing || now_ >= gathering.front().since + kGatherTime)) {
    forget_end(gathering.begin());
    store_->ready.splice(store_->ready.end(), gathering, gathering.begin());
  }
  auto& ready = store_->ready;
  // A store that is too slow holds no host memory for ever: a run's pin holds all that precedes it, too.
  while (!ready.empty() && now_ >= ready.front().since + kWriteTime) {
    StoreRun late = ready.front();
    ready.pop_front();
    give_up_run(late, Reason::kDeadline);
  }
  while (!ready.empty() && store_->writes.size() < kWritesMax) {
    StoreRun run = ready.front();
    ready.pop_front();
    if (store_->port.write_blocks(run.space->number) == 0) {  // it has gone off
      give_up_run(run, Reason::kStoreOff);
    } else {
      begin_store_write(run);
    }
  }
}

void Node::begin_store_write(StoreRun& run) {
  Space& space = *run.space;
  run.slots.resize(run.end - run.begin);
  space.index.collect(run.pin, kHostTier, run.begin, run.slots);
  // What turned out to be damaged meanwhile is gone, and what follows could not be found.
  const auto gone = std::ranges::find(run.slots, index::kNoSlot);
  const auto count = static_cast<std::uint32_t>(gone - run.slots.begin());
  if (count < run.slots.size()) {
    StoreRun rest = run;
    rest.pin = space.index.clone(run.pin);
    rest.begin = run.end = run.begin + count;
    ++space.storing;
    run.slots.resize(count);
    give_up_run(rest, Reason::kDamaged);
    if (count == 0) return end_run(run);
  }
  StoreWrite write;
  write.op = store_->next_op++;
  write.space = space.number;
  write.keys.resize(count);
  space.index.collect_keys(run.pin, run.begin, write.keys);
  if (run.begin > 0) space.index.collect_keys(run.pin, run.begin - 1, {&write.parent, 1});
  for (const index::Slot slot : run.slots) {
    write.host_offsets.push_back(space.slots.offset(slot));
    write.sums.push_back(space.sums.of(slot));
  }
  write.deadline = now_ + kWriteTime;
  run.since = now_;
  store_->writes.emplace(write.op, run);
  store_->port.write(std::move(write));
}

void Node::on_store_damaged(RemoteOp op, std::uint32_t index, Nanos now) {
  tell_time(now);
  const StoreRun& run = store_->writes.at(op);
  if (run.generation == run.space->generation) drop_damaged(*run.space, run.pin, run.begin + index, run.slots[index]);
}

void Node::on_store_written(RemoteOp op, RemoteOutcome outcome, Nanos now) {
  tell_time(now);
  const auto found = store_->writes.extract(op);
  FLEXKV_ASSERT(!found.empty());
  StoreRun& run = found.mapped();
  const std::uint32_t blocks = run.end - run.begin;
  if (outcome != RemoteOutcome::kDone) {
    give_up_run(run, run.generation == run.space->generation ? reason_of(outcome) : Reason::kReset);
  } else {
    ++stats_.store_writes;
    stats_.to_store.blocks += blocks;
    stats_.to_store.bytes += blocks * run.space->slots.slot_bytes();
    stats_.to_store.latency.record(now_ - run.since);
    end_run(run);
  }
  give_back_damaged(*run.space);
  pump_store();
  pump_disk();  // what it held may be what fetches wait for
}

void Node::end_run(StoreRun& run) {
  store_->blocks -= run.end - run.begin;
  store_->bytes -= (run.end - run.begin) * run.space->slots.slot_bytes();
  --run.space->storing;
  drop_pin(*run.space, run.pin);
}

// What was not written may be offered again.
void Node::give_up_run(StoreRun& run, Reason reason) {
  Space& space = *run.space;
  std::vector<index::Slot> slots(run.end - run.begin);
  if (!slots.empty()) space.index.collect(run.pin, kHostTier, run.begin, slots);
  for (const index::Slot slot : slots) {
    if (slot != index::kNoSlot) space.slots.mark(slot, false);
  }
  stats_.unstored_blocks[slot_of(reason)] += slots.size();
  if (store_->offers) store_->offers->again = true;
  end_run(run);
}

// Of before a reset.
void Node::disown_store_runs(Space& space) {
  if (store_ == nullptr) return;
  if (store_->offers) store_->offers->look(now_);
  space.storing_ends.clear();
  for (auto* const runs : {&store_->gathering, &store_->ready}) {
    std::erase_if(*runs, [&](StoreRun& run) {
      if (run.space != &space) return false;
      give_up_run(run, Reason::kReset);
      return true;
    });
  }
}

void Node::flush_store(Nanos now) {
  tell_time(now);
  if (store_ == nullptr) return;
  store_->flushing = true;
  pump_store();
}

std::uint32_t Node::store_queue() const { return store_ == nullptr ? 0 : store_->blocks; }

// When what is gathered has waited long enough, or more may be offered.
std::optional<Nanos> Node::store_deadline() const {
  if (store_ == nullptr) return std::nullopt;
  std::optional<Nanos> next;
  if (!store_->gathering.empty()) next = store_->gathering.front().since + kGatherTime;
  if (const auto offers = offers_deadline()) next = std::min(next.value_or(*offers), *offers);
  return next;
}

// For check_invariants().
void Node::check_store_invariants() const {
  std::uint64_t bytes = 0;
  std::uint32_t blocks = 0;
  std::map<const Space*, std::uint32_t> runs;
  const auto count = [&](const StoreRun& run) {
    FLEXKV_ASSERT(run.begin < run.end);
    blocks += run.end - run.begin;
    bytes += (run.end - run.begin) * run.space->slots.slot_bytes();
    ++runs[run.space];
  };
  Nanos oldest = 0;
  for (auto run = store_->gathering.begin(); run != store_->gathering.end(); ++run) {
    FLEXKV_ASSERT(run->generation == run->space->generation);
    FLEXKV_ASSERT(run->since >= std::exchange(oldest, run->since));
    count(*run);
  }
  for (const auto& run : store_->ready) count(run);
  for (const auto& [op, run] : store_->writes) count(run);
  FLEXKV_ASSERT(bytes == store_->bytes && blocks == store_->blocks);
  std::size_t ends = 0;
  for (const auto& space : spaces_) {
    ends += space->storing_ends.size();
    for (const auto& [key, run] : space->storing_ends) FLEXKV_ASSERT(run->space == space.get() && run->last == key);
  }
  FLEXKV_ASSERT(ends <= store_->gathering.size());
  for (const auto& space : spaces_) FLEXKV_ASSERT(space->storing == runs[space.get()]);
}

}  // namespace flexkv::node
