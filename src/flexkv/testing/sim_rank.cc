#include "flexkv/testing/sim_rank.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "flexkv/testing/sim_kv.h"
#include "flexkv/testing/sim_world.h"

namespace flexkv::testing {
namespace {

constexpr Nanos kNever = std::numeric_limits<Nanos>::max();
constexpr std::size_t kPiecesPerBlock = 2;
// As many steps as can have been scheduled before the scheduler hears of a failed load.
constexpr std::uint64_t kDistrustSteps = 2;
constexpr device::Direction kDirections[] = {device::Direction::kToHost, device::Direction::kToDevice};

}  // namespace

SimRank::SimRank(SimWorld& world, const SimPlan::Kind& kind, proto::AgentHello hello, Callbacks callbacks)
    : world_(world),
      loop_(world.loop()),
      plan_(world.plan()),
      rank_(hello.rank),
      shard_(hello.shard_number()),
      shard_is_shared_(kind.shared(shard_)),
      shard_bytes_(kind.shard_bytes()),
      hello_(std::move(hello)),
      callbacks_(std::move(callbacks)),
      device_(plan_.device_blocks * shard_bytes_),
      deadline_timer_(kNever) {}

void SimRank::later(Nanos delay, std::function<void(SimRank&)> action) {
  loop_.after(delay, [weak = weak_from_this(), action = std::move(action)] {
    if (const auto self = weak.lock(); self != nullptr && !self->stopped_) action(*self);
  });
}

std::span<std::byte> SimRank::device_block(std::uint32_t block) {
  return std::span(device_).subspan(block * shard_bytes_, shard_bytes_);
}

// ---- connection ----------------------------------------------------------------------------------------------------

void SimRank::connect_after(Nanos delay) {
  later(delay, [](SimRank& self) { self.connect(); });
}

void SimRank::connect() {
  if (link_ != nullptr || leaving_ != nullptr) return;
  SimNode* node = world_.node();
  auto link = node == nullptr || node->paused() ? nullptr : node->attach_agent(hello_);
  if (link == nullptr) return connect_after(2 * kMillisecond);
  link_ = link;
  link_epoch_ = world_.epoch();
  link->deliver = [weak = weak_from_this(), weak_link = std::weak_ptr(link)](const proto::ToAgent& message) {
    const auto self = weak.lock();
    if (self != nullptr && !self->stopped_ && self->link_ == weak_link.lock()) self->receive(message);
  };
  link->lost = [weak = weak_from_this(), weak_link = std::weak_ptr(link)] {
    const auto self = weak.lock();
    if (self != nullptr && !self->stopped_ && self->link_ == weak_link.lock()) self->lose_node();
  };
  jobs_.node_found();
}

void SimRank::stop() {
  if (stopped_) return;
  stopped_ = true;
  loop_.note("rank: dies", rank_);
  for (const auto& link : {link_, leaving_}) {
    if (link == nullptr) continue;
    link->to_agent->close();
    link->to_node->close();
    link->live.clear();
    loop_.after(loop_.delay(plan_.message_delay + kMillisecond), [&world = world_, epoch = link_epoch_, link] {
      if (world.node() != nullptr && world.epoch() == epoch) world.node()->drop(link);
    });
  }
  link_ = leaving_ = nullptr;
}

// The agent keeps its end open until its lanes are quiet: only then may the node take the host blocks back.
void SimRank::lose_node() {
  if (link_ == nullptr) return;
  loop_.note("rank: loses node", rank_, link_->handle);
  leaving_ = std::move(link_);
  link_ = nullptr;
  leaving_->to_agent->close();
  std::erase_if(leaving_->live, [](const auto& live) { return !live.second.delivered; });
  jobs_.node_lost();
  after_change();
}

void SimRank::close_when_quiet() {
  if (leaving_ == nullptr || jobs_.job_count() > 0) return;
  SIM_CHECK(leaving_->live.empty());
  const auto link = std::move(leaving_);
  leaving_ = nullptr;
  if (loop_.chance(500)) link->to_node->close();  // what was reported last may be lost with the connection
  loop_.after(loop_.delay(plan_.message_delay + kMillisecond), [&world = world_, epoch = link_epoch_, link] {
    if (world.node() != nullptr && world.epoch() == epoch) world.node()->drop(link);
  });
  connect_after(loop_.delay(3 * kMillisecond));
}

void SimRank::receive(const proto::ToAgent& message) {
  if (const auto* command = std::get_if<proto::CopyCommand>(&message)) {
    const bool save = command->direction == device::Direction::kToHost;
    const auto live = link_->live.find(command->job);
    if (live != link_->live.end()) live->second.delivered = true;
    jobs_.command(*command, loop_.now() + (save ? plan_.save_timeout : plan_.load_timeout));
  } else {
    jobs_.cancel(std::get<proto::CancelCommand>(message).job);
  }
  after_change();
}

// What RankAgent does after each change of its jobs.
void SimRank::after_change() {
  if (changing_) return;
  changing_ = true;
  for (const auto& report : jobs_.take_reports()) {
    SIM_CHECK(link_ != nullptr);
    SIM_CHECK(link_->live.contains(report.job));  // reported once, and only what was commanded
    SIM_CHECK(!jobs_.pending(report.job));
    link_->live.erase(report.job);
    link_->to_node->send([&world = world_, epoch = link_epoch_, handle = link_->handle, report] {
      if (world.node() != nullptr && world.epoch() == epoch) world.node()->report(handle, report);
    });
  }
  if (leaving_ != nullptr) std::erase_if(leaving_->live, [&](const auto& live) { return !jobs_.pending(live.first); });
  for (auto armed = armed_at_.begin(); armed != armed_at_.end();) {
    if (jobs_.pending(armed->first)) {
      ++armed;
      continue;
    }
    SIM_CHECK(loop_.now() - armed->second <= world_.transfer_time_max());  // NEVER HANGING
    armed = armed_at_.erase(armed);
  }
  changing_ = false;
  close_when_quiet();
  for (const auto direction : kDirections) pump(direction);
  schedule_deadline();
  check_waiters();
}

void SimRank::schedule_deadline() {
  const Nanos deadline = jobs_.next_deadline().value_or(kNever);
  if (deadline >= deadline_timer_) return;
  deadline_timer_ = deadline;
  later(deadline - loop_.now() + loop_.delay(kMillisecond), [](SimRank& self) {
    self.deadline_timer_ = kNever;
    self.jobs_.on_time(self.loop_.now());
    self.after_change();
  });
}

// ---- copy lanes ----------------------------------------------------------------------------------------------------

void SimRank::pump(device::Direction direction) {
  Lane& lane = lanes_[static_cast<std::size_t>(direction)];
  if (lane.work) return;
  auto work = jobs_.next(direction);
  if (!work) return;
  SIM_CHECK(link_ != nullptr);
  lane = Lane{};
  lane.link = link_;
  lane.blocks = work->command->blocks();
  const std::size_t pieces = lane.blocks.size() * kPiecesPerBlock;
  lane.bad_piece = pieces == 0 ? 0 : loop_.below(pieces);
  lane.fails = loop_.chance(plan_.copy_fails);
  lane.stalls = loop_.chance(plan_.copy_stalls);
  if (direction == device::Direction::kToHost) {
    for (const auto& block : lane.blocks) {
      const std::uint64_t sum = block_sum(device_block(block.device_block));
      lane.sums.push_back(loop_.chance(plan_.wrong_sums) ? (sum >> 32 << 32 | kWrongSum)
                          : loop_.chance(200)            ? kNoSum
                                                         : sum);
    }
  }
  lane.work = std::move(work);
  loop_.note("rank: copies", rank_, lane.work->job, static_cast<std::uint64_t>(direction), pieces);
  later(loop_.delay(plan_.piece_time), [direction](SimRank& self) { self.copy_piece(direction); });
}

void SimRank::copy_piece(device::Direction direction) {
  Lane& lane = lanes_[static_cast<std::size_t>(direction)];
  const auto& blocks = lane.blocks;
  if (lane.piece % plan_.chunk_pieces == 0) lane.canceled = lane.canceled || jobs_.canceled(lane.work->job);
  lane.broken = lane.broken || (lane.fails && lane.piece == lane.bad_piece);
  if (lane.canceled || lane.broken || lane.piece == blocks.size() * kPiecesPerBlock) return lane_done(direction);

  const auto& block = blocks[lane.piece / kPiecesPerBlock];
  if (lane.piece % kPiecesPerBlock == 0) {
    loop_.note("rank: copies block", rank_, lane.work->job, block.device_block,
               block.host_offset / node::kExtentAlignment);
  }
  const std::uint64_t half = shard_bytes_ / kPiecesPerBlock;
  const std::uint64_t at = lane.piece % kPiecesPerBlock * half;
  std::byte* device = device_block(block.device_block).data() + at;
  std::byte* host = lane.link->pool->data() + block.host_offset + at;
  const bool to_host = direction == device::Direction::kToHost;
  std::memcpy(to_host ? host : device, to_host ? device : host, half);
  const bool stalls = lane.stalls && lane.piece == lane.bad_piece;
  ++lane.piece;
  later(stalls ? plan_.stall_time : loop_.delay(plan_.piece_time),
        [direction](SimRank& self) { self.copy_piece(direction); });
}

void SimRank::lane_done(device::Direction direction) {
  Lane& lane = lanes_[static_cast<std::size_t>(direction)];
  const proto::JobId job = lane.work->job;
  const auto status = lane.broken     ? proto::JobStatus::kFailed
                      : lane.canceled ? proto::JobStatus::kCanceled
                                      : proto::JobStatus::kDone;
  const std::size_t copied = lane.broken ? 0 : lane.piece / kPiecesPerBlock;
  loop_.note("rank: copied", rank_, job, static_cast<std::uint64_t>(status), copied);
  if (direction == device::Direction::kToDevice) {
    world_.totals().blocks_loaded += copied;
    if (shard_is_shared_) world_.totals().blocks_loaded_alike += copied;
  }
  const auto work = *std::exchange(lane.work, std::nullopt);
  lane.link.reset();
  jobs_.finished(work, status, copied, std::move(lane.sums));
  after_change();
}

// ---- the worker ----------------------------------------------------------------------------------------------------

void SimRank::begin_step(std::shared_ptr<const StepOrders> orders) {
  steps_.push_back(std::move(orders));
  if (step_running_) return;
  step_running_ = true;
  start_loads();
}

void SimRank::wait_for(std::vector<proto::JobId> jobs, std::function<void()> then) {
  waited_ = std::move(jobs);
  then_ = std::move(then);
  check_waiters();
}

void SimRank::check_waiters() {
  if (!then_ || std::any_of(waited_.begin(), waited_.end(), [&](proto::JobId job) { return jobs_.pending(job); }))
    return;
  waited_.clear();
  // Not at once: whoever changed something is not done with it yet.
  later(0, [then = std::exchange(then_, nullptr)](SimRank&) { then(); });
}

void SimRank::start_loads() {
  std::vector<proto::JobId> sync;
  for (const auto& order : steps_.front()->loads) {
    SIM_CHECK(loading_.emplace(order->job, order).second);
    loop_.note("rank: arms load", rank_, order->job);
    jobs_.arm(order->job, true, nullptr, loop_.now() + plan_.load_timeout);
    armed_at_.emplace(order->job, loop_.now());
    if (order->sync) sync.push_back(order->job);
  }
  after_change();
  wait_for(sync, [this, sync] {
    const auto failed = jobs_.take_failed(sync);
    for (const proto::JobId job : sync) {
      const auto order = loading_.extract(job).mapped();
      const auto bad = std::ranges::find(failed, job, &agent::LoadResult::job);
      const auto all = static_cast<std::uint32_t>(order->blocks.size());
      end_load(*order, bad == failed.end() ? agent::LoadResult{job, true, all} : *bad);
    }
    callbacks_.ready_for_forward(steps_.front()->number);
  });
}

void SimRank::end_load(const LoadOrder& order, const agent::LoadResult& result) {
  loop_.note("rank: load ended", rank_, order.job, result.good_blocks, order.sync);
  SIM_CHECK(!jobs_.pending(order.job));
  SIM_CHECK(result.ok == (result.good_blocks == order.blocks.size()));
  for (std::uint32_t at = 0; at < result.good_blocks; ++at) {
    SIM_CHECK(holds_kv(device_block(order.blocks[at]), order.tags[at], shard_));  // NEVER WRONG
  }
  if (!order.sync) {
    report_.ended_loads.push_back(result);
  } else if (!result.ok) {
    distrust_until_ = steps_.front()->number + kDistrustSteps;
    report_.bad_blocks.insert(order.blocks.begin() + result.good_blocks, order.blocks.end());
  }
}

// The forward has filled the device blocks: what it completed may be saved.
void SimRank::forward_done() {
  const auto orders = steps_.front();
  const bool distrusted = orders->number <= distrust_until_;
  for (const proto::JobId job : orders->saves) {
    if (distrusted) {
      jobs_.cancel(job);
    } else {
      jobs_.arm(job, false, nullptr, loop_.now() + plan_.save_timeout);
      if (jobs_.pending(job)) armed_at_.emplace(job, loop_.now());
    }
  }
  after_change();
  for (const auto& load : jobs_.take_loads()) {
    const auto order = loading_.extract(load.job);
    SIM_CHECK(!order.empty());  // each load ends once
    end_load(*order.mapped(), load);
  }
  steps_.pop_front();
  callbacks_.step_done(orders->number, std::exchange(report_, {}));
  step_running_ = !steps_.empty();
  if (step_running_) later(0, [](SimRank& self) { self.start_loads(); });
}

}  // namespace flexkv::testing
