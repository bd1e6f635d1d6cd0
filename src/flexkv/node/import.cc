// From beyond the machine to host memory: what other nodes have behind a match.

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: what imports that nobody waits for may take at once.
constexpr std::uint64_t kPrefetchShare = 25;

}  // namespace

// ---- what there is, and whether it is worth it ---------------------------------------------------------------------

// How many leading ones of `keys` are on their way; `bytes`: what of them has not come yet.
std::uint32_t Node::coming(const Space& space, std::span<const key::BlockKey> keys, double& bytes) const {
  std::uint32_t count = 0;
  for (const key::BlockKey& key : keys) {
    const auto found = space.importing.find(key);
    if (found == space.importing.end()) break;
    const auto [op, block] = found->second;
    const Import& import = *remote_->imports.at(op);
    if (import.canceled) break;
    if (block >= import.arrived) bytes += static_cast<double>(space.slots.slot_bytes());
    ++count;
  }
  return count;
}

// What it takes the engine to compute the last block of the prompt, the one that costs most; 0: not known.
double Node::block_nanos(const Engine& engine, const Sequence& sequence) const {
  if (options_.always_load || !engine.prefill.known() || engine.block_tokens == 0) return 0;
  const double tokens = engine.block_tokens;
  const double context = tokens * static_cast<double>(sequence.keys.size() - 1);
  return engine.prefill.per_token * tokens + engine.prefill.per_pair * plan::PrefillTime::pairs(tokens, context);
}

// Adds to what is served here what is beyond the machine, if that is expected to be faster than computing it.
void Node::look_beyond(Engine& engine, Sequence& sequence, Served& served) {
  sequence.remote_end = 0;
  Lookup& found = served.lookup;
  const std::uint32_t here = sequence.matched;
  if (remote_ == nullptr || found.matched_blocks < here || here == sequence.keys.size()) return;
  const Space& space = *engine.space;
  const std::span<const key::BlockKey> keys(sequence.keys);
  double bytes = 0;
  std::uint32_t blocks = coming(space, keys.subspan(here), bytes);
  RemoteFound more;
  if (here + blocks < keys.size()) {
    more = remote_->port.find(space.number, keys, here + blocks, block_nanos(engine, sequence), now_);
  }
  blocks += more.blocks;
  const std::uint32_t room = room_for_prompt(space);
  if (here + blocks > room) {
    blocks = room - std::min(room, here);
    found.reason = Reason::kNoRoomToLoad;
  }
  // What the engine has itself is not loaded.
  if (blocks == 0 || here + blocks <= sequence.engine_blocks) return;

  bytes += static_cast<double>(more.blocks) * static_cast<double>(space.slots.slot_bytes());
  double arrives = from_now(served.arrives);
  if (more.bytes_per_second > 0) {
    const double reads = static_cast<double>(more.wait) + bytes / more.bytes_per_second * static_cast<double>(kSecond);
    arrives = std::max(arrives, reads);
    if (!options_.always_load && engine.prefill.known() && engine.block_tokens > 0) {
      auto& stretches = remote_->stretches;
      stretches.clear();
      if (here > 0) stretches.push_back({here, from_now(served.arrives), 0});
      stretches.push_back({blocks, arrives, 0});
      if (choose_load(engine, sequence, stretches, engine.announced).blocks <= here) {
        found.reason = Reason::kNotWorthLoading;
        return;
      }
    }
  }
  sequence.remote_end = here + blocks;
  served.arrives = now_ + static_cast<Nanos>(arrives);
  found.matched_blocks += blocks;
  found.disk_blocks += blocks;
  found.remote_blocks = blocks;
}

// ---- reading -------------------------------------------------------------------------------------------------------

// Of the chain `keys`, blocks [first, end), as far as there is room: null if there is none. Takes the pin over, which
// is on the chain, before `first`.
Node::Import* Node::begin_import(Space& space, std::span<const key::BlockKey> keys, index::PinId pin,
                                 std::uint32_t first, std::uint32_t end) {
  const std::uint32_t count = reserve(space, end - first, now_);
  if (count == 0) {
    drop_pin(space, pin);
    return nullptr;
  }
  auto created = std::make_unique<Import>();
  Import& import = *created;
  import.space = &space;
  import.generation = space.generation;
  import.op = remote_->next_op++;
  import.chain.assign(keys.begin(), keys.begin() + first + count);
  import.first = first;
  import.pin = pin;
  import.waiters.resize(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    import.slots.push_back(take_slot(space));
    space.importing[import.chain[first + i]] = {import.op, i};
  }
  ++space.imports;
  remote_->imports.emplace(import.op, std::move(created));
  ask_remote(import);
  return &import;
}

// For those of its blocks that have not come.
void Node::ask_remote(Import& import) {
  import.asked_from = import.arrived;
  import.begun = now_;
  RemoteRead read;
  read.op = import.op;
  read.space = import.space->number;
  read.keys = import.chain;
  read.first = import.first + import.arrived;
  for (std::uint32_t i = import.arrived; i < import.blocks(); ++i) {
    read.host_offsets.push_back(import.space->slots.offset(import.slots[i]));
  }
  read.deadline = now_ + options_.load_timeout;
  remote_->port.read(std::move(read));
}

// Of a request that waits for its turn, as far as such imports may take room.
void Node::import_ahead(Space& space, const Sequence& sequence) {
  double bytes = 0;
  const std::span<const key::BlockKey> keys(sequence.keys);
  const std::uint32_t first = sequence.matched + coming(space, keys.subspan(sequence.matched), bytes);
  const std::uint64_t most = options_.pool_bytes * kPrefetchShare / 100;
  const std::uint64_t room = (most - std::min(most, remote_->prefetching_bytes)) / space.slots.slot_bytes();
  const auto end = static_cast<std::uint32_t>(std::min<std::uint64_t>(sequence.remote_end, first + room));
  std::uint32_t stop = first;
  while (stop < end && !space.importing.contains(keys[stop])) ++stop;
  if (stop == first) return;
  Import* import = begin_import(space, keys, space.index.clone(sequence.pin), first, stop);
  if (import == nullptr) return;
  import->prefetch = true;
  remote_->prefetching_bytes += import->blocks() * space.slots.slot_bytes();
}

void Node::end_prefetch(Import& import) {
  if (!std::exchange(import.prefetch, false)) return;
  remote_->prefetching_bytes -= import.waiters.size() * import.space->slots.slot_bytes();
}

// Has the load's blocks brought that the index does not know: from number `here` on of its own.
void Node::import_for(JobKey job_key, Job& job, const proto::TransferRequest& request,
                      std::span<const key::BlockKey> keys) {
  Space& space = *job.space;
  const auto end = request.first_block + static_cast<std::uint32_t>(job.fetched.size());
  // Also what comes before those of the load: without it they could not be found afterwards.
  const std::uint32_t depth = space.index.depth(job.pin);
  const std::uint32_t first_missing = std::max(depth, request.first_block) - request.first_block;
  for (std::uint32_t block = depth; block < end;) {
    const auto found = space.importing.find(keys[block]);
    if (found == space.importing.end()) {
      std::uint32_t stop = block + 1;
      while (stop < end && !space.importing.contains(keys[stop])) ++stop;
      if (begin_import(space, keys, space.index.clone(job.pin), block, stop) != nullptr) continue;
      const std::uint32_t at = std::max(block, request.first_block) - request.first_block;
      return cut(job_key, job, at, Reason::kNoRoomToLoad);
    }
    const auto [op, number] = found->second;
    Import& import = *remote_->imports.at(op);
    end_prefetch(import);
    if (block >= request.first_block) {
      const std::uint32_t at = block - request.first_block;
      import.waiters[number].push_back({job_key, at, request.device_blocks[at]});
    } else {
      import.waiters[number].push_back({job_key, first_missing, 0, true});
    }
    ++block;
  }
}

bool Node::awaited(const Import& import) const {
  return std::ranges::any_of(import.waiters, [&](const auto& waiters) {
    return std::ranges::any_of(waiters, [&](const Waiter& one) { return waiting_job(one.job, one.at) != nullptr; });
  });
}

// The job waits for less than before: what nobody waits for any more need not be read.
void Node::forsake_imports(const Job& job) {
  if (job.space->imports == 0) return;
  for (auto& [op, import] : remote_->imports) {
    if (import->space != job.space || import->prefetch || !import->reading || import->canceled) continue;
    if (awaited(*import)) continue;
    import->canceled = true;
    remote_->port.cancel(op);
  }
}

// ---- what comes ----------------------------------------------------------------------------------------------------

void Node::on_remote_block(RemoteOp op, std::uint32_t index, Nanos now) {
  tell_time(now);
  const auto found = remote_->imports.find(op);
  FLEXKV_ASSERT(found != remote_->imports.end());
  Import& import = *found->second;
  FLEXKV_ASSERT(import.reading && import.asked_from + index == import.arrived && import.arrived < import.blocks());
  ++import.arrived;
  ++stats_.from_remote.blocks;
  stats_.from_remote.bytes += import.space->slots.slot_bytes();
  stats_.from_remote.latency.record(now_ - import.begun);
  std::vector<JobKey> arrived;
  publish_all(*import.space, arrived);
  send_arrived(arrived);
}

void Node::on_remote_end(RemoteOp op, RemoteOutcome outcome, Nanos now) {
  tell_time(now);
  const auto found = remote_->imports.find(op);
  FLEXKV_ASSERT(found != remote_->imports.end());
  Import& import = *found->second;
  Space& space = *import.space;
  FLEXKV_ASSERT(import.reading);
  import.reading = false;
  const bool canceled = std::exchange(import.canceled, false);
  const bool all = import.arrived == import.blocks();
  if (!all && canceled && import.generation == space.generation && awaited(import)) {
    // By who came after it was canceled.
    std::unique_ptr<Import> again = std::move(remote_->imports.extract(found).mapped());
    again->op = remote_->next_op++;
    again->reading = true;
    for (auto& [key, where] : space.importing) {
      if (where.first == op) where.first = again->op;
    }
    Import& moved = *(remote_->imports[again->op] = std::move(again));
    return ask_remote(moved);
  }
  const bool reset = import.generation != space.generation;
  give_up_rest(import, import.arrived, reset ? Reason::kReset : reason_of(outcome));
  std::vector<JobKey> arrived;
  publish_all(space, arrived);
  send_arrived(arrived);
  sweep_imports(space);
  pump_disk();
}

// Blocks that have come, as far as what precedes them is in the index.
void Node::publish(Import& import, std::vector<JobKey>& arrived) {
  Space& space = *import.space;
  if (import.published == import.arrived || import.generation != space.generation) return;
  const std::span<const key::BlockKey> chain(import.chain);
  const std::uint32_t next = import.first + import.published;
  std::uint32_t depth = space.index.depth(import.pin);
  if (depth < next) {
    depth += space.index.extend(import.pin, chain.subspan(depth, next - depth), false, now_).block_count;
    if (depth < next) return;
  }
  const std::uint32_t count = import.arrived - import.published;
  std::vector<index::Slot> rejected;
  space.index.insert(import.pin, kHostTier, chain.subspan(next, count),
                     std::span(import.slots).subspan(import.published, count), now_, rejected);
  for (const index::Slot slot : rejected) space.slots.give_back(slot);
  if (store_ != nullptr && store_->offers) store_->offers->again = true;
  for (std::uint32_t i = import.published; i < import.arrived; ++i) {
    import.slots[i] = index::kNoSlot;
    space.importing.erase(chain[import.first + i]);  // its own, as it is of this generation
  }
  const std::uint32_t first = std::exchange(import.published, import.arrived);
  for (std::uint32_t i = first; i < import.published; ++i) {
    for (const Waiter& waiter : std::exchange(import.waiters[i], {})) {
      if (deliver(import, i, waiter)) arrived.push_back(waiter.job);
    }
  }
}

// What one of them brings may be what others wait for.
void Node::publish_all(const Space& space, std::vector<JobKey>& arrived) {
  for (bool more = true; std::exchange(more, false);) {
    for (auto& [op, import] : remote_->imports) {
      if (import->space != &space) continue;
      const std::uint32_t before = import->published;
      publish(*import, arrived);
      more |= import->published > before;
    }
  }
}

// A block that is in the index now. From here on the load's own pin keeps it.
bool Node::deliver(const Import& import, std::uint32_t block, const Waiter& waiter) {
  Job* job = waiting_job(waiter.job, waiter.at);
  if (job == nullptr || waiter.precedes) return false;
  Space& space = *import.space;
  const std::uint32_t end = import.first + block + 1;
  std::uint32_t depth = space.index.depth(job->pin);
  if (depth < end) {
    depth += space.index.extend(job->pin, std::span(import.chain).subspan(depth, end - depth), false, now_).block_count;
  }
  index::Slot slot = index::kNoSlot;
  if (depth >= end) space.index.collect(job->pin, kHostTier, end - 1, {&slot, 1});
  if (slot == index::kNoSlot) {
    cut(waiter.job, *job, waiter.at, Reason::kGone);
    return false;
  }
  append_runs(space.slots, {&waiter.device_block, 1}, {&slot, 1}, waiter.at, job->arrived);
  job->fetched[waiter.at] = false;
  --job->missing;
  return true;
}

// ---- what does not come --------------------------------------------------------------------------------------------

// Of its blocks, those from `from` on. REQUIRES: the port does not have them
void Node::give_up_rest(Import& import, std::uint32_t from, Reason reason) {
  Space& space = *import.space;
  end_prefetch(import);
  std::vector<Waiter> waiting;
  for (std::uint32_t i = from; i < import.blocks(); ++i) {
    space.slots.give_back(import.slots[i]);
    if (import.generation == space.generation) space.importing.erase(import.chain[import.first + i]);
    ++stats_.unimported_blocks[slot_of(reason)];
    waiting.insert(waiting.end(), import.waiters[i].begin(), import.waiters[i].end());
  }
  import.slots.resize(from);
  import.waiters.resize(from);
  import.chain.resize(import.first + from);
  import.arrived = std::min(import.arrived, from);
  for (const Waiter& waiter : waiting) {
    if (Job* job = waiting_job(waiter.job, waiter.at)) cut(waiter.job, *job, waiter.at, reason);
  }
}

// Those whose reads have ended: what is published, or cannot be any more.
void Node::sweep_imports(Space& space) {
  for (bool more = true; std::exchange(more, false);) {
    for (auto at = remote_->imports.begin(); at != remote_->imports.end();) {
      Import& import = *at->second;
      if (import.space != &space || import.reading) {
        ++at;
        continue;
      }
      const bool reset = import.generation != space.generation;
      if (import.published < import.blocks() && !reset) {
        // Somebody else brings what precedes them.
        const auto before = space.importing.find(import.chain[space.index.depth(import.pin)]);
        if (before != space.importing.end() && before->second.first != import.op) {
          ++at;
          continue;
        }
      }
      give_up_rest(import, import.published, reset ? Reason::kReset : Reason::kParentMissing);
      drop_pin(space, import.pin);
      --space.imports;
      at = remote_->imports.erase(at);
      more = true;
    }
  }
}

// Of before a reset: nobody is to wait for them any more, and what they bring is of no use.
void Node::disown_imports(Space& space) {
  space.importing.clear();
  if (space.imports == 0) return;
  for (auto& [op, import] : remote_->imports) {
    if (import->space != &space || !import->reading || std::exchange(import->canceled, true)) continue;
    remote_->port.cancel(op);
  }
}

// For check_invariants().
std::uint32_t Node::imported_slots(const Space& space) const {
  std::uint32_t count = 0;
  if (remote_ == nullptr) return count;
  std::uint32_t imports = 0;
  std::uint32_t current = 0;
  std::uint64_t prefetching = 0;
  for (const auto& [op, import] : remote_->imports) {
    if (import->prefetch) prefetching += import->waiters.size() * import->space->slots.slot_bytes();
    if (import->space != &space) continue;
    ++imports;
    for (std::uint32_t i = 0; i < import->blocks(); ++i) {
      FLEXKV_ASSERT((import->slots[i] != index::kNoSlot) == (i >= import->published));
      if (i < import->published) continue;
      ++count;
      if (import->generation != space.generation) continue;
      ++current;
      FLEXKV_ASSERT(space.importing.at(import->chain[import->first + i]) == std::pair(op, i));
    }
  }
  FLEXKV_ASSERT(imports == space.imports && current == space.importing.size());
  FLEXKV_ASSERT(prefetching == remote_->prefetching_bytes);
  return count;
}

}  // namespace flexkv::node
