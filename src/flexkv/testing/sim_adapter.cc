// The engine's side of our connector: as integration/vllm/scheduler.py.
#include <algorithm>

#include "flexkv/testing/sim_engine.h"
#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {
namespace {

constexpr std::uint32_t kLoadsPerRequestMax = 4;

}  // namespace

std::vector<std::span<const std::byte>> SimEngine::hashes_of(const Request& request, std::uint32_t first) const {
  std::vector<std::span<const std::byte>> hashes;
  for (std::uint32_t i = first; i < request.tokens / kBlockTokens; ++i) hashes.emplace_back(request.hashes[i]);
  return hashes;
}

void SimEngine::track(Request& request) {
  if (request.tracked) return;
  request.tracked = true;
  request.sequence = client_->open_sequence();
}

void SimEngine::prefetch(Request& request) {
  track(request);
  const std::uint32_t known = client_->known_hashes(request.sequence);
  client_->prefetch(request.sequence, known, hashes_of(request, known));
}

std::uint32_t SimEngine::find_external(Request& request, std::uint32_t local_blocks) {
  if (!plan_.loads) return 0;
  track(request);
  if (loop_.chance(plan_.prefetch)) prefetch(request);
  const std::uint32_t first = client_->known_hashes(request.sequence);
  const std::uint32_t matched =
      client_->lookup(request.sequence, first, hashes_of(request, first), local_blocks).matched_blocks;
  SIM_CHECK(matched <= request.tokens / kBlockTokens);
  request.local_blocks = local_blocks;
  request.offered = matched;
  const std::uint32_t usable = std::min(matched, (request.tokens - 1) / kBlockTokens);
  if (usable <= local_blocks || request.loads >= kLoadsPerRequestMax) return 0;
  world_.totals().blocks_hit += usable - local_blocks;
  request.load_async = usable - local_blocks > plan_.sync_blocks_max;
  return usable - local_blocks;
}

// vLLM never does it, but others may, at any moment.
void SimEngine::cancel_some(proto::JobId job) {
  if (!loop_.chance(plan_.cancel_job)) return;
  later(loop_.delay(2 * kMillisecond), [job](SimEngine& self) { self.client_->cancel(job); });
}

void SimEngine::order_load(Request& request, std::uint32_t count) {
  auto order = std::make_shared<LoadOrder>();
  const auto first = static_cast<std::ptrdiff_t>(request.local_blocks);
  order->request = request.id;
  order->sync = !request.load_async;
  order->blocks.assign(request.blocks.begin() + first, request.blocks.begin() + first + count);
  order->tags.assign(request.tags.begin() + first, request.tags.begin() + first + count);
  ++request.loads;
  order->job = client_->load(request.sequence, request.local_blocks, order->blocks);
  loop_.note("engine: load", id_, request.id, order->job, count);
  ++world_.totals().loads;
  cancel_some(order->job);
  if (request.load_async) {
    request.load = order->job;
    request.load_reports = 0;
    request.load_good = count;
    loads_.emplace(order->job, requests_.at(request.id));
  }
  new_loads_.push_back(std::move(order));
}

void SimEngine::add_readers(std::span<const std::uint32_t> blocks, std::set<proto::JobId>& saves) const {
  for (const std::uint32_t block : blocks) {
    if (const auto readers = saves_by_block_.find(block); readers != saves_by_block_.end()) {
      saves.insert(readers->second.begin(), readers->second.end());
    }
  }
}

void SimEngine::forget_save(proto::JobId job) {
  const auto ended = blocks_by_save_.extract(job);
  if (ended.empty()) return;
  for (const std::uint32_t block : ended.mapped()) {
    const auto saves = saves_by_block_.find(block);
    saves->second.erase(job);
    if (saves->second.empty()) saves_by_block_.erase(saves);
  }
}

void SimEngine::build_orders(Step& step) {
  for (const proto::JobResult& result : client_->take_ended_jobs()) forget_save(result.job);
  std::set<proto::JobId> overwritten;
  for (auto& load : new_loads_) {
    add_readers(load->blocks, overwritten);
    step.orders->loads.push_back(std::move(load));
  }
  new_loads_.clear();
  for (const Scheduled& work : step.work) {
    if (work.whole_table) {
      add_readers(std::span(work.blocks).subspan(work.computed / kBlockTokens), overwritten);
    } else {
      add_readers(work.new_blocks, overwritten);
    }
  }
  for (const proto::JobId job : overwritten) {
    loop_.note("engine: save overwritten", id_, job);
    client_->cancel(job);
    forget_save(job);
  }
  for (const Scheduled& work : step.work) order_save(step, work);
}

void SimEngine::order_save(Step& step, const Scheduled& work) {
  Request& request = *work.request;
  track(request);
  const std::uint32_t after = (work.computed + work.count) / kBlockTokens;
  const std::uint32_t full = std::min(after, request.tokens / kBlockTokens);
  if (full <= request.offered) return;
  const std::vector<std::uint32_t> saved(work.blocks.begin() + request.offered, work.blocks.begin() + full);
  const std::uint32_t first = client_->known_hashes(request.sequence);
  const proto::JobId job = client_->save(request.sequence, first, hashes_of(request, first), request.offered, saved);
  loop_.note("engine: save", id_, request.id, job, saved.size());
  if (job == 0) return;
  cancel_some(job);
  request.offered = full;
  step.orders->saves.push_back(job);
  for (const std::uint32_t block : saved) saves_by_block_[block].insert(job);
  blocks_by_save_.emplace(job, saved);
}

}  // namespace flexkv::testing
