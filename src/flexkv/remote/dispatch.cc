#include "flexkv/remote/dispatch.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"

namespace flexkv::remote {
namespace {

constexpr std::size_t kReads = 0;
constexpr std::size_t kWrites = 1;
constexpr const char* kNames[] = {"reads", "writes"};

bool failed(StoreOutcome outcome) { return outcome == StoreOutcome::kFailed || outcome == StoreOutcome::kRefused; }

}  // namespace

Dispatch::Dispatch(DispatchLimits limits, Store& store, std::uint64_t seed, std::function<void()> switched)
    : limits_(limits),
      store_(store),
      random_(seed),
      switched_(std::move(switched)),
      directions_{Direction{file::Breaker(limits.breaker), {}, 0}, Direction{file::Breaker(limits.breaker), {}, 0}} {}

Dispatch::~Dispatch() {
  for (const auto& [id, begun] : under_way_) store_.abandon(id);
  for (const Direction& direction : directions_) {
    if (direction.probe) store_.abandon(*direction.probe);
  }
}

OpId Dispatch::order(Kind kind, Make make, Done done) {
  const OpId id = next_id_++;
  ops_[id] = {kind, std::move(make), std::move(done), 0, 0};
  waiting_[static_cast<std::size_t>(kind)].insert(id);
  return id;
}

void Dispatch::drop(OpId id) {
  const auto found = ops_.find(id);
  if (found == ops_.end()) return;
  if (under_way_.contains(id)) store_.abandon(id);
  withdraw(id, found->second);
  ops_.erase(found);
}

bool Dispatch::slow(OpId id, Nanos now) const {
  const auto found = under_way_.find(id);
  const Nanos limit = limits_.breaker.stall_after / limits_.breaker.failures_in_row_max;
  return found != under_way_.end() && now - found->second >= limit;
}

void Dispatch::gave_up(Kind kind, Nanos now) {
  const std::size_t number = direction_of(kind);
  file::Breaker& breaker = directions_[number].breaker;
  if (breaker.available() && breaker.failed(ETIMEDOUT, now)) switch_off(number);
}

void Dispatch::withdraw(OpId id, const Op& op) {
  const auto kind = static_cast<std::size_t>(op.kind);
  if (under_way_.erase(id) > 0) --under_way_of_[kind];
  waiting_[kind].erase(id);
  later_.erase({op.again_at, id});
}

void Dispatch::take(std::vector<Ended>& ended, Nanos now) {
  for (Ended& one : ended) {
    // Not those dropped by one that ended with them.
    if (!take_probe(one, now) && under_way_.contains(one.id)) judge(one, now);
  }
  ended.clear();
}

void Dispatch::judge(Ended& ended, Nanos now) {
  Op& op = ops_.at(ended.id);
  withdraw(ended.id, op);
  const std::size_t number = direction_of(op.kind);
  file::Breaker& breaker = directions_[number].breaker;
  FLEXKV_ASSERT(breaker.available());  // it would have been withdrawn
  if (!failed(ended.outcome)) {
    breaker.succeeded();
    end(ended);
    return;
  }
  last_error_ = ended.why;
  if (breaker.failed(EIO, now)) {
    switch_off(number);
  } else if (ended.outcome == StoreOutcome::kFailed && op.tries < limits_.tries) {
    ++counts_.tried_again;
    const Nanos wait = limits_.again_after << (op.tries - 1);
    op.again_at = now + wait / 2 + static_cast<Nanos>(random_.below(static_cast<std::uint64_t>(wait)));
    later_.emplace(op.again_at, ended.id);
  } else {
    end(ended);
  }
}

void Dispatch::end(Ended& ended) {
  const Op op = std::move(ops_.extract(ended.id).mapped());
  withdraw(ended.id, op);
  op.done(ended);
}

// The store is left alone: whatever is asked of it, or waits to be, ends.
void Dispatch::switch_off(std::size_t number) {
  log_warning(std::string("remote store: ") + kNames[number] + " are off: " + directions_[number].breaker.why() +
              (last_error_.empty() ? "" : " (" + last_error_ + ")"));
  switched_();
  std::vector<OpId> ending;
  for (const auto& [id, op] : ops_) {
    if (direction_of(op.kind) == number) ending.push_back(id);
  }
  std::ranges::sort(ending);
  for (const OpId id : ending) {
    if (!ops_.contains(id)) continue;
    if (under_way_.contains(id)) store_.abandon(id);
    Ended ended{id, StoreOutcome::kUnavailable, directions_[number].breaker.why(), {}, {}};
    end(ended);
  }
}

void Dispatch::on_time(Nanos now) {
  find_stalled(now);
  for (std::size_t number = 0; number < directions_.size(); ++number) probe(number, now);
  while (!later_.empty() && later_.begin()->first <= now) {
    const OpId id = later_.extract(later_.begin()).value().second;
    waiting_[static_cast<std::size_t>(ops_.at(id).kind)].insert(id);
  }
  begin_some(now);
}

void Dispatch::find_stalled(Nanos now) {
  for (std::size_t number = 0; number < directions_.size(); ++number) {
    Direction& direction = directions_[number];
    if (!direction.breaker.available()) continue;
    Nanos oldest = now;
    for (const auto& [id, begun] : under_way_) {
      if (direction_of(ops_.at(id).kind) == number) oldest = std::min(oldest, begun);
    }
    if (now - oldest < limits_.breaker.stall_after) continue;
    direction.breaker.stalled("an operation", now - oldest, now);
    switch_off(number);
  }
}

void Dispatch::probe(std::size_t number, Nanos now) {
  Direction& direction = directions_[number];
  if (direction.breaker.available()) return;
  if (direction.probe) {
    if (now - direction.probe_begun < limits_.breaker.stall_after) return;
    store_.abandon(*std::exchange(direction.probe, {}));
    direction.breaker.probed(ETIMEDOUT, now);
    return;
  }
  if (now < direction.breaker.probe_at()) return;
  direction.probe = next_id_++;
  direction.probe_begun = now;
  if (number == kReads) {
    hand_over(*direction.probe, GetOp{kProbePath, 0, {std::span(probe_bytes_)}});
  } else {
    static constexpr std::array<std::byte, 16> kZeros{};
    hand_over(*direction.probe, PutOp{kProbePath, {std::span(kZeros)}, true});
  }
}

bool Dispatch::take_probe(const Ended& ended, Nanos now) {
  const auto direction = std::ranges::find(directions_, std::optional(ended.id), &Direction::probe);
  if (direction == directions_.end()) return false;
  direction->probe.reset();
  if (failed(ended.outcome)) last_error_ = ended.why;
  direction->breaker.probed(failed(ended.outcome) ? EIO : 0, now);
  if (direction->breaker.available()) {
    log_info(std::string("remote store: ") + kNames[direction - directions_.begin()] + " are on again");
    switched_();
  }
  return true;
}

// Writes and scans leave half of the store to reads.
bool Dispatch::room_for(Kind kind) const {
  const unsigned width = store_.width();
  if (under_way_.size() >= width) return false;
  return kind == Kind::kRead || under_way_.size() - under_way_of_[0] < std::max(width / 2, 1U);
}

void Dispatch::begin_some(Nanos now) {
  for (const Kind kind : {Kind::kRead, Kind::kWrite, Kind::kScan}) {
    auto& waiting = waiting_[static_cast<std::size_t>(kind)];
    while (!waiting.empty() && (room_for(kind) || !breaker(kind).available())) {
      const OpId id = waiting.extract(waiting.begin()).value();
      if (breaker(kind).available()) {
        begin(id, ops_.at(id), now);
        continue;
      }
      Ended ended{id, StoreOutcome::kUnavailable, breaker(kind).why(), {}, {}};
      end(ended);
    }
  }
}

void Dispatch::begin(OpId id, Op& op, Nanos now) {
  ++op.tries;
  under_way_[id] = now;
  ++under_way_of_[static_cast<std::size_t>(op.kind)];
  hand_over(id, op.make());
}

void Dispatch::hand_over(OpId id, const StoreOp& op) {
  counts_.puts += std::holds_alternative<PutOp>(op);
  counts_.gets += std::holds_alternative<GetOp>(op);
  counts_.lists += std::holds_alternative<ListOp>(op);
  std::visit([&](const auto& one) { store_.begin(id, one); }, op);
}

std::optional<Nanos> Dispatch::next_time() const {
  std::optional<Nanos> next;
  const auto at = [&](Nanos time) { next = std::min(next.value_or(time), time); };
  if (!later_.empty()) at(later_.begin()->first);
  for (const auto& [id, begun] : under_way_) at(begun + limits_.breaker.stall_after);
  for (const Direction& direction : directions_) {
    if (direction.breaker.available()) continue;
    at(direction.probe ? direction.probe_begun + limits_.breaker.stall_after : direction.breaker.probe_at());
  }
  return next;
}

}  // namespace flexkv::remote
