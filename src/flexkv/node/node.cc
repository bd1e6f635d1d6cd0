#include "flexkv/node/node.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

Reason to_reason(index::MissReason reason) {
  switch (reason) {
    case index::MissReason::kEvicted:
      return Reason::kEvicted;
    case index::MissReason::kReset:
      return Reason::kReset;
    case index::MissReason::kDamaged:
      return Reason::kChecksum;
    case index::MissReason::kUnreadable:
      return Reason::kDiskFailed;
    default:
      return Reason::kNeverSeen;
  }
}

}  // namespace

Node::Node(NodeOptions options, Outbox& outbox, DiskPort* disk, RemotePort* remote, StorePort* store)
    : options_(options), outbox_(outbox), ranges_(options.pool_bytes) {
  if (disk != nullptr) disk_ = std::make_unique<Disk>(*disk);
  if (remote != nullptr) remote_ = std::make_unique<Remote>(*remote);
  if (store != nullptr) store_ = std::make_unique<Store>(*store);
}
Node::~Node() = default;

// ---- lookups -------------------------------------------------------------------------------------------------------

std::pair<Node::Sequence*, Reason> Node::sequence_of(Engine& engine, SequenceId id, std::uint32_t base,
                                                     std::span<const key::BlockKey> keys) {
  auto found = engine.sequences.find(id);
  const std::size_t known = found == engine.sequences.end() ? 0 : found->second.keys.size();
  if (base > known) return {nullptr, Reason::kUnknownSequence};
  const std::size_t repeated = std::min<std::size_t>(known - base, keys.size());
  const std::size_t added = keys.size() - repeated;
  if (sequence_keys_ + added > options_.sequence_keys_max) return {nullptr, Reason::kTooManySequences};
  if (found == engine.sequences.end()) {
    found = engine.sequences.emplace(id, Sequence{}).first;
    found->second.id = id;
    found->second.born = found->second.generation = engine.space->generation;
  }
  Sequence& sequence = found->second;
  sequence.keys.insert(sequence.keys.end(), keys.begin() + static_cast<std::ptrdiff_t>(repeated), keys.end());
  sequence_keys_ += added;
  return {&sequence, Reason::kNone};
}

// The slots in `evicted_` are free again.
void Node::give_back_evicted(Space& space) {
  for (const auto& evicted : evicted_) {
    if (evicted.tier == kHostTier) {
      space.slots.give_back(evicted.slot);
    } else {
      space.disk_slots->give_back(evicted.slot);
    }
  }
  evicted_.clear();
}

void Node::drop_pin(Space& space, index::PinId& pin) {
  space.index.unpin(pin, evicted_);
  give_back_evicted(space);
}

// Extends the sequence's pinned match as far as its first `block_count` keys are known to the index.
void Node::refresh_match(Engine& engine, Sequence& sequence, std::size_t block_count, bool touch, Nanos now) {
  Space& space = *engine.space;
  if (sequence.pinned && (sequence.generation != space.generation || sequence.drops != space.drops)) {
    drop_pin(space, sequence.pin);
    sequence.pinned = false;
  }
  if (sequence.generation != space.generation) sequence.remote_end = 0;
  sequence.generation = space.generation;
  sequence.drops = space.drops;
  sequence.used_at = now;
  const std::span<const key::BlockKey> keys(sequence.keys.data(), block_count);
  if (!sequence.pinned) {
    const auto match = space.index.match(keys, touch, now);
    sequence.pin = match.pin;
    sequence.matched = match.block_count;
    sequence.pinned = true;
  } else if (sequence.matched < block_count) {
    const auto match = space.index.extend(sequence.pin, keys.subspan(sequence.matched), touch, now);
    sequence.pin = match.pin;
    sequence.matched += match.block_count;
  }
}

Node::Lookup Node::lookup(EngineHandle handle, SequenceId id, std::uint32_t base, std::span<const key::BlockKey> keys,
                          Nanos now, std::uint32_t engine_blocks) {
  tell_time(now);
  Engine* engine = find_engine(handle);
  if (engine == nullptr || engine->space == nullptr) return {0, Reason::kNotReady, 0, 0};
  const auto [sequence, problem] = sequence_of(*engine, id, base, keys);
  if (sequence == nullptr) return {0, problem, 0, 0};
  if (draining_) return miss_by_drain(*sequence);
  Space& space = *engine->space;
  const bool first = !sequence->counted;
  refresh_match(*engine, *sequence, sequence->keys.size(), first, now);

  sequence->leased = true;
  sequence->engine_blocks = std::min(engine_blocks, static_cast<std::uint32_t>(sequence->keys.size()));
  engine->announced -= std::exchange(sequence->announced, false);
  // Asked again, only the last answer counts.
  if (std::exchange(sequence->computing, false)) engine->computes_until -= sequence->compute;
  Served found = served(*engine, *sequence, Purpose::kLookup);
  look_beyond(*engine, *sequence, found);
  if (disk_ != nullptr || remote_ != nullptr) note_choice(*engine, *sequence, found, first);
  Lookup result = found.lookup;
  result.described_blocks = described(space, *sequence);
  if (result.reason == Reason::kNone && result.matched_blocks < sequence->keys.size()) {
    const key::BlockKey& missing = sequence->keys[result.matched_blocks];
    result.reason = space.in_flight.contains(missing) ? Reason::kInFlight
                    : space.disk_state == Space::DiskState::kOpening
                        ? Reason::kRecovering
                        : to_reason(space.index.why_missing(missing, nullptr));
  }
  if (first) {
    sequence->counted = true;
    sequence->found = sequence->matched;
    note_hits(space, *sequence);
    ++stats_.lookups;
    stats_.blocks_queried += sequence->keys.size();
    stats_.blocks_hit += result.matched_blocks;
    stats_.disk_blocks_hit += result.disk_blocks - result.remote_blocks;
    stats_.remote_blocks_hit += result.remote_blocks;
    stats_.missed_blocks[slot_of(result.reason)] += sequence->keys.size() - result.matched_blocks;
  }
  return result;
}

void Node::close(Engine& engine, Sequence& sequence) {
  if (sequence.pinned) drop_pin(*engine.space, sequence.pin);
  sequence.pinned = false;
  engine.announced -= std::exchange(sequence.announced, false);
  sequence_keys_ -= sequence.keys.size();
}

void Node::close_sequence(EngineHandle handle, SequenceId id) {
  Engine* engine = find_engine(handle);
  if (engine == nullptr) return;
  auto found = engine->sequences.find(id);
  if (found == engine->sequences.end()) return;
  close(*engine, found->second);
  engine->sequences.erase(found);
  pump_disk();
}

// ---- room ----------------------------------------------------------------------------------------------------------

void Node::evict(Space& space, std::uint32_t count, Nanos now) {
  stats_.blocks_evicted += space.index.evict(kHostTier, count, now, evicted_);
  give_back_evicted(space);
}

// A waiting request must not keep its blocks for ever: after lease_time a lookup is no longer protected. One that was
// admitted has no more use for what was found.
void Node::shed_expired_leases(Space& space, Nanos now) {
  for (auto& [handle, engine] : engines_) {
    if (engine->space != &space) continue;
    for (auto& [id, sequence] : engine->sequences) {
      if (!sequence.pinned || (sequence.leased && now - sequence.used_at < options_.lease_time)) continue;
      drop_pin(space, sequence.pin);
      sequence.pinned = false;
      sequence.matched = 0;
    }
  }
}

void Node::close_ports(const Space& space) {
  if (disk_ != nullptr) disk_->port.close_space(space.number);
  if (remote_ != nullptr) remote_->port.close_space(space.number);
}

// Makes up to `count` free slots and returns how many there are (at most `count`).
std::uint32_t Node::reserve(Space& space, std::uint32_t count, Nanos now) {
  while (space.slots.free_count() < count && space.slots.grow()) {
  }
  if (space.slots.free_count() < count && space.engines > 0) {
    // Other spaces whose engines have all left are only worth keeping while nobody needs their memory.
    for (auto idle = spaces_.begin(); idle != spaces_.end() && space.slots.free_count() < count;) {
      if (idle->get() != &space && this->idle(**idle)) {
        stats_.blocks_evicted += (*idle)->slots.slot_count() - (*idle)->slots.free_count();
        close_ports(**idle);
        idle = spaces_.erase(idle);
        while (space.slots.free_count() < count && space.slots.grow()) {
        }
      } else {
        ++idle;
      }
    }
  }
  const std::uint32_t total = space.slots.slot_count();
  const std::uint32_t used = total - space.slots.free_count();
  std::uint32_t wanted = count > space.slots.free_count() ? count - space.slots.free_count() : 0;
  const bool dealt_out = ranges_.free_bytes() < space.slots.slot_bytes();
  if (dealt_out && used + count > options_.evict_start_threshold * total) {
    wanted = std::max(wanted, static_cast<std::uint32_t>(options_.evict_ratio * total));
  }
  if (wanted > 0) evict(space, wanted, now);
  if (space.slots.free_count() < count) {
    shed_expired_leases(space, now);
    evict(space, count - space.slots.free_count(), now);
  }
  return std::min(count, space.slots.free_count());
}

// ---- transfers -----------------------------------------------------------------------------------------------------

Node::Job& Node::start_job(EngineHandle handle, Engine& engine, const proto::TransferRequest& request,
                           device::Direction direction, Nanos now) {
  auto job = std::make_unique<Job>();
  job->engine = handle;
  job->space = engine.space;
  job->direction = direction;
  job->generation = engine.space->generation;
  job->block_bytes = request.save ? engine.space->block_bytes : engine.device_bytes();
  job->started_at = now;
  job->deadline = now + (request.save ? options_.save_timeout : options_.load_timeout);
  job->waiting.assign(engine.rank_count, false);
  ++engine.space->jobs;
  const JobKey key{handle, request.job};
  deadlines_.emplace(job->deadline, key);
  return *(jobs_[key] = std::move(job));
}

// Appends the blocks that have a slot, as runs; returns how many they are. `first`: which of the job's blocks the first
// one is.
std::uint32_t Node::append_runs(const SlotSpace& space, std::span<const std::uint32_t> device_blocks,
                                std::span<const index::Slot> slots, std::uint32_t first, SlotRuns& runs) {
  std::uint32_t appended = 0;
  for (std::size_t begin = 0; begin < slots.size();) {
    const index::Slot slot = slots[begin];
    if (slot == index::kNoSlot) {
      ++begin;
      continue;
    }
    const std::size_t most = std::min<std::size_t>(slots.size() - begin, space.slots_in_row(slot));
    std::uint32_t count = 1;
    while (count < most && slots[begin + count] == slot + count &&
           device_blocks[begin + count] == device_blocks[begin] + count) {
      ++count;
    }
    runs.push_back({device_blocks[begin], slot, count, first + static_cast<std::uint32_t>(begin)});
    appended += count;
    begin += count;
  }
  return appended;
}

// Sends every rank its part, or the first piece of it. A rank that cannot be told counts as failed; the job ends once
// the others have reported.
void Node::dispatch(JobKey key, Job& job, const SlotRuns& runs, bool armed) {
  const Engine& engine = *find_engine(key.first);
  for (std::uint32_t rank = 0; rank < engine.rank_count; ++rank) {
    if (send_piece(key, job, rank, runs, armed)) {
      job.waiting[rank] = true;
      ++job.waiting_count;
    } else {
      job.failed = true;
      job.failure = engine.ranks[rank].agent == 0 ? Reason::kRankFailed : Reason::kQueueFull;
      job.good = 0;
    }
  }
  ++job.pieces;
  if (job.failed) cancel_ranks(key, job);
}

// Which blocks of a save a rank copies: those that hold a shard alike divide them as evenly as they can, and who gets
// the larger part, or any at all of a few, goes round with the jobs.
std::pair<std::uint64_t, std::uint64_t> Node::save_slice(JobKey key, const Job& job, const Engine& engine,
                                                         std::uint32_t number) {
  const Engine::Rank& rank = engine.ranks[number];
  const std::uint64_t turn = (rank.holder + key.second) % rank.holder_count;
  return {job.blocks * turn / rank.holder_count, job.blocks * (turn + 1) / rank.holder_count};
}

// Of a save, only the rank's slice.
bool Node::send_piece(JobKey key, const Job& job, std::uint32_t number, const SlotRuns& runs, bool armed) {
  const Engine& engine = *find_engine(key.first);
  const Engine::Rank& rank = engine.ranks[number];
  // With other ranks than at its beginning, shards lie elsewhere now.
  if (rank.agent == 0 || engine.space != job.space) return false;
  const Space& space = *job.space;
  std::uint64_t begin = 0;
  std::uint64_t end = std::numeric_limits<std::uint64_t>::max();
  const bool save = job.direction == device::Direction::kToHost;
  if (save) std::tie(begin, end) = save_slice(key, job, engine, number);
  proto::CopyCommand command;
  command.job = key.second;
  command.direction = job.direction;
  command.armed = armed;
  command.host_stride = space.slots.slot_bytes();
  command.piece = job.pieces;
  command.last = job.missing == 0;
  command.runs.reserve(runs.size());
  if (!save) command.job_blocks = job.blocks;
  std::uint64_t at = 0;  // the run's first block, of those of the piece
  for (const SlotRun& run : runs) {
    const auto skipped = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(begin, at, at + run.count) - at);
    const auto stop = static_cast<std::uint32_t>(std::clamp<std::uint64_t>(end, at, at + run.count) - at);
    if (skipped < stop) {
      command.runs.push_back(
          {run.device_block + skipped, stop - skipped, space.slots.offset(run.slot + skipped) + rank.host_offset});
    }
    auto& spans = command.spans;
    if (!save && !spans.empty() && spans.back().first + spans.back().count == run.first) {
      spans.back().count += run.count;
    } else if (!save) {
      spans.push_back({run.first, run.count});
    }
    at += run.count;
  }
  return outbox_.send(rank.agent, command);
}

// The job ends without success once its ranks are quiet.
void Node::fail(JobKey key, Job& job, Reason reason) {
  if (!job.failed) {
    job.failed = true;
    job.failure = reason;
    cancel_ranks(key, job);
  }
  finish_if_quiet(key, now_);
}

// Block number `at` of a load, which it waits for, does not come: the load ends before it.
void Node::cut(JobKey key, Job& job, std::uint32_t at, Reason reason) {
  if (at == 0) return fail(key, job, reason);
  job.end = at;
  job.failure = reason;
  for (auto waits = job.fetched.begin() + at; waits != job.fetched.end(); ++waits) {
    job.missing -= *waits;
    *waits = false;
  }
  forsake_fetches(job);
  forsake_imports(job);
  if (job.missing == 0) send_arrived(key, job);
}

// There will be no command for this job. The workers may have armed it already: whoever waits for it must not wait for
// its deadline.
void Node::call_off(const Engine* engine, JobId job) {
  if (engine == nullptr) return;
  for (const auto& rank : engine->ranks) {
    if (rank.agent != 0) (void)outbox_.send(rank.agent, proto::CancelCommand{job});
  }
}

Reason Node::load(EngineHandle handle, const proto::TransferRequest& request, Nanos now) {
  tell_time(now);
  Engine* engine = find_engine(handle);
  const auto refuse = [&](Reason reason) {
    ++stats_.failed_loads[slot_of(reason)];
    call_off(engine, request.job);
    outbox_.send(handle, proto::JobResult{request.job, JobStatus::kFailed, reason});
    return reason;
  };
  if (engine == nullptr || engine->space == nullptr) return refuse(Reason::kNotReady);
  if (jobs_.contains({handle, request.job})) return Reason::kQueueFull;  // said twice: the first one counts
  if (jobs_.size() >= options_.jobs_max) return refuse(Reason::kQueueFull);
  const auto [sequence, problem] = sequence_of(*engine, request.sequence, request.base, request.keys);
  if (sequence == nullptr) return refuse(problem);
  const std::uint64_t end = std::uint64_t{request.first_block} + request.device_blocks.size();
  if (end > sequence->keys.size() || request.device_blocks.empty()) return refuse(Reason::kGone);
  refresh_match(*engine, *sequence, sequence->keys.size(), false, now);
  const std::uint32_t known = std::max(sequence->matched, sequence->remote_end);
  if (known <= request.first_block) return refuse(Reason::kGone);

  Space& space = *engine->space;
  const auto blocks = static_cast<std::uint32_t>(request.device_blocks.size());
  const std::uint32_t count = std::min(blocks, known - request.first_block);
  const std::uint32_t here = std::min(count, sequence->matched - std::min(sequence->matched, request.first_block));
  const auto device_blocks = std::span(request.device_blocks).first(count);
  std::vector<index::Slot> slots(count, index::kNoSlot);
  if (here > 0) space.index.collect(sequence->pin, kHostTier, request.first_block, std::span(slots).first(here));
  SlotRuns ready;
  const std::uint32_t missing = count - append_runs(space.slots, device_blocks, slots, 0, ready);
  if (missing > 0 && disk_ == nullptr && remote_ == nullptr) return refuse(Reason::kGone);
  sequence->leased = false;
  const JobKey key{handle, request.job};
  Job& job = start_job(handle, *engine, request, device::Direction::kToDevice, now);
  job.blocks = job.good = blocks;
  job.end = count;
  if (count < blocks) job.failure = Reason::kGone;
  job.missing = missing;
  if (missing > 0) {
    job.fetched.reserve(count);
    for (const index::Slot slot : slots) job.fetched.push_back(slot == index::kNoSlot);
  }
  job.pin = space.index.clone(sequence->pin);
  job.pinned = true;
  dispatch(key, job, ready, request.armed);
  if (missing > 0 && !job.failed) {
    engine->arrivals[request.job] = {sequence->arrives, sequence->compute};
    if (disk_ != nullptr && here > 0) {
      fetch_for(key, job, request, std::span(sequence->keys).subspan(request.first_block, here),
                std::span(slots).first(here));
    }
    if (here < count) import_for(key, job, request, sequence->keys);
  }
  finish_if_quiet(key, now);
  pump_disk();
  return Reason::kNone;
}

// Advances `begin` over the first `end` blocks of the sequence, as far as saves in flight carry them; returns the last
// such save.
Node::Parent Node::skip_in_flight(const Space& space, Sequence& sequence, std::size_t end, std::uint32_t& begin) const {
  Parent parent;
  if (sequence.carried.job && sequence.carried_end > begin && sequence.carried_end <= end) {
    const auto last = jobs_.find(*sequence.carried.job);
    if (last != jobs_.end() && !last->second->failed && last->second->generation == space.generation) {
      parent = sequence.carried;
      begin = sequence.carried_end;
    }
  }
  const std::span<const key::BlockKey> keys(sequence.keys.data(), end);
  while (begin < end) {
    const auto found = space.in_flight.find(keys[begin]);
    if (found == space.in_flight.end()) break;
    const Job& carrier = *jobs_.at(found->second);
    if (carrier.failed || carrier.generation != space.generation) break;  // it will keep nothing
    const auto& carried = carrier.keys;
    const auto rest = keys.subspan(begin);
    const auto common = std::mismatch(carried.begin(), carried.end(), rest.begin(), rest.end()).first - carried.begin();
    parent = {found->second, static_cast<std::uint32_t>(common)};
    begin += parent.blocks;
    if (parent.blocks == carried.size()) {
      sequence.carried = parent;
      sequence.carried_end = begin;
    }
  }
  return parent;
}

Reason Node::save(EngineHandle handle, const proto::TransferRequest& request, Nanos now) {
  tell_time(now);
  std::uint64_t wanted = request.device_blocks.size();
  Engine* engine = find_engine(handle);
  const auto refuse = [&](Reason reason) {
    stats_.unsaved_blocks[slot_of(reason)] += wanted;
    call_off(engine, request.job);
    outbox_.send(handle, proto::JobResult{request.job, JobStatus::kFailed, reason});
    return reason;
  };
  const auto nothing_to_do = [&] {
    call_off(engine, request.job);
    outbox_.send(handle, proto::JobResult{request.job, JobStatus::kDone, Reason::kNone});
    return Reason::kNone;
  };
  if (engine == nullptr || engine->space == nullptr) return refuse(Reason::kNotReady);
  if (jobs_.contains({handle, request.job})) return Reason::kQueueFull;  // said twice: the first one counts
  if (draining_) return refuse(Reason::kDraining);
  if (jobs_.size() >= options_.jobs_max) return refuse(Reason::kQueueFull);
  const auto [sequence, problem] = sequence_of(*engine, request.sequence, request.base, request.keys);
  if (sequence == nullptr) return refuse(problem);
  const std::uint64_t end = std::uint64_t{request.first_block} + request.device_blocks.size();
  if (end > sequence->keys.size()) return refuse(Reason::kParentMissing);
  Space& space = *engine->space;
  if (sequence->born != space.generation) return refuse(Reason::kReset);
  const auto& keys = sequence->keys;

  refresh_match(*engine, *sequence, end, false, now);
  if (sequence->matched >= end) return nothing_to_do();
  // Blocks that another save is carrying right now are its business; ours follow it.
  std::uint32_t begin = sequence->matched;
  const Parent parent = skip_in_flight(space, *sequence, end, begin);
  if (begin >= end) return nothing_to_do();
  wanted = end - std::max(begin, request.first_block);
  if (begin < request.first_block) return refuse(Reason::kParentMissing);
  const auto count = static_cast<std::uint32_t>(end - begin);

  Job& job = start_job(handle, *engine, request, device::Direction::kToHost, now);
  const JobKey job_key{handle, request.job};
  sequence->leased = false;
  // The parent must stay while we make room for its children.
  if (!parent.job) {
    job.pin = space.index.clone(sequence->pin);
    job.pinned = true;
  }
  const std::uint32_t granted = reserve(space, count, now);
  stats_.unsaved_blocks[slot_of(Reason::kPoolFull)] += count - granted;
  if (granted < count) job.failure = Reason::kPoolFull;  // and not failed, for what there is room for
  job.blocks = granted;
  job.on_commit = request.on_commit;
  job.keys.assign(keys.begin() + begin, keys.begin() + begin + granted);
  job.origin = {begin, static_cast<std::uint32_t>(keys.size()), std::min(sequence->found, begin), nullptr};
  if (job.origin.found > 0) job.last_found = keys[job.origin.found - 1];
  if (feed_ != nullptr) {
    job.descriptions.resize(granted);
    const auto& known = sequence->descriptions;
    for (std::size_t i = 0; i < granted && begin + i < known.size(); ++i) job.descriptions[i] = known[begin + i];
  }
  job.slots.reserve(granted);
  for (std::uint32_t i = 0; i < granted; ++i) job.slots.push_back(take_slot(space));
  space.reserved += granted;
  if (granted > 0) {
    space.in_flight.insert_or_assign(job.keys.front(), job_key);  // what failed is not followed any more
    sequence->carried = {job_key, granted};
    sequence->carried_end = begin + granted;
  }
  if (parent.job) {
    job.parent = parent.job;
    job.parent_blocks = parent.blocks;
    jobs_.at(*parent.job)->followers.push_back(job_key);
  }
  if (granted == 0) {
    job.failed = true;
    call_off(engine, request.job);
  } else {
    SlotRuns runs;
    append_runs(space.slots, std::span(request.device_blocks).subspan(begin - request.first_block, granted), job.slots,
                0, runs);
    dispatch(job_key, job, runs, request.armed);
  }
  finish_if_quiet(job_key, now);
  return granted == 0 ? Reason::kPoolFull : Reason::kNone;
}

void Node::cancel_ranks(JobKey key, Job& job) {
  if (job.deadline != 0) deadlines_.erase({job.deadline, key});
  job.deadline = 0;
  forsake_fetches(job);
  forsake_imports(job);
  Engine* engine = find_engine(key.first);
  for (std::uint32_t rank = 0; rank < job.waiting.size(); ++rank) {
    // A command that cannot be delivered is no loss: the agent has its own deadline and reports in the end.
    if (job.waiting[rank]) (void)outbox_.send(engine->ranks[rank].agent, proto::CancelCommand{key.second});
  }
}

void Node::cancel(EngineHandle handle, JobId id) {
  const auto found = jobs_.find({handle, id});
  if (found == jobs_.end()) return;
  const JobKey key = found->first;
  give_up(key, *found->second);
  if (found->second->on_commit) finish_if_quiet(key, now_);
  pump_disk();
}

void Node::commit(EngineHandle handle, JobId id, Nanos now) {
  tell_time(now);
  const auto found = jobs_.find({handle, id});
  if (found == jobs_.end() || !found->second->told) return;
  found->second->on_commit = false;
  finish_if_quiet(found->first, now);
  pump_disk();
}

// Of a save that is copied, and whose parent is kept: whether its client has still to say that it is to be kept, too.
bool Node::awaits_commit(JobKey key, Job& job) {
  if (!job.on_commit || job.failed) return false;
  if (!std::exchange(job.told, true)) {
    if (job.deadline != 0) deadlines_.erase({job.deadline, key});
    job.deadline = 0;
    outbox_.send(key.first, proto::JobResult{key.second, JobStatus::kDone, job.failure});
  }
  return true;
}

void Node::give_up(JobKey key, Job& job) {
  if (job.failed) return;
  job.failed = true;
  job.failure = Reason::kCanceled;
  cancel_ranks(key, job);
}

void Node::rank_done(JobKey key, Job& job, std::uint32_t rank, const proto::JobReport& report, Nanos now) {
  if (rank >= job.waiting.size() || !job.waiting[rank]) return;  // late or repeated
  job.waiting[rank] = false;
  --job.waiting_count;
  job.good = std::min(job.good, report.good_blocks);
  // Done before it was told all it has to do, or without all of it: the rank is confused.
  const bool load = job.direction == device::Direction::kToDevice;
  const bool complete = job.missing == 0 && (!load || report.good_blocks >= job.end);
  if ((report.status != JobStatus::kDone || !complete) && !job.failed) {
    job.failed = true;
    job.failure = report.status == JobStatus::kCanceled ? Reason::kCanceled : Reason::kRankFailed;
    cancel_ranks(key, job);
  }
  if (!report.sums.empty() && !load) note_sums(key, job, rank, report.sums);
  finish_if_quiet(key, now);
}

void Node::on_report(AgentHandle handle, const proto::JobReport& report, Nanos now) {
  tell_time(now);
  const auto agent = agents_.find(handle);
  if (agent == agents_.end()) return;
  const JobKey key{agent->second.engine, report.job};
  const auto job = jobs_.find(key);
  if (job != jobs_.end()) rank_done(key, *job->second, agent->second.rank, report, now);
  pump_disk();
}

// Also finishes what waited for this job, and so on; in a loop, because such a chain may be as long as jobs_max.
void Node::finish_if_quiet(JobKey first, Nanos now) {
  std::vector<JobKey> candidates{first};
  while (!candidates.empty()) {
    const JobKey key = candidates.back();
    candidates.pop_back();
    Job& job = *jobs_.at(key);
    // A filled save whose parent is still being written waits for it: a block is never visible before its prefix.
    if (job.waiting_count > 0 || (!job.failed && (job.parent || job.missing > 0))) continue;
    if (awaits_commit(key, job)) continue;
    if (job.direction == device::Direction::kToHost) publish_or_drop(job, now);
    const std::vector<JobKey> followers = retire(key, now);
    candidates.insert(candidates.end(), followers.begin(), followers.end());
  }
}

void Node::publish_or_drop(Job& job, Nanos now) {
  Space& space = *job.space;
  if (!job.keys.empty()) {
    const auto own = space.in_flight.find(job.keys.front());
    if (own != space.in_flight.end() && jobs_.at(own->second).get() == &job) space.in_flight.erase(own);
  }
  space.reserved -= job.blocks;
  if (job.generation != space.generation && !job.failed) {
    job.failed = true;
    job.failure = Reason::kReset;
  }
  if (job.failed) {
    for (const index::Slot slot : job.slots) space.slots.give_back(slot);
  } else {
    std::vector<index::Slot> rejected;
    index::PinId base = space.index.clone(job.pin);
    space.index.insert(job.pin, kHostTier, job.keys, job.slots, now, rejected);
    for (const index::Slot slot : rejected) space.slots.give_back(slot);
    describe_saved(job);
    note_saved(job);
    write_behind(space, job.pin);
    store_beyond(space, job.pin);
    if (store_ != nullptr && store_->offers) store_->offers->again = true;
    for (const JobKey& follower_key : job.followers) {
      Job& follower = *jobs_.at(follower_key);
      const auto match =
          space.index.extend(space.index.clone(base), std::span(job.keys).first(follower.parent_blocks), false, now);
      follower.pin = match.pin;
      follower.pinned = true;
      if (match.block_count != follower.parent_blocks) {
        follower.failed = true;
        follower.failure = Reason::kParentMissing;
      }
      follower.parent.reset();
    }
    drop_pin(space, base);
  }
  // Continuations of what was not kept cannot be reached; their slots come back when their ranks are quiet.
  for (const JobKey& follower_key : job.followers) {
    Job& follower = *jobs_.at(follower_key);
    follower.parent.reset();
    if (job.failed && !follower.failed) {
      follower.failed = true;
      follower.failure = Reason::kParentMissing;
      cancel_ranks(follower_key, follower);
    }
  }
}

// Forgets the job; returns those that waited for it.
std::vector<Node::JobKey> Node::retire(JobKey key, Nanos now) {
  const std::unique_ptr<Job> job = std::move(jobs_.extract(key).mapped());
  give_back_damaged(*job->space);
  if (job->deadline != 0) deadlines_.erase({job->deadline, key});
  if (job->pinned) drop_pin(*job->space, job->pin);
  if (job->parent) std::erase(jobs_.at(*job->parent)->followers, key);
  --job->space->jobs;
  if (Engine* engine = find_engine(key.first)) {
    if (const auto arrival = engine->arrivals.extract(key.second); !arrival.empty()) {
      engine->computes_until = std::max(engine->computes_until, now) + arrival.mapped().compute;
    }
  }
  const bool save = job->direction == device::Direction::kToHost;
  DirectionStats& direction = save ? stats_.to_host : stats_.to_device;
  // However a load ended, what has come is good.
  const std::uint32_t good = save ? 0 : job->good;
  const bool failed = save ? job->failed : good < job->blocks;
  const std::uint32_t completed = save && failed ? 0 : save ? job->blocks : good;
  ++direction.jobs;
  direction.blocks += completed;
  direction.bytes += completed * job->block_bytes;
  if (!failed) {
    direction.latency.record(now - job->started_at);
    if (save) stats_.blocks_saved += job->blocks;
  } else {
    ++direction.failed_jobs;
    if (save) {
      stats_.unsaved_blocks[slot_of(job->failure)] += job->blocks;
    } else {
      ++stats_.failed_loads[slot_of(job->failure)];
      stats_.blocks_of_failed_loads += good;
    }
  }
  if (job->told) return std::move(job->followers);
  const Reason reason = save || failed ? job->failure : Reason::kNone;
  outbox_.send(key.first, proto::JobResult{key.second, failed ? JobStatus::kFailed : JobStatus::kDone, reason, good});
  return std::move(job->followers);
}

// ---- time and reset ------------------------------------------------------------------------------------------------

std::optional<Nanos> Node::next_deadline() const {
  std::optional<Nanos> next;
  if (!deadlines_.empty()) next = deadlines_.begin()->first;
  if (!loan_deadlines_.empty()) {
    const Nanos loans = loan_deadlines_.begin()->first;
    next = std::min(next.value_or(loans), loans);
  }
  if (const auto check = disk_ == nullptr ? std::nullopt : next_check()) next = std::min(next.value_or(*check), *check);
  if (const auto store = store_deadline()) next = std::min(next.value_or(*store), *store);
  const auto beyond = remote_ == nullptr ? std::nullopt : remote_->port.next_time();
  if (beyond) next = std::min(next.value_or(*beyond), *beyond);
  return next;
}

void Node::on_time(Nanos now) {
  tell_time(now);
  if (remote_ != nullptr) remote_->port.on_time(now);
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    const JobKey key = deadlines_.begin()->second;
    Job& job = *jobs_.at(key);
    if (!job.failed) {
      job.failed = true;
      job.failure = Reason::kDeadline;
    }
    cancel_ranks(key, job);  // also takes the deadline off
    finish_if_quiet(key, now);
  }
  while (!loan_deadlines_.empty() && loan_deadlines_.begin()->first <= now) {
    const LoanId id = loan_deadlines_.begin()->second;
    Lent& lent = *loans_.at(id);
    lent.limit = Loan::Limit::kDeadline;
    answer(id, lent);
  }
  pump_store();
  pump_disk();
}

void Node::clear(Space& space, Nanos now) {
  ++space.generation;
  disown_imports(space);
  disown_store_runs(space);
  space.index.clear(now, evicted_);
  give_back_evicted(space);
  if (disk_ != nullptr) disk_->port.reset_space(space.number);
}

void Node::reset(EngineHandle handle, Nanos now) {
  const Engine* engine = find_engine(handle);
  if (engine == nullptr) return;
  ++stats_.resets;
  // Found by model, not by what the engine is bound to: while one of its ranks is away that is nothing, and what it
  // saved before would be served again when the rank is back.
  for (const auto& space : spaces_) {
    if (space->fingerprint == engine->fingerprint) clear(*space, now);
  }
  if (disk_ != nullptr) disk_->port.reset_closed_spaces(model_name(engine->fingerprint));
  // What is beyond the machine stays: the engine has other keys from now on (docs/decisions/0013).
}

void Node::reset_all(ResetId reset, Nanos now) {
  reset_here(now);
  if (remote_ != nullptr) remote_->port.reset(reset);
}

void Node::reset_here(Nanos now) {
  ++stats_.resets;
  for (const auto& space : spaces_) clear(*space, now);
  std::erase_if(spaces_, [&](const auto& space) {
    if (!idle(*space)) return false;
    close_ports(*space);
    return true;
  });
  if (disk_ != nullptr) disk_->port.reset_closed_spaces(std::nullopt);
}

}  // namespace flexkv::node
