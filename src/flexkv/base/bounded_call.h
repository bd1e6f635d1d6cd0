// Calls that may hang for ever, such as those to the file system of a drive that is dead.
#pragma once

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>

#include "flexkv/base/thread.h"
#include "flexkv/base/time.h"

namespace flexkv {

// What `call` returns; nothing if that takes longer than `patience`. Then the call is left behind on a thread of its
// own with all that it has captured, which must be all that it touches; what it returns in the end is destroyed there.
// Thread-safe. Throws std::system_error when there is no thread to be had.
template <typename Call>
auto within(Nanos patience, Call call) -> std::optional<std::invoke_result_t<Call&>> {
  using Answer = std::invoke_result_t<Call&>;
  struct State {
    std::mutex mutex;
    std::condition_variable came;
    std::optional<Answer> answer;
    bool given_up = false;
  };
  const auto state = std::make_shared<State>();
  start_thread([state, call = std::optional<Call>(std::move(call))]() mutable {
    Answer answer = (*call)();
    call.reset();  // whoever has the answer may rely on it that nothing holds what was captured any more
    std::lock_guard lock(state->mutex);
    if (!state->given_up) state->answer.emplace(std::move(answer));
    state->came.notify_one();
  }).detach();
  std::unique_lock lock(state->mutex);
  state->came.wait_for(lock, std::chrono::nanoseconds(patience), [&] { return state->answer.has_value(); });
  state->given_up = true;
  return std::move(state->answer);
}

}  // namespace flexkv
