// The engine's model: forwards over real bytes, and what the scheduler makes of a step's outcome.
#include <algorithm>

#include "flexkv/testing/sim_engine.h"
#include "flexkv/testing/sim_kv.h"
#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {

void SimEngine::rank_ready(std::uint64_t number) {
  if (dead_ || ++steps_.at(number).ranks_ready < ranks_.size()) return;
  begin_forward(number);
}

void SimEngine::fill(std::uint32_t block, std::uint64_t tag) {
  const SimPlan::Kind& kind = plan_.kinds[kind_];
  for (std::uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    fill_kv(ranks_[rank]->device_block(block), tag, kind.shard_of(rank));
  }
}

bool SimEngine::holds(std::uint32_t block, std::uint64_t tag) const {
  const SimPlan::Kind& kind = plan_.kinds[kind_];
  for (std::uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    if (!holds_kv(ranks_[rank]->device_block(block), tag, kind.shard_of(rank))) return false;
  }
  return true;
}

// From the first instant of a forward on, what it is going to write is not what was there before.
void SimEngine::begin_forward(std::uint64_t number) {
  for (const Scheduled& work : steps_.at(number).work) {
    for (std::size_t at = work.computed / kBlockTokens; at * kBlockTokens < work.computed + work.count; ++at) {
      fill(work.blocks[at], kGarbage + number);
    }
  }
  Nanos time = plan_.forward_time;
  if (const Step& step = steps_.at(number); plan_.prefill.known() && step.tokens > 0) {
    const plan::PrefillTime& cost = plan_.prefill;
    time = static_cast<Nanos>(cost.fixed + cost.per_token * step.tokens + cost.per_pair * step.pairs);
  }
  later(time, [number](SimEngine& self) { self.end_forward(number); });
}

void SimEngine::end_forward(std::uint64_t number) {
  loop_.note("engine: forward done", id_, number);
  for (Scheduled& work : steps_.at(number).work) compute(work);
  for (const auto& rank : ranks_) {
    loop_.after(loop_.delay(20 * kMicrosecond), [rank] {
      if (!rank->stopped()) rank->forward_done();
    });
  }
}

// Every block is computed from all blocks before it: if one of those is wrong, so is this one.
void SimEngine::compute(Scheduled& work) {
  const std::size_t first = work.computed / kBlockTokens;
  const std::size_t end = (work.computed + work.count) / kBlockTokens;
  for (std::size_t at = 0; at < first; ++at) work.poisoned = work.poisoned || !holds(work.blocks[at], work.tags[at]);
  for (std::size_t at = first; at < end; ++at) fill(work.blocks[at], work.poisoned ? kGarbage : work.tags[at]);
}

void SimEngine::rank_done(std::uint64_t number, const StepReport& report) {
  Step& step = steps_.at(number);
  for (const agent::LoadResult& result : report.ended_loads) {
    const auto load = loads_.find(result.job);
    SIM_CHECK(load != loads_.end());
    Request& request = *load->second;
    request.load_good = std::min(request.load_good, result.good_blocks);
    if (!result.ok) step.load_failed = true;
    if (++request.load_reports == ranks_.size()) {
      const RequestPtr keep = load->second;
      loads_.erase(load);
      finish_load(*keep);
    }
  }
  step.bad_blocks.insert(report.bad_blocks.begin(), report.bad_blocks.end());
  if (++step.ranks_done < ranks_.size()) return;
  // Steps end in order on every rank, but their last words may overtake each other.
  while (!steps_.empty() && steps_.begin()->second.ranks_done == ranks_.size()) {
    finish_step(steps_.begin()->second);
    steps_.erase(steps_.begin());
  }
}

void SimEngine::count_load(std::size_t good, std::size_t blocks) {
  world_.totals().loads_ok += good == blocks;
  world_.totals().loads_in_part += good > 0 && good < blocks;
}

void SimEngine::finish_load(Request& request) {
  loop_.note("engine: load done", id_, request.id, request.load, request.load_good);
  const RequestPtr self = requests_.at(request.id);
  const std::size_t good = request.local_blocks + request.load_good;
  count_load(request.load_good, request.blocks.size() - request.local_blocks);
  if (request.state == Request::State::kEnded) {
    free_blocks(request);
    requests_.erase(request.id);
    return;
  }
  SIM_CHECK(request.state == Request::State::kLoading);
  request.state = Request::State::kWaiting;
  while (request.blocks.size() > good) {
    blocks_.drop_reference(request.blocks.back());
    request.blocks.pop_back();
  }
  request.computed = static_cast<std::uint32_t>(good) * kBlockTokens;
  for (std::size_t at = 0; at < good; ++at) {
    SIM_CHECK(holds(request.blocks[at], request.tags[at]));
    blocks_.remember(request.blocks[at], request.tags[at]);
  }
  waiting_.push_front(self);
}

void SimEngine::finish_step(Step& step) {
  if (plan_.prefill.known()) client_->observe_step(step.tokens, step.pairs, loop_.now() - step.begun);
  if (step.load_failed || !step.bad_blocks.empty()) {
    for (auto& [id, request] : requests_) request->offered = 0;
  }
  for (const auto& order : step.orders->loads) {
    if (!order->sync) continue;
    const auto bad =
        std::ranges::find_if(order->blocks, [&](std::uint32_t block) { return step.bad_blocks.contains(block); });
    count_load(static_cast<std::size_t>(bad - order->blocks.begin()), order->blocks.size());
  }
  for (Scheduled& work : step.work) {
    if (work.version == work.request->version) accept(work, step);
  }
}

void SimEngine::accept(Scheduled& work, const Step& step) {
  Request& request = *work.request;
  const auto bad = std::find_if(work.blocks.begin(), work.blocks.end(),
                                [&](std::uint32_t block) { return step.bad_blocks.contains(block); });
  if (bad != work.blocks.end()) {
    // Computed again from there, in the same blocks.
    request.computed = static_cast<std::uint32_t>(bad - work.blocks.begin()) * kBlockTokens;
    ++request.version;
    return;
  }
  SIM_CHECK(!work.poisoned);  // NEVER WRONG
  const std::uint32_t after = work.computed + work.count;
  for (std::uint32_t at = 0; at < after / kBlockTokens; ++at) blocks_.remember(work.blocks[at], work.tags[at]);
  if (after < request.tokens) return;
  if (const auto first = first_tokens_.find(request.id); first != first_tokens_.end() && first->second == 0) {
    first->second = loop_.now();
  }
  if (request.tokens < request.tokens_end) {
    ++request.tokens;
  } else {
    ++world_.totals().requests;
    end_request(RequestPtr(work.request));
  }
}

}  // namespace flexkv::testing
