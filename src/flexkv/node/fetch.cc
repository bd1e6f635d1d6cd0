// From drives to host memory: loads that wait for it, prefetches.

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: what all prefetches together may take at once.
constexpr std::uint64_t kPrefetchShare = 25;
// At each drive, and there like loads: one may come to need them, and must not wait behind those that came later.
constexpr std::size_t kPrefetchesMax = 8;
// Room is made for so many fetches at a time.
constexpr std::size_t kReserveAhead = 16;

Reason to_reason(DiskOutcome outcome) {
  switch (outcome) {
    case DiskOutcome::kDone:
      return Reason::kNone;
    case DiskOutcome::kChecksum:
      return Reason::kChecksum;
    case DiskOutcome::kDeadline:
      return Reason::kDeadline;
    case DiskOutcome::kUnavailable:
      return Reason::kDiskOff;
    case DiskOutcome::kNoRoom:
      return Reason::kDiskFull;
    case DiskOutcome::kCanceled:
      return Reason::kCanceled;
    case DiskOutcome::kDamaged:
      return Reason::kDamaged;
    case DiskOutcome::kFailed:
      break;
  }
  return Reason::kDiskFailed;
}

}  // namespace

Node::Space* Node::find_space(SpaceNumber number) const {
  const auto found = std::ranges::find_if(spaces_, [&](const auto& space) { return space->number == number; });
  return found == spaces_.end() ? nullptr : found->get();
}

// ---- paths ---------------------------------------------------------------------------------------------------------

Node::Path* Node::hold(Space& space, index::PinId pin) {
  ++space.paths;
  auto& paths = disk_->paths;
  paths.push_back({&space, space.generation, pin, 1, {}});
  paths.back().self = std::prev(paths.end());
  return &paths.back();
}

void Node::release(Path* path) {
  if (--path->users > 0) return;
  --path->space->paths;
  drop_pin(*path->space, path->pin);
  disk_->paths.erase(path->self);
}

// ---- prefetches ----------------------------------------------------------------------------------------------------

Reason Node::prefetch(EngineHandle handle, const proto::PrefetchRequest& request, Nanos now) {
  tell_time(now);
  Engine* engine = find_engine(handle);
  if (engine == nullptr || engine->space == nullptr) return Reason::kNotReady;
  if (draining_) return Reason::kDraining;
  const auto [sequence, problem] = sequence_of(*engine, request.sequence, request.base, request.keys);
  if (sequence == nullptr || (disk_ == nullptr && remote_ == nullptr)) return problem;
  Space& space = *engine->space;
  refresh_match(*engine, *sequence, sequence->keys.size(), false, now);
  sequence->leased = true;
  if (!sequence->counted) engine->announced += !std::exchange(sequence->announced, true);
  Served found = served(*engine, *sequence, Purpose::kPrefetch);
  const Lookup here = found.lookup;
  look_beyond(*engine, *sequence, found);
  if (here.disk_blocks > 0) fetch_ahead(space, *sequence, here.matched_blocks);
  if (found.lookup.remote_blocks > 0) import_ahead(space, *sequence);
  return Reason::kNone;
}

// Those of the first `end` blocks that have no host slot in the scratch vector.
void Node::fetch_ahead(Space& space, const Sequence& sequence, std::uint32_t end) {
  const std::uint64_t most = options_.pool_bytes / space.slots.slot_bytes() * kPrefetchShare / 100;
  Path* path = hold(space, space.index.clone(sequence.pin));
  for (std::uint32_t i = 0; i < end && disk_->prefetches.size() < most; ++i) {
    if (disk_->host_slots[i] != index::kNoSlot || space.fetches.contains(sequence.keys[i])) continue;
    add_fetch(space, path, i, sequence.keys[i]).prefetch = true;
    disk_->prefetches.emplace_back(space.number, sequence.keys[i]);
  }
  release(path);
  pump_disk();
}

// ---- loads ---------------------------------------------------------------------------------------------------------

Node::Fetch& Node::add_fetch(Space& space, Path* path, std::uint32_t at, const key::BlockKey& key) {
  ++path->users;
  Fetch& fetch = space.fetches[key];
  fetch.path = path;
  fetch.at = at;
  return fetch;
}

// Fetches those of a load's blocks that have no host slot. `keys`, `slots`: of the request's blocks.
void Node::fetch_for(JobKey job_key, Job& job, const proto::TransferRequest& request,
                     std::span<const key::BlockKey> keys, std::span<const index::Slot> slots) {
  Space& space = *job.space;
  Path* path = hold(space, space.index.clone(job.pin));
  for (std::uint32_t i = 0; i < slots.size(); ++i) {
    if (slots[i] != index::kNoSlot) continue;
    const auto found = space.fetches.find(keys[i]);
    const bool added = found == space.fetches.end();
    Fetch& fetch = added ? add_fetch(space, path, request.first_block + i, keys[i]) : found->second;
    fetch.waiters.push_back({job_key, i, request.device_blocks[i]});
    job.fetched_keys.push_back(keys[i]);
    if (added || (fetch.prefetch && fetch.host == index::kNoSlot)) disk_->loads.emplace_back(space.number, keys[i]);
    fetch.prefetch = false;
  }
  release(path);
}

// The job, if it still waits for its block number `at`.
Node::Job* Node::waiting_job(JobKey key, std::uint32_t at) const {
  const auto found = jobs_.find(key);
  if (found == jobs_.end()) return nullptr;
  Job& job = *found->second;
  return !job.failed && at < job.fetched.size() && job.fetched[at] ? &job : nullptr;
}

bool Node::awaited(const Fetch& fetch) const {
  return std::ranges::any_of(fetch.waiters,
                             [&](const Waiter& waiter) { return waiting_job(waiter.job, waiter.at) != nullptr; }) ||
         std::ranges::any_of(fetch.loans, [&](LoanId id) { return waits_for(id, fetch); });
}

// The job waits for less than before: what nobody waits for any more need not be read. (What no drive has yet is
// dropped when its turn comes.)
void Node::forsake_fetches(Job& job) {
  std::erase_if(job.fetched_keys, [&](const key::BlockKey& key) {
    const auto found = job.space->fetches.find(key);
    if (found == job.space->fetches.end()) return true;
    const Fetch& fetch = found->second;
    if (awaited(fetch)) return false;
    if (fetch.host != index::kNoSlot) disk_->port.cancel(fetch.op);
    return true;
  });
}

// Gives a block to those that wait for it; appends the jobs that got it.
void Node::deliver(const Fetch& fetch, index::Slot slot, std::vector<JobKey>& arrived) {
  for (const Waiter& waiter : fetch.waiters) {
    Job* job = waiting_job(waiter.job, waiter.at);
    if (job == nullptr) continue;
    append_runs(job->space->slots, {&waiter.device_block, 1}, {&slot, 1}, waiter.at, job->arrived);
    job->fetched[waiter.at] = false;
    --job->missing;
    arrived.push_back(waiter.job);
  }
  lend_arrived(fetch);
}

// One more piece to every rank: what has come since the last one, or only that nothing more comes.
void Node::send_arrived(JobKey key, Job& job) {
  const SlotRuns runs = std::exchange(job.arrived, {});
  bool told = true;
  for (std::uint32_t rank = 0; rank < job.waiting.size(); ++rank) {
    told = told && (!job.waiting[rank] || send_piece(key, job, rank, runs, false));
  }
  ++job.pieces;
  if (!told) fail(key, job, Reason::kQueueFull);
}

void Node::send_arrived(std::span<const JobKey> jobs) {
  for (const JobKey& key : jobs) {
    const auto found = jobs_.find(key);
    if (found == jobs_.end() || found->second->failed || found->second->arrived.empty()) continue;
    send_arrived(key, *found->second);
  }
}

void Node::drop_fetch(Space& space, const key::BlockKey& key, Reason reason) {
  const Fetch fetch = std::move(space.fetches.extract(key).mapped());
  if (reason != Reason::kNone) ++stats_.unfetched_blocks[slot_of(reason)];
  for (const Waiter& waiter : fetch.waiters) {
    if (Job* job = waiting_job(waiter.job, waiter.at)) cut(waiter.job, *job, waiter.at, reason);
  }
  if (reason != Reason::kNone) lend_without(fetch, reason);
  release(fetch.path);
}

Node::Begun Node::begin_fetch(Space& space, const key::BlockKey& key, bool prefetch) {
  const auto found = space.fetches.find(key);
  if (found == space.fetches.end()) return Begun::kNothing;
  Fetch& fetch = found->second;
  if (fetch.host != index::kNoSlot || fetch.prefetch != prefetch) return Begun::kNothing;
  const auto drop = [&](Reason reason) {
    drop_fetch(space, key, reason);
    return Begun::kNothing;
  };
  if (!prefetch && !awaited(fetch)) return drop(Reason::kNone);
  if (fetch.path->generation != space.generation) return drop(Reason::kReset);
  index::Slot host = index::kNoSlot;
  index::Slot disk = index::kNoSlot;
  space.index.collect(fetch.path->pin, kHostTier, fetch.at, {&host, 1});
  space.index.collect(fetch.path->pin, kDiskTier, fetch.at, {&disk, 1});
  if (host != index::kNoSlot) {  // saved again meanwhile
    std::vector<JobKey> arrived;
    deliver(fetch, host, arrived);
    fetch.waiters.clear();
    drop_fetch(space, key, Reason::kNone);
    send_arrived(arrived);
    return Begun::kNothing;
  }
  if (disk == index::kNoSlot) return drop(Reason::kGone);
  if (prefetch && disk_->prefetching >= kPrefetchesMax * disk_->reads.size()) return Begun::kBusy;

  const std::size_t waiting = disk_->loads.size() + disk_->prefetches.size();
  if (reserve(space, static_cast<std::uint32_t>(std::min(waiting, kReserveAhead)), now_) == 0) return Begun::kNoRoom;
  host = take_slot(space);
  DiskTransfer transfer;
  transfer.op = disk_->next_op++;
  transfer.space = space.number;
  transfer.slot = disk;
  transfer.key = key;
  transfer.host_offset = space.slots.offset(host);
  transfer.deadline = now_ + options_.load_timeout;
  const DiskAdmission admission = disk_->port.read(transfer);
  if (admission == DiskAdmission::kQueued) {
    fetch.host = host;
    fetch.op = transfer.op;
    ++space.fetching;
    disk_->ios[transfer.op] = {&space, key, fetch.path, fetch.at, disk, DiskIo::Kind::kFetch, prefetch, now_};
    disk_->prefetching += prefetch;
    plan::FlowRate& reads = disk_->reads[space.disk_slots->drive_of(disk)];
    reads.begin(space.slots.slot_bytes(), now_);
    fetch.position = reads.begun_bytes();
    return Begun::kYes;
  }
  space.slots.give_back(host);
  return admission == DiskAdmission::kBusy ? Begun::kBusy : drop(Reason::kDiskOff);
}

void Node::end_fetch(const DiskIo& io, DiskOutcome outcome, std::vector<JobKey>& arrived) {
  Space& space = *io.space;
  Fetch& fetch = space.fetches.at(io.key);
  index::Slot host = std::exchange(fetch.host, index::kNoSlot);
  --space.fetching;
  disk_->prefetching -= io.prefetch;
  disk_->reads[space.disk_slots->drive_of(io.disk)].end(space.slots.slot_bytes(), outcome == DiskOutcome::kDone, now_);
  const bool current = io.path->generation == space.generation;
  if (current && (outcome == DiskOutcome::kChecksum || outcome == DiskOutcome::kFailed)) drop_bad(io, outcome);
  if (io.dropped) space.disk_slots->give_back(io.disk);
  if (outcome == DiskOutcome::kDone && current) {
    std::vector<index::Slot> rejected;
    space.index.add_residency(io.path->pin, kHostTier, io.at, {&host, 1}, now_, rejected);
    for (const index::Slot slot : rejected) space.slots.give_back(slot);
    space.index.collect(io.path->pin, kHostTier, io.at, {&host, 1});
    ++stats_.from_disk.blocks;
    stats_.from_disk.bytes += space.slots.slot_bytes();
    stats_.from_disk.latency.record(now_ - io.begun);
    stats_.blocks_prefetched += io.prefetch;
    deliver(fetch, host, arrived);
    fetch.waiters.clear();
    drop_fetch(space, io.key, Reason::kNone);
    return;
  }
  space.slots.give_back(host);
  if (current && outcome == DiskOutcome::kCanceled && awaited(fetch)) {  // by who came after it was canceled
    fetch.prefetch = false;
    disk_->loads.emplace_back(space.number, io.key);
    return;
  }
  drop_fetch(space, io.key, current ? to_reason(outcome) : Reason::kReset);
}

// ---- what the drives say, and what they are told next --------------------------------------------------------------

void Node::on_disk_done(std::span<const DiskResult> results, Nanos now) {
  tell_time(now);
  std::vector<JobKey> arrived;
  for (const DiskResult& result : results) {
    const auto node = disk_->ios.extract(result.op);
    FLEXKV_ASSERT(!node.empty());
    const DiskIo& io = node.mapped();
    switch (io.kind) {
      case DiskIo::Kind::kWrite:
        end_write(io, result.outcome, to_reason(result.outcome));
        break;
      case DiskIo::Kind::kFetch:
        end_fetch(io, result.outcome, arrived);
        break;
      case DiskIo::Kind::kCheck:
        end_check(io, result.outcome);
        break;
    }
  }
  send_arrived(arrived);
  pump_disk();
}

// Who waits for a drive that is off gives up. (While it is on, each has a deadline of his own.) The slot stays taken
// until the drive has let go of it.
void Node::on_disk_overdue(DiskOp op, Nanos now) {
  tell_time(now);
  const auto found = disk_->ios.find(op);
  if (found == disk_->ios.end()) return;
  if (found->second.kind == DiskIo::Kind::kCheck) return give_up_check(found->second);
  if (found->second.kind != DiskIo::Kind::kFetch) return;
  Space& space = *found->second.space;
  if (disk_->port.can_read(space.disk_slots->drive_of(found->second.disk))) return;
  Fetch& fetch = space.fetches.at(found->second.key);
  const Fetch awaited_so_far = fetch;
  fetch.waiters.clear();
  fetch.loans.clear();
  for (const Waiter& waiter : awaited_so_far.waiters) {
    if (Job* job = waiting_job(waiter.job, waiter.at)) cut(waiter.job, *job, waiter.at, Reason::kDiskOff);
  }
  lend_without(awaited_so_far, Reason::kDiskOff);
  pump_disk();
}

void Node::on_disk_ready(Nanos now) {
  tell_time(now);
  pump_disk();
}

void Node::pump_disk() {
  if (disk_ == nullptr || disk_->pumping) return;
  disk_->pumping = true;
  if (pump_fetches(disk_->loads, false)) (void)pump_fetches(disk_->prefetches, true);
  pump_writes();
  disk_->scrub.waits = false;
  pump_scrub();
  disk_->pumping = false;
}

// In order, except that those of a model without room leave the way to those of others. False: the drives are busy.
bool Node::pump_fetches(std::deque<FetchId>& queue, bool prefetch) {
  std::vector<SpaceNumber> full;
  std::size_t kept = 0;  // in front of `at`
  std::size_t at = 0;
  bool busy = false;
  for (; at < queue.size(); ++at) {
    const FetchId fetch = queue[at];
    const auto [number, key] = fetch;
    Begun begun = Begun::kNothing;
    if (std::ranges::find(full, number) != full.end()) {
      begun = Begun::kNoRoom;
    } else if (Space* space = find_space(number)) {
      do {
        begun = begin_fetch(*space, key, prefetch);
      } while (begun == Begun::kNoRoom && !prefetch && make_way(*space));
      if (begun == Begun::kNoRoom && !prefetch) full.push_back(number);
      if (begun == Begun::kNoRoom && prefetch) drop_fetch(*space, key, Reason::kPoolFull);  // nobody waits for it yet
    }
    busy = begun == Begun::kBusy;
    if (busy) break;
    if (begun == Begun::kNoRoom && !prefetch) queue[kept++] = fetch;
  }
  queue.erase(queue.begin() + static_cast<std::ptrdiff_t>(kept), queue.begin() + static_cast<std::ptrdiff_t>(at));
  return !busy;
}

// Loads wait for room that other loads hold while they wait, too: the newest of them ends before what it waits for.
// False: none has to, because something of this model runs that will leave room when it ends.
bool Node::make_way(const Space& space) {
  if (space.fetching > 0 || !space.writing.empty() || space.imports > 0 || space.loans > 0) return false;
  auto newest = jobs_.end();
  for (auto job = jobs_.begin(); job != jobs_.end(); ++job) {
    if (job->second->space != &space) continue;
    if (job->second->missing == 0 || job->second->failed) return false;
    const auto age = [](const auto& one) { return std::pair(one->second->started_at, one->first); };
    if (newest == jobs_.end() || age(newest) < age(job)) newest = job;
  }
  if (newest == jobs_.end()) return false;
  Job& job = *newest->second;
  const auto first = std::ranges::find(job.fetched, true) - job.fetched.begin();
  cut(newest->first, job, static_cast<std::uint32_t>(first), Reason::kNoRoomToLoad);
  return true;
}

}  // namespace flexkv::node
