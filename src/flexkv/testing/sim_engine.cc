// The engine's scheduler.
#include "flexkv/testing/sim_engine.h"

#include <algorithm>
#include <cstring>

#include "flexkv/testing/sim_kv.h"
#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {

SimEngine::SimEngine(SimWorld& world, std::uint32_t kind, std::uint64_t id)
    : world_(world), loop_(world.loop()), plan_(world.plan()), kind_(kind), id_(id), blocks_(plan_.device_blocks) {}

SimEngine::~SimEngine() { die(); }

void SimEngine::start() {
  const SimPlan::Kind& kind = plan_.kinds[kind_];
  proto::ClientHello hello;
  hello.engine_id = "engine" + std::to_string(id_);
  hello.rank_count = kind.ranks;
  hello.model = "model" + std::to_string(kind.model);
  hello.block_tokens = kBlockTokens;
  hello.fingerprint[0] = static_cast<std::byte>(kind.model + 1);
  for (std::uint32_t rank = 0; rank < kind.ranks; ++rank) {
    proto::AgentHello agent;
    agent.engine_id = hello.engine_id;
    agent.rank = rank;
    agent.rank_count = kind.ranks;
    agent.layout_id[0] = static_cast<std::byte>(kind.layers);
    agent.shard_bytes = kind.shard_bytes();
    agent.block_count = plan_.device_blocks;
    agent.shard = kind.shard_of(rank);
    SimRank::Callbacks callbacks;
    callbacks.ready_for_forward = [this](std::uint64_t step) { rank_ready(step); };
    callbacks.step_done = [this](std::uint64_t step, const StepReport& report) {
      later(loop_.delay(plan_.message_delay / 4), [step, report](SimEngine& self) { self.rank_done(step, report); });
    };
    ranks_.push_back(std::make_shared<SimRank>(world_, kind, agent, std::move(callbacks)));
    ranks_.back()->start();
  }
  auto port = std::make_unique<SimPort>(world_, hello);
  port_ = port.get();
  client_ = std::make_unique<client::Client>(std::move(port), hello, (id_ << 32) + 1);
  tick();
}

void SimEngine::later(Nanos delay, std::function<void(SimEngine&)> action) {
  loop_.after(delay, [weak = weak_from_this(), action = std::move(action)] {
    if (const auto self = weak.lock(); self != nullptr && !self->dead_) action(*self);
  });
}

void SimEngine::die() {
  if (dead_) return;
  dead_ = true;
  loop_.note("engine: dies", id_);
  client_.reset();
  for (const auto& rank : ranks_) rank->stop();
}

// A worker that is gone takes its engine along, as soon as the engine notices.
void SimEngine::kill_rank(std::uint64_t rank) {
  ranks_[rank % ranks_.size()]->stop();
  later(loop_.delay(10 * kMillisecond), [](SimEngine& self) { self.die(); });
}

bool SimEngine::idle() const {
  return requests_.empty() && steps_.empty() && loads_.empty() &&
         std::all_of(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->idle(); });
}

void SimEngine::tick() {
  if (!draining_ && requests_.size() < plan_.running_max * 2 && loop_.chance(plan_.arrivals)) add_request();
  abort_some();
  if (draining_ && requests_.empty()) (void)client_->take_ended_jobs();  // tries again what a full queue refused
  while (steps_.size() < plan_.steps_in_flight && (!requests_.empty() || !new_loads_.empty())) {
    const std::size_t before = steps_.size();
    if (weights_pending_) break;
    schedule();
    if (steps_.size() == before) break;
  }
  if (weights_pending_ && steps_.empty()) take_new_weights();
  later(200 * kMicrosecond + loop_.delay(200 * kMicrosecond), [](SimEngine& self) { self.tick(); });
}

// ---- requests ------------------------------------------------------------------------------------------------------

// Prompts start with one of a few documents, leave its path here and there, and go on as others do.
void SimEngine::add_request() {
  auto request = std::make_shared<Request>();
  request->id = next_request_++;
  const auto prompt = static_cast<std::uint32_t>(loop_.between(2, plan_.prompt_blocks_max * kBlockTokens));
  const auto output = static_cast<std::uint32_t>(loop_.between(1, 3 * kBlockTokens));
  std::uint64_t path = loop_.below(plan_.documents) + 1;
  for (std::uint32_t at = 0; at < (prompt + output) / kBlockTokens + 1; ++at) {
    path = Prng::mix(path + (loop_.chance(plan_.branch_permille) ? 1 + loop_.below(2) : 0));
    request->chunks.push_back(static_cast<std::uint32_t>(path));
  }
  request->tokens = prompt;
  request->tokens_end = prompt + output;
  name_blocks(*request);
  loop_.note("engine: request", id_, request->id, prompt, output);
  requests_.emplace(request->id, request);
  waiting_.push_back(std::move(request));
}

std::uint64_t SimEngine::submit(std::vector<std::uint32_t> chunks) {
  auto request = std::make_shared<Request>();
  request->id = next_request_++;
  request->tokens = request->tokens_end = static_cast<std::uint32_t>(chunks.size()) * kBlockTokens + 1;
  request->chunks = std::move(chunks);
  request->chunks.push_back(0);
  name_blocks(*request);
  first_tokens_[request->id] = 0;
  requests_.emplace(request->id, request);
  waiting_.push_back(request);
  if (plan_.prefetch_at_once) prefetch(*request);
  return request->id;
}

void SimEngine::name_blocks(Request& request) const {
  std::uint64_t tag = Prng::mix(plan_.kinds[kind_].model * 1000 + weights_);
  std::uint64_t hash = 1;
  request.tags.clear();
  request.hashes.clear();
  for (const std::uint32_t chunk : request.chunks) {
    tag = next_tag(tag, chunk);
    hash = next_tag(hash, chunk);
    request.tags.push_back(tag);
    std::array<std::byte, 16> bytes{};
    std::memcpy(bytes.data(), &hash, sizeof hash);
    request.hashes.push_back(bytes);
  }
}

void SimEngine::free_blocks(Request& request) {
  for (auto block = request.blocks.rbegin(); block != request.blocks.rend(); ++block) blocks_.drop_reference(*block);
  request.blocks.clear();
}

void SimEngine::end_request(const RequestPtr& request) {
  loop_.note("engine: request ends", id_, request->id);
  if (request->tracked) client_->close_sequence(request->sequence);
  request->tracked = false;
  ++request->version;
  std::erase(waiting_, request);
  std::erase(running_, request);
  if (request->state == Request::State::kLoading) {
    // Its blocks stay until every rank has said that the load is over.
    if (loop_.chance(plan_.cancel_job)) client_->cancel(request->load);
    request->state = Request::State::kEnded;
    return;
  }
  request->state = Request::State::kEnded;
  free_blocks(*request);
  requests_.erase(request->id);
}

void SimEngine::abort_some() {
  if (!loop_.chance(plan_.abort_request) || requests_.empty()) return;
  auto victim = requests_.begin();
  std::advance(victim, static_cast<std::ptrdiff_t>(loop_.below(requests_.size())));
  if (victim->second->state != Request::State::kEnded) end_request(RequestPtr(victim->second));
}

void SimEngine::preempt(const RequestPtr& request) {
  loop_.note("engine: preempts", id_, request->id);
  std::erase(running_, request);
  free_blocks(*request);
  request->computed = 0;
  ++request->version;
  request->state = Request::State::kWaiting;
  waiting_.push_front(request);
}

void SimEngine::reset_cache() {
  loop_.note("engine: resets the cache", id_);
  client_->reset();
  for (auto& [id, request] : requests_) request->offered = 0;
}

void SimEngine::take_new_weights() {
  if (!loads_.empty()) return schedule();  // an empty step: it brings the news of loads
  while (!running_.empty()) preempt(running_.back());
  for (const auto& request : waiting_) {
    free_blocks(*request);
    request->computed = 0;
    ++request->version;
  }
  blocks_.forget_all();
  reset_cache();
  weights_ = world_.new_weights();
  for (auto& [id, request] : requests_) name_blocks(*request);
  weights_pending_ = false;
  loop_.note("engine: new weights", id_, weights_);
}

// ---- a step --------------------------------------------------------------------------------------------------------

void SimEngine::schedule() {
  Step step;
  std::uint32_t budget = plan_.prefill_tokens_max;
  if (!weights_pending_) {
    schedule_running(step, budget);
    schedule_waiting(step, budget);
  }
  if (step.work.empty() && new_loads_.empty() && loads_.empty()) return;
  step.begun = loop_.now();
  for (const Scheduled& work : step.work) {
    step.tokens += work.count;
    step.pairs += plan::PrefillTime::pairs(work.count, work.computed);
  }
  step.orders = std::make_shared<StepOrders>();
  step.orders->number = next_step_++;
  build_orders(step);
  loop_.note("engine: step", id_, step.orders->number, step.work.size(), step.orders->saves.size());
  const auto orders = step.orders;
  steps_.emplace(orders->number, std::move(step));
  for (const auto& rank : ranks_) rank->begin_step(orders);
}

void SimEngine::add_work(Step& step, const RequestPtr& request, std::uint32_t count, std::size_t old_blocks,
                         bool whole) {
  Scheduled work;
  work.request = request;
  work.version = request->version;
  work.computed = request->computed;
  work.count = count;
  work.blocks = request->blocks;
  work.tags = request->tags;
  work.new_blocks.assign(request->blocks.begin() + static_cast<std::ptrdiff_t>(old_blocks), request->blocks.end());
  work.whole_table = whole;
  request->computed += count;
  step.work.push_back(std::move(work));
}

// Preempts from the end until so many blocks are free; false if `keep` itself had to go.
bool SimEngine::make_room(std::size_t blocks, const RequestPtr& keep) {
  while (blocks_.free_count() < blocks) {
    if (running_.empty()) return false;
    const RequestPtr victim = running_.back();
    // A request that made room only of itself would come back and do so for ever while one that waits holds the rest.
    if (victim == keep && take_from_waiting(nullptr)) continue;
    preempt(victim);
    if (victim == keep) return false;
  }
  return true;
}

void SimEngine::schedule_running(Step& step, std::uint32_t& budget) {
  const auto candidates = running_;
  for (const auto& request : candidates) {
    if (request->state != Request::State::kRunning || budget == 0) continue;
    const std::uint32_t count = std::min(request->tokens - request->computed, budget);
    if (count == 0) continue;  // its next token is still being sampled
    const std::size_t old_blocks = request->blocks.size();
    const std::size_t needed = (request->computed + count + kBlockTokens - 1) / kBlockTokens;
    const std::size_t added = needed > old_blocks ? needed - old_blocks : 0;
    if (!make_room(added, request)) continue;
    for (std::size_t i = 0; i < added; ++i) request->blocks.push_back(blocks_.allocate());
    budget -= count;
    add_work(step, request, count, old_blocks, false);
  }
  // Who was scheduled and then preempted for another is not in this step.
  std::erase_if(step.work, [](const Scheduled& work) { return work.version != work.request->version; });
}

void SimEngine::schedule_waiting(Step& step, std::uint32_t& budget) {
  while (!waiting_.empty() && running_.size() < plan_.running_max && budget > 0) {
    const RequestPtr request = waiting_.front();
    if (admit(request, step, budget)) continue;
    // Nobody will ever free blocks if only those that wait hold any.
    if (!running_.empty() || !loads_.empty()) return;
    if (!take_from_waiting(request)) return;
  }
}

// Frees the blocks of the last one in the queue that holds any, up to `end`.
bool SimEngine::take_from_waiting(const RequestPtr& end) {
  const auto holder = std::find_if(waiting_.rbegin(), waiting_.rend(), [](const auto& r) {
    return r->state == Request::State::kWaiting && !r->blocks.empty();
  });
  if (holder == waiting_.rend() || *holder == end) return false;
  free_blocks(**holder);
  (*holder)->computed = 0;
  return true;
}

bool SimEngine::admit(const RequestPtr& request, Step& step, std::uint32_t& budget) {
  std::vector<std::uint32_t> local;
  std::uint32_t external = 0;
  if (request->computed == 0) {
    SIM_CHECK(request->blocks.empty());
    while (local.size() < (request->tokens - 1) / kBlockTokens) {
      const auto block = blocks_.find(request->tags[local.size()]);
      if (!block) break;
      local.push_back(*block);
    }
    external = find_external(*request, static_cast<std::uint32_t>(local.size()));
  }
  const bool async = external > 0 && request->load_async;
  const std::uint32_t known = request->computed + static_cast<std::uint32_t>(local.size() + external) * kBlockTokens;
  const std::uint32_t count = async ? 0 : std::min(request->tokens - known, budget);
  const std::size_t held = request->blocks.size() + local.size();
  const std::size_t needed = (known + count + kBlockTokens - 1) / kBlockTokens;
  const std::size_t added = needed > held ? needed - held : 0;
  // Counted with those that are free now but will be referenced.
  for (const std::uint32_t block : local) blocks_.take_reference(block);
  if (blocks_.free_count() < added) {
    for (const std::uint32_t block : local) blocks_.drop_reference(block);
    return false;
  }
  waiting_.pop_front();
  request->blocks.insert(request->blocks.end(), local.begin(), local.end());
  for (std::size_t i = 0; i < added; ++i) request->blocks.push_back(blocks_.allocate());
  if (external > 0) order_load(*request, external);
  if (async) {
    request->state = Request::State::kLoading;
    return true;
  }
  request->computed = known;
  request->state = Request::State::kRunning;
  running_.push_back(request);
  budget -= count;
  add_work(step, request, count, held, true);
  return true;
}

}  // namespace flexkv::testing
