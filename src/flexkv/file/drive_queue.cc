#include "flexkv/file/drive_queue.h"

#include <algorithm>
#include <cerrno>

#include "flexkv/base/prng.h"

namespace flexkv::file {
namespace {

Wait wait_of(Op op) { return op == Op::kSync ? Wait::kSync : Wait::kTransfer; }

}  // namespace

void DriveEvents::clear() {
  overdue.clear();
  changes.clear();
  completions.clear();
}

void DriveEvents::give_to(DriveSink& sink) const {
  for (const Change& change : changes) {
    if (!change.available) sink.on_availability(false, change.why);
  }
  for (const std::uint64_t tag : overdue) sink.on_overdue(tag);
  if (!completions.empty()) sink.on_completions(completions);
  for (const Change& change : changes) {
    if (change.available) sink.on_availability(true, change.why);
  }
}

std::size_t DriveQueue::StartHash::operator()(const Start& start) const {
  const auto kind = static_cast<std::uint64_t>(start.file) << 8 | static_cast<std::uint64_t>(start.op) << 4 |
                    static_cast<std::uint64_t>(start.urgency);
  return Prng::mix(start.offset ^ Prng::mix(kind));
}

DriveQueue::DriveQueue(const DriveLimits& limits, FileId probe_file, std::byte* probe_page)
    : limits_(limits), probe_file_(probe_file), probe_page_(probe_page), breaker_(limits.breaker) {
  FLEXKV_ASSERT(limits.depth > 0 && limits.flight_bytes_max > 0);
  FLEXKV_ASSERT(limits.io_bytes_max > 0 && limits.io_bytes_max % kDirectAlignment == 0);
  slots_.resize(limits.depth + 1);
  for (std::uint32_t i = 0; i < slots_.size(); ++i) slots_[i].io.slot = i;
  for (std::uint32_t i = limits.depth; i > 0; --i) free_slots_.push_back(i - 1);
}

// ---- requests in ---------------------------------------------------------------------------------------------------

bool DriveQueue::submit(std::span<const Request> requests, Nanos now) {
  std::uint64_t bytes = 0;
  for (const Request& request : requests) bytes += request.bytes;
  if (closed_ || !breaker_.available()) return false;
  if (requests.size() > limits_.queue_requests_max - request_count_) return false;
  if (bytes > limits_.queue_bytes_max - request_bytes_) return false;
  for (const Request& request : requests) enqueue(request, now);
  return true;
}

void DriveQueue::enqueue(const Request& request, Nanos now) {
  const bool sync = request.op == Op::kSync;
  FLEXKV_ASSERT(sync == (request.bytes == 0) && sync == (request.data == nullptr));
  Entries& line = waiting_[static_cast<std::size_t>(request.urgency)];
  const Iter entry = line.emplace(line.end());
  entry->request = request;
  entry->sequence = next_sequence_++;
  entry->submitted = now;
  entry->line = &line;
  ++request_count_;
  request_bytes_ += request.bytes;
  if (request.deadline != 0) deadlines_.emplace(std::pair(request.deadline, entry->sequence), entry);
  tags_.emplace(request.tag, entry);
  const auto file = static_cast<std::uint32_t>(request.file);
  if (request.op == Op::kWrite) ++writes_[file];
  if (sync) {
    const auto writes = writes_.find(file);
    entry->earlier_writes = writes == writes_.end() ? 0 : writes->second;
    if (entry->earlier_writes > 0) move_to(syncs_, entry);
  } else {
    starts_.try_emplace(start_of(request), entry);
  }
}

DriveQueue::Start DriveQueue::start_of(const Request& request) {
  return {request.file, request.op, request.urgency, request.offset};
}

void DriveQueue::move_to(Entries& line, Iter entry) {
  line.splice(line.end(), *entry->line, entry);
  entry->line = &line;
}

void DriveQueue::forget_start(Iter entry) {
  const auto found = starts_.find(start_of(entry->request));
  if (found != starts_.end() && found->second == entry) starts_.erase(found);
}

void DriveQueue::cancel(std::uint64_t tag, Nanos now) {
  const auto [first, last] = tags_.equal_range(tag);
  std::vector<Iter> meant;
  for (auto each = first; each != last; ++each) meant.push_back(each->second);
  for (const Iter entry : meant) {
    if (entry->line == &begun_) continue;
    if (entry->begun) {
      stop_issuing(entry, ECANCELED, now);
    } else {
      complete(entry, Outcome::kCanceled, 0, now);
    }
  }
}

void DriveQueue::drop_waiting(int error_number, Nanos now) {
  const auto drop = [&](Entries& line) {
    while (!line.empty()) stop_issuing(line.begin(), error_number, now);
  };
  for (Entries& line : waiting_) drop(line);
  drop(syncs_);
  // Syncs that joined a line when the last write before them was dropped.
  for (Entries& line : waiting_) drop(line);
}

// ---- time ----------------------------------------------------------------------------------------------------------

void DriveQueue::on_time(Nanos now) {
  while (!deadlines_.empty() && deadlines_.begin()->first.first <= now) {
    const Iter entry = deadlines_.begin()->second;
    deadlines_.erase(deadlines_.begin());
    if (entry->begun) {
      events_.overdue.push_back(entry->request.tag);
    } else {
      complete(entry, Outcome::kDeadline, 0, now);
    }
  }
  if (!breaker_.available()) return;
  for (const Slot& slot : slots_) {
    if (!slot.busy || now - slot.begun < breaker_.stall_after(wait_of(slot.io.op))) continue;
    return stall("an I/O", now - slot.begun, now);
  }
  for (const auto& [number, call] : calls_) {
    if (now - call.since >= breaker_.stall_after(call.wait)) return stall(call.what, now - call.since, now);
  }
}

void DriveQueue::stall(const char* what, Nanos age, Nanos now) {
  breaker_.stalled(what, age, now);
  trip(now);
}

// Whether anything that the drive was asked for before it went off has not ended.
bool DriveQueue::hangs_on() const { return free_slots_.size() < limits_.depth || !calls_.empty(); }

std::uint64_t DriveQueue::begin_call(const char* what, Wait wait, Nanos now) {
  calls_.emplace(next_call_, Call{what, wait, now});
  return next_call_++;
}

std::optional<Nanos> DriveQueue::wakeup() const {
  std::optional<Nanos> at;
  const auto earlier = [&](Nanos candidate) { at = at ? std::min(*at, candidate) : candidate; };
  if (!deadlines_.empty()) earlier(deadlines_.begin()->first.first);
  if (!breaker_.available()) {
    if (!hangs_on() && !probing_ && !closed_) earlier(breaker_.probe_at());
    return at;
  }
  for (const Slot& slot : slots_) {
    if (slot.busy) earlier(slot.begun + breaker_.stall_after(wait_of(slot.io.op)));
  }
  for (const auto& [number, call] : calls_) earlier(call.since + breaker_.stall_after(call.wait));
  return at;
}

// ---- requests out --------------------------------------------------------------------------------------------------

void DriveQueue::trip(Nanos now) {
  events_.changes.push_back({false, breaker_.why()});
  drop_waiting(breaker_.error_number(), now);
}

void DriveQueue::stop_issuing(Iter entry, int error_number, Nanos now) {
  if (entry->error_number == 0) entry->error_number = error_number;
  if (!entry->begun) forget_start(entry);
  if (entry->line != &begun_) move_to(begun_, entry);
  complete_if_over(entry, now);
}

void DriveQueue::complete_if_over(Iter entry, Nanos now) {
  if (entry->io_count > 0 || entry->line != &begun_) return;
  const bool done = entry->error_number == 0;
  FLEXKV_ASSERT(!done || entry->landed_bytes == entry->request.bytes);
  complete(entry, done ? Outcome::kDone : Outcome::kFailed, entry->error_number, now);
}

void DriveQueue::complete(Iter entry, Outcome outcome, int error_number, Nanos now) {
  FLEXKV_ASSERT(entry->io_count == 0);
  const Request& request = entry->request;
  events_.completions.push_back({request.tag, outcome, error_number, now - entry->submitted});
  DriveStats::Flow& flow = request.op == Op::kRead ? stats_.read : stats_.write;
  if (request.op != Op::kSync && outcome == Outcome::kDone) {
    ++flow.requests;
    flow.bytes += request.bytes;
  } else if (outcome == Outcome::kFailed) {
    ++flow.failed;
  }
  if (!entry->begun) forget_start(entry);
  if (request.deadline != 0) deadlines_.erase({request.deadline, entry->sequence});
  auto tagged = tags_.find(request.tag);
  while (tagged->second != entry) ++tagged;
  tags_.erase(tagged);
  --request_count_;
  request_bytes_ -= request.bytes;
  if (request.op == Op::kWrite) {
    const auto writes = writes_.find(static_cast<std::uint32_t>(request.file));
    if (--writes->second == 0) writes_.erase(writes);
    for (Iter sync = syncs_.begin(); sync != syncs_.end();) {
      const Iter each = sync++;
      if (each->request.file != request.file || each->sequence < entry->sequence) continue;
      if (--each->earlier_writes == 0) move_to(waiting_[static_cast<std::size_t>(each->request.urgency)], each);
    }
  }
  entry->line->erase(entry);
}

void DriveQueue::take(DriveEvents& events) {
  events.clear();
  std::swap(events, events_);
}

DriveStats DriveQueue::stats() const {
  DriveStats stats = stats_;
  stats.queued = request_count_;
  stats.queued_bytes = request_bytes_;
  stats.available = breaker_.available();
  stats.why = breaker_.why();
  return stats;
}

}  // namespace flexkv::file
