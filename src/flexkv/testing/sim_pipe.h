// One direction of a connection: messages arrive late, in order, or not at all once the pipe is closed.
// Owned by one thread; shared between its two ends.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <utility>

#include "flexkv/testing/sim_loop.h"

namespace flexkv::testing {

class SimPipe : public std::enable_shared_from_this<SimPipe> {
 public:
  // `*paused_until` (may be null): until then the receiving end does not read.
  SimPipe(SimLoop& loop, Nanos delay_max, std::shared_ptr<const Nanos> paused_until)
      : loop_(loop), delay_max_(delay_max), paused_until_(std::move(paused_until)) {}

  void send(std::function<void()> message) {
    if (closed_) return;
    messages_.push_back(std::move(message));
    pump_at(loop_.now() + loop_.delay(delay_max_));
  }
  // Delivers what is on its way, now.
  void flush() {
    while (!messages_.empty()) deliver();
  }
  // What is on its way is lost.
  void close() {
    closed_ = true;
    messages_.clear();
  }
  bool paused() const { return paused_until_ != nullptr && *paused_until_ > loop_.now(); }

 private:
  void pump_at(Nanos time) {
    loop_.at(time, [weak = weak_from_this()] {
      const auto self = weak.lock();
      if (self == nullptr || self->messages_.empty()) return;
      if (self->paused()) return self->pump_at(*self->paused_until_);
      self->deliver();
    });
  }
  void deliver() {
    const auto message = std::move(messages_.front());
    messages_.pop_front();
    message();
  }

  SimLoop& loop_;
  const Nanos delay_max_;
  const std::shared_ptr<const Nanos> paused_until_;
  std::deque<std::function<void()>> messages_;
  bool closed_ = false;
};

}  // namespace flexkv::testing
