#include "flexkv/testing/sim_meta.h"

#include <algorithm>

namespace flexkv::testing {

using meta::Op;

// ---- the store -----------------------------------------------------------------------------------------------------

void SimMeta::stop() {
  running_ = false;
  ++run_;
  waiters_.clear();
}

void SimMeta::damage() {
  std::vector<std::string*> all;
  for (auto& [key, value] : data_) {
    // A damaged epoch would be another one: Redis's own checks have to see to that.
    if (!key.ends_with(":epoch")) all.push_back(&value.text);
    for (auto& [part, text] : value.parts) all.push_back(&text);
    for (auto& [id, text] : value.stream.entries) all.push_back(&text);
  }
  std::erase_if(all, [](const std::string* text) { return text->empty(); });
  if (all.empty()) return;
  std::string& text = *all[loop_.below(all.size())];
  text[loop_.below(text.size())] ^= static_cast<char>(1U << loop_.below(8));
}

void SimMeta::drop_lapsed() {
  std::erase_if(data_, [&](const auto& one) { return one.second.until && *one.second.until <= loop_.now(); });
}

std::uint64_t SimMeta::value_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& [key, value] : data_) {
    bytes += value.text.size();
    for (const std::string& member : value.members) bytes += member.size();
    for (const auto& [part, text] : value.parts) bytes += text.size();
    for (const auto& [id, text] : value.stream.entries) bytes += text.size();
  }
  return bytes;
}

SimMeta::Value* SimMeta::find(const std::string& key) {
  const auto found = data_.find(key);
  if (found == data_.end()) return nullptr;
  if (found->second.until && *found->second.until <= loop_.now()) {
    data_.erase(found);
    return nullptr;
  }
  return &found->second;
}

meta::Answer SimMeta::carry_out(const Op& op) {
  meta::Answer answer;
  (void)find(op.key);  // what has lapsed goes
  switch (op.kind) {
    case Op::Kind::kGet:
      if (const Value* value = find(op.key)) answer.found = true, answer.value = value->text;
      break;
    case Op::Kind::kPutIfAbsent:
      if (find(op.key) != nullptr) break;
      [[fallthrough]];
    case Op::Kind::kPut:
      data_[op.key].text = op.value;
      data_[op.key].until = op.ttl > 0 ? std::optional(loop_.now() + op.ttl) : std::nullopt;
      break;
    case Op::Kind::kIncrement: {
      std::string& text = data_[op.key].text;
      text = std::to_string((text.empty() ? 0 : std::stoull(text)) + 1);
      break;
    }
    case Op::Kind::kRemove:
      data_.erase(op.key);
      break;
    case Op::Kind::kTouch:
      if (Value* value = find(op.key)) value->until = loop_.now() + op.ttl;
      break;
    case Op::Kind::kAdd:
      data_[op.key].members.insert(op.value);
      break;
    case Op::Kind::kDrop:
      if (Value* value = find(op.key)) value->members.erase(op.value);
      break;
    case Op::Kind::kMembers:
      if (const Value* value = find(op.key)) answer.members.assign(value->members.begin(), value->members.end());
      break;
    case Op::Kind::kAppend:
    case Op::Kind::kRing: {
      Stream& stream = data_[op.key].stream;
      const std::uint64_t id = op.kind == Op::Kind::kRing ? stream.last + 1 : op.number;
      if (id <= stream.last) break;
      stream.entries.emplace_back(id, op.value);
      stream.last = id;
      break;
    }
    case Op::Kind::kNewest: {
      const Value* value = find(op.key);
      answer.value = value == nullptr ? meta::kNoEntry : meta::entry_id(value->stream.last);
      break;
    }
    case Op::Kind::kTrim:
      if (Value* value = find(op.key)) {
        auto& entries = value->stream.entries;
        while (entries.size() > op.number) entries.pop_front();
      }
      break;
    case Op::Kind::kPutPart:
      data_[op.key].parts[op.number] = op.value;
      break;
    case Op::Kind::kGetPart:
      if (const Value* value = find(op.key)) {
        const auto part = value->parts.find(op.number);
        if (part != value->parts.end()) answer.found = true, answer.value = part->second;
      }
      break;
    case Op::Kind::kRead:
      for (std::uint32_t s = 0; s < op.streams.size(); ++s) {
        const Value* value = find(op.streams[s].stream);
        if (value == nullptr) continue;
        const auto& entries = value->stream.entries;
        auto entry = std::ranges::upper_bound(entries, meta::entry_number(op.streams[s].after), {},
                                              [](const auto& one) { return one.first; });
        for (std::uint64_t count = 0; entry != entries.end() && count < op.number; ++entry, ++count) {
          answer.entries.push_back({s, meta::entry_id(entry->first), entry->second});
        }
      }
      break;
  }
  return answer;
}

std::uint64_t SimMeta::wait(Shared read, std::function<void(meta::Answer)> answer) {
  waiters_.emplace(next_waiter_, Waiter{std::move(read), std::move(answer)});
  return next_waiter_++;
}

void SimMeta::wake_waiters(const meta::Request& request) {
  const auto waits_for = [&](const Op& read) {
    return std::ranges::any_of(request, [&](const Op& op) {
      return (op.kind == Op::Kind::kAppend || op.kind == Op::Kind::kRing) &&
             std::ranges::find(read.streams, op.key, &meta::Position::stream) != read.streams.end();
    });
  };
  for (auto waiter = waiters_.begin(); waiter != waiters_.end();) {
    if (!waits_for(waiter->second.read->front())) {
      ++waiter;
      continue;
    }
    meta::Answer answer = carry_out(waiter->second.read->front());
    if (answer.entries.empty()) {
      ++waiter;
      continue;
    }
    const auto give = std::move(waiter->second.answer);
    waiter = waiters_.erase(waiter);
    give(std::move(answer));
  }
}

// ---- a connection --------------------------------------------------------------------------------------------------

Nanos SimMetaChannel::delay() {
  if (loop_.chance(store_.faults.slow_permille)) return loop_.delay(3 * kSecond);
  return loop_.delay(store_.faults.delay_max);
}

void SimMetaChannel::submit(meta::Request asked, std::function<void(Result<meta::Answers>)> done) {
  FLEXKV_ASSERT(ready());
  busy_ = true;
  const auto request = std::make_shared<const meta::Request>(std::move(asked));
  auto call = std::make_shared<Call>(Call{std::move(done)});
  const auto if_alive = [alive = alive_](auto action) {
    return [alive, action] {
      if (*alive) action();
    };
  };
  loop_.after(kAnswerWithin + meta::waiting_time(*request),
              if_alive([this, call] { fail(call, ErrorCode::kTimeout); }));
  if (loop_.chance(store_.faults.lost_request_permille)) return;
  loop_.after(delay(), if_alive([this, request, call] { arrive(request, call); }));
  if (!loop_.chance(store_.faults.repeated_permille)) return;
  // It comes a second time, though nobody waits for an answer, nor need the node be there any more.
  loop_.after(loop_.delay(5 * kSecond), [&store = store_, request, is_cut = cut_] {
    if (!store.running_ || *is_cut) return;
    for (const Op& op : *request) (void)store.carry_out(op);
    store.wake_waiters(*request);
  });
}

void SimMetaChannel::arrive(const SimMeta::Shared& request, const std::shared_ptr<Call>& call) {
  if (*cut_) return;  // nobody says no: the deadline does
  if (!store_.running_) return fail(call, ErrorCode::kPeer);
  meta::Answers answers;
  for (const Op& op : *request) {
    answers.push_back(store_.carry_out(op));
    if (op.kind != Op::Kind::kRead || op.ttl == 0 || !answers.back().entries.empty()) continue;
    // A read that waits is the only one of its request.
    const std::uint64_t run = store_.run_;
    const std::uint64_t waiter = store_.wait(request, [this, call, alive = alive_](meta::Answer answer) {
      if (*alive) answer_with({std::move(answer)}, call);
    });
    loop_.after(op.ttl, [this, alive = alive_, run, waiter, call] {
      if (!*alive || store_.run_ != run || store_.waiters_.erase(waiter) == 0) return;
      answer_with({meta::Answer{}}, call);
    });
    return;
  }
  store_.wake_waiters(*request);
  answer_with(std::move(answers), call);
}

void SimMetaChannel::answer_with(meta::Answers answers, const std::shared_ptr<Call>& call) {
  if (loop_.chance(store_.faults.lost_answer_permille)) return;
  loop_.after(delay(), [this, alive = alive_, run = store_.run_, call, answers = std::move(answers)] {
    if (!*alive || *cut_) return;
    if (store_.run_ != run) return fail(call, ErrorCode::kPeer);
    end(call, answers);
  });
}

void SimMetaChannel::end(const std::shared_ptr<Call>& call, Result<meta::Answers> result) {
  if (std::exchange(call->over, true)) return;
  busy_ = false;
  backoff_.succeeded();
  std::exchange(call->done, nullptr)(std::move(result));
}

void SimMetaChannel::fail(const std::shared_ptr<Call>& call, ErrorCode code) {
  if (std::exchange(call->over, true)) return;
  busy_ = false;
  ready_ = false;
  reconnect();
  std::exchange(call->done, nullptr)(Error{code, "simulated"});
}

void SimMetaChannel::reconnect() {
  loop_.after(backoff_.failed(), [this, alive = alive_] {
    if (!*alive) return;
    if (!store_.running_ || *cut_) return reconnect();
    ready_ = true;
    on_ready_();
  });
}

}  // namespace flexkv::testing
