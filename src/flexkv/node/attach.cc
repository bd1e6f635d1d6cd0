// Who is attached: engines, their ranks, and the space of blocks that an engine's shapes and model select.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "flexkv/base/assert.h"
#include "flexkv/key/namespace.h"
#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

std::uint64_t aligned(std::uint64_t bytes) {
  return (bytes + kExtentAlignment - 1) / kExtentAlignment * kExtentAlignment;
}

std::string hex_prefix(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte byte : bytes.first(6)) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", std::to_integer<unsigned>(byte));
    text += digits;
  }
  return text;
}

std::string form_of(const proto::AgentHello& hello) {
  return std::to_string(hello.shard_bytes) + " bytes in the layout " + hex_prefix(hello.layout_id);
}

}  // namespace

Node::Engine* Node::find_engine(EngineHandle handle) {
  const auto found = engines_.find(handle);
  return found == engines_.end() ? nullptr : found->second.get();
}

Result<Node::Engine*> Node::join_engine(const std::string& id, std::uint32_t rank_count) {
  if (id.empty() || rank_count == 0 || rank_count > proto::kRanksMax) {
    return Error{ErrorCode::kInvalidArgument, "engine '" + id + "' says it has " + std::to_string(rank_count) +
                                                  " ranks; allowed are 1 to " + std::to_string(proto::kRanksMax) +
                                                  " and a name that is not empty"};
  }
  for (auto& [handle, engine] : engines_) {
    if (engine->id != id) continue;
    if (engine->rank_count != rank_count) {
      return Error{ErrorCode::kInvalidArgument, "engine '" + id + "' is attached with " +
                                                    std::to_string(engine->rank_count) + " ranks, not with " +
                                                    std::to_string(rank_count) + ": two engines share one id"};
    }
    return engine.get();
  }
  auto engine = std::make_unique<Engine>();
  engine->handle = next_engine_++;
  engine->id = id;
  engine->rank_count = rank_count;
  engine->ranks.resize(rank_count);
  Engine* joined = engine.get();
  engines_.emplace(joined->handle, std::move(engine));
  return joined;
}

Result<EngineHandle> Node::attach_client(const proto::ClientHello& hello) {
  auto joined = join_engine(hello.engine_id, hello.rank_count);
  if (!joined) return joined.error();
  Engine& engine = *joined.value();
  if (engine.client) {
    return Error{ErrorCode::kInvalidArgument, "engine '" + hello.engine_id + "' has a scheduler attached already"};
  }
  engine.client = true;
  engine.model = hello.model;
  engine.fingerprint = hello.fingerprint;
  engine.block_tokens = hello.block_tokens;
  bind_space(engine);
  return engine.handle;
}

void Node::detach_client(EngineHandle handle) {
  Engine* engine = find_engine(handle);
  if (engine == nullptr || !engine->client) return;
  engine->client = false;
  std::vector<JobKey> uncommitted;
  for (auto job = jobs_.lower_bound({handle, 0}); job != jobs_.end() && job->first.first == handle; ++job) {
    // A save whose ranks are done only waits for its beginning, or for a word that nobody can say any more.
    const bool copied = job->second->direction == device::Direction::kToHost && job->second->waiting_count == 0;
    if (!copied || job->second->on_commit) give_up(job->first, *job->second);
    if (copied && job->second->on_commit) uncommitted.push_back(job->first);
  }
  for (const JobKey& key : uncommitted) {
    if (jobs_.contains(key)) finish_if_quiet(key, now_);
  }
  unbind_space(*engine);
  drop_engine_if_empty(handle);
  pump_disk();
}

Result<AgentHandle> Node::attach_agent(const proto::AgentHello& hello) {
  std::uint32_t rank_count = hello.rank_count;
  if (rank_count == 0) {
    const auto known = std::ranges::find_if(engines_, [&](const auto& e) { return e.second->id == hello.engine_id; });
    if (known == engines_.end()) {
      return Error{ErrorCode::kInvalidArgument, "rank " + std::to_string(hello.rank) +
                                                    " waits for the scheduler of engine '" + hello.engine_id +
                                                    "', which says how many ranks it has"};
    }
    rank_count = known->second->rank_count;
  }
  auto joined = join_engine(hello.engine_id, rank_count);
  if (!joined) return joined.error();
  Engine& engine = *joined.value();
  const auto refuse = [&](std::string message) {
    drop_engine_if_empty(engine.handle);
    return Error{ErrorCode::kInvalidArgument, std::move(message)};
  };
  const std::string who = "rank " + std::to_string(hello.rank) + " of engine '" + hello.engine_id + "'";
  if (hello.rank >= engine.rank_count) {
    return refuse(who + " is out of range: the engine has " + std::to_string(engine.rank_count) + " ranks");
  }
  if (engine.ranks[hello.rank].agent != 0) return refuse(who + " is attached already");
  if (hello.shard_bytes == 0 || hello.shard_bytes > options_.pool_bytes) {
    return refuse(who + " has blocks of " + std::to_string(hello.shard_bytes) + " bytes; the host pool has " +
                  std::to_string(options_.pool_bytes) + " bytes: raise cpu_cache_gb");
  }
  const std::uint32_t shard = hello.shard_number();
  if (shard >= engine.rank_count) {
    return refuse(who + " says it holds shard " + std::to_string(shard) + "; with " +
                  std::to_string(engine.rank_count) + " ranks shards are numbered from 0 to " +
                  std::to_string(engine.rank_count - 1));
  }
  for (const Engine::Rank& rank : engine.ranks) {
    if (rank.agent == 0 || rank.hello.shard_number() != shard) continue;
    if (rank.hello.shard_bytes == hello.shard_bytes && rank.hello.layout_id == hello.layout_id) continue;
    return refuse(who + " has blocks of " + form_of(hello) + ", rank " + std::to_string(rank.hello.rank) + " of " +
                  form_of(rank.hello) + ", though both say they hold shard " + std::to_string(shard) +
                  ": ranks that do not hold the same bytes must name different shards");
  }
  const AgentHandle handle = next_agent_++;
  engine.ranks[hello.rank].agent = handle;
  engine.ranks[hello.rank].hello = hello;
  agents_.emplace(handle, Agent{engine.handle, hello.rank});
  bind_space(engine);
  return handle;
}

void Node::detach_agent(AgentHandle handle, Nanos now) {
  const auto found = agents_.find(handle);
  if (found == agents_.end()) return;
  tell_time(now);
  const auto [engine_handle, rank] = found->second;
  Engine& engine = *find_engine(engine_handle);
  engine.ranks[rank].agent = 0;
  agents_.erase(found);
  unbind_space(engine);
  // A rank that is gone touches no memory any more: its part of each job has ended, unsuccessfully.
  std::vector<JobKey> waiting;
  for (auto job = jobs_.lower_bound({engine_handle, 0}); job != jobs_.end() && job->first.first == engine_handle;
       ++job) {
    if (job->second->waiting[rank]) waiting.push_back(job->first);
  }
  for (const JobKey& key : waiting) {
    const auto job = jobs_.find(key);
    if (job != jobs_.end()) rank_done(key, *job->second, rank, {key.second, JobStatus::kFailed}, now);
  }
  drop_engine_if_empty(engine_handle);
  pump_disk();
}

EngineHandle Node::engine_of(AgentHandle agent) const {
  const auto found = agents_.find(agent);
  return found == agents_.end() ? 0 : found->second.engine;
}

void Node::drop_engine_if_empty(EngineHandle handle) {
  Engine* engine = find_engine(handle);
  if (engine == nullptr || engine->client || engine->ranks_attached() > 0) return;
  engines_.erase(handle);
}

// Served once its scheduler and all its ranks are there: only then is it known what a block is.
void Node::bind_space(Engine& engine) {
  if (engine.space != nullptr || !engine.client || engine.ranks_attached() < engine.rank_count) return;
  engine.space = open_space(engine);
  if (engine.space != nullptr) ++engine.space->engines;
}

void Node::unbind_space(Engine& engine) {
  if (engine.space == nullptr) return;
  for (auto& [id, sequence] : engine.sequences) close(engine, sequence);
  engine.sequences.clear();
  --engine.space->engines;
  engine.space = nullptr;
}

// In a slot the shards follow one another by their numbers. How many ranks hold each is no matter of the space.
Node::Space* Node::open_space(Engine& engine) {
  // No secret: a space is not a key, only the name of a place.
  key::NamespaceBuilder digest_of(std::array<std::uint8_t, 32>{});
  digest_of.add(key::Field::kModel, engine.fingerprint);
  std::uint64_t slot_bytes = 0;
  std::uint64_t block_bytes = 0;
  std::vector<SlotSums::Shard> shards;
  std::map<std::uint32_t, std::vector<Engine::Rank*>> holders;
  for (Engine::Rank& rank : engine.ranks) holders[rank.hello.shard_number()].push_back(&rank);
  for (const auto& [shard, ranks] : holders) {
    const proto::AgentHello& hello = ranks.front()->hello;
    digest_of.add(key::Field::kLayout, hello.layout_id);
    digest_of.add(key::Field::kParallel, std::as_bytes(std::span(&hello.shard_bytes, 1)));
    for (std::uint32_t holder = 0; holder < ranks.size(); ++holder) {
      ranks[holder]->host_offset = slot_bytes;
      ranks[holder]->shard_place = static_cast<std::uint32_t>(shards.size());
      ranks[holder]->holder_count = static_cast<std::uint32_t>(ranks.size());
      ranks[holder]->holder = holder;
    }
    shards.push_back({slot_bytes, hello.shard_bytes});
    slot_bytes += aligned(hello.shard_bytes);
    block_bytes += hello.shard_bytes;
  }
  const key::Root digest = digest_of.finish();
  for (const auto& space : spaces_) {
    if (space->digest == digest) return space.get();
  }
  index::PrefixIndex::Options index_options;
  index_options.tier_count = disk_ == nullptr ? 1 : 2;
  index_options.policy[kHostTier] = index_options.policy[kDiskTier] = options_.policy;
  index_options.ghost_count_max = std::clamp<std::uint64_t>(options_.pool_bytes / slot_bytes, 1024, 1U << 22);
  auto space = std::make_unique<Space>(ranges_, slot_bytes, options_.pool_bytes, index_options, std::move(shards));
  space->digest = digest;
  space->fingerprint = engine.fingerprint;
  space->model = engine.model;
  space->block_bytes = block_bytes;
  space->number = next_space_++;
  const ModelName model = model_name(engine.fingerprint);
  std::ranges::copy(model, space->name.begin());
  std::copy_n(digest.begin(), space->name.size() - model.size(), space->name.begin() + model.size());
  if (remote_ != nullptr) remote_->port.open_space(space->number, space->name, slot_bytes);
  open_feed(*space);
  if (disk_ != nullptr) open_disk(*space, engine.block_tokens);
  if (store_ != nullptr) space->store_admission.emplace(admission_of(*space, engine.block_tokens));
  spaces_.push_back(std::move(space));
  return spaces_.back().get();
}

// Nobody uses it: its host memory, and its drives' slots, can be given to others.
bool Node::idle(const Space& space) const {
  return space.engines == 0 && space.jobs == 0 && space.paths == 0 && space.imports == 0 && space.loans == 0 &&
         space.storing == 0 && space.disk_state != Space::DiskState::kOpening;
}

// ---- views ---------------------------------------------------------------------------------------------------------

bool Node::ready(EngineHandle handle) const {
  const auto found = engines_.find(handle);
  return found != engines_.end() && found->second->space != nullptr;
}

std::uint32_t Node::blocks_in_use() const {
  std::uint32_t sum = 0;
  for (const auto& space : spaces_) sum += space->slots.slot_count() - space->slots.free_count();
  return sum;
}

std::vector<Node::EngineInfo> Node::engines() const {
  std::vector<EngineInfo> infos;
  for (const auto& [handle, engine] : engines_) {
    infos.push_back({handle, engine->id, engine->model, engine->client, engine->rank_count, engine->ranks_attached(),
                     static_cast<std::uint32_t>(engine->sequences.size()), engine->space != nullptr, engine->prefill});
  }
  return infos;
}

std::vector<Node::SpaceInfo> Node::spaces() const {
  std::vector<SpaceInfo> infos;
  for (const auto& space : spaces_) {
    infos.push_back({hex_prefix(std::as_bytes(std::span(space->digest))), space->model, space->block_bytes,
                     space->slots.slot_bytes(), space->slots.slot_count(),
                     space->slots.slot_count() - space->slots.free_count(), space->reserved,
                     space->index.memory_bytes() + space->sums.memory_bytes(), space->engines,
                     space->disk_slots ? space->disk_slots->capacity() : 0,
                     space->disk_slots ? space->disk_slots->used() : 0, space->disk_state == Space::DiskState::kOpening,
                     space->admission ? space->admission->stats() : admission::AdmissionFilter::Stats{},
                     space->store_admission ? space->store_admission->stats() : admission::AdmissionFilter::Stats{}});
  }
  return infos;
}

Node::DiskQueues Node::disk_queues() const {
  DiskQueues queues;
  if (disk_ == nullptr) return queues;
  for (const auto& space : spaces_) {
    queues.fetches += static_cast<std::uint32_t>(space->fetches.size());
    queues.writes += static_cast<std::uint32_t>(space->writing.size());
  }
  for (const auto& run : disk_->write_runs) queues.writes += run.end - run.next;
  return queues;
}

void Node::check_invariants() const {
  std::uint64_t keys = 0;
  for (const auto& [handle, engine] : engines_) {
    for (const auto& [id, sequence] : engine->sequences) keys += sequence.keys.size();
  }
  FLEXKV_ASSERT(keys == sequence_keys_);
  for (const auto& space : spaces_) {
    space->index.check_invariants();
    std::uint32_t reserved = 0;
    std::uint32_t jobs = 0;
    for (const auto& [key, job] : jobs_) {
      if (job->space != space.get()) continue;
      ++jobs;
      reserved += static_cast<std::uint32_t>(job->slots.size());
    }
    FLEXKV_ASSERT(reserved == space->reserved);
    FLEXKV_ASSERT(jobs == space->jobs);
    std::uint32_t fetching = 0;
    for (const auto& [key, fetch] : space->fetches) fetching += fetch.host != index::kNoSlot;
    FLEXKV_ASSERT(fetching == space->fetching);
    FLEXKV_ASSERT(loans_of(*space) == space->loans);
    const std::uint32_t importing = imported_slots(*space);
    const std::uint32_t used = space->slots.slot_count() - space->slots.free_count();
    FLEXKV_ASSERT(used ==
                  reserved + fetching + importing + space->damaged.size() + space->index.block_count(kHostTier));
    if (space->disk_slots) {
      const auto dropped = std::ranges::count_if(
          disk_->ios, [&](const auto& entry) { return entry.second.space == space.get() && entry.second.dropped; });
      FLEXKV_ASSERT(space->disk_slots->used() ==
                    space->writing.size() + space->index.block_count(kDiskTier) + static_cast<std::uint64_t>(dropped));
    }
  }
  if (disk_ != nullptr) check_disk_invariants();
  if (store_ != nullptr) check_store_invariants();
}

}  // namespace flexkv::node
