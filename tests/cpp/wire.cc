#include "wire.h"

#include <gtest/gtest.h>
#include <sys/poll.h>
#include <sys/socket.h>

#include <array>
#include <list>

namespace flexkv::testing {

Wire::Wire(std::string to) {
  lead_to(std::move(to));
  auto listener = net::listen_tcp("127.0.0.1:0");
  EXPECT_TRUE(listener.ok());
  listener_ = std::move(listener).value();
  address_ = net::local_address(listener_).value();
  thread_ = std::thread([this] { run(); });
}

Wire::~Wire() {
  stop_ = true;
  thread_.join();
}

void Wire::lead_to(std::string to) {
  MutexLock lock(mutex_);
  to_ = std::move(to);
}

void Wire::delay(Nanos there, Nanos back) {
  there_ = there;
  back_ = back;
}

// False: one of the two ends is closed.
bool Wire::forward(const Fd& from, const Fd& to, Half& half, Nanos delay, std::atomic<std::int64_t>* left) {
  std::array<std::byte, 65536> buffer;
  const Nanos now = monotonic_now();
  while (half.pieces.size() < 1024) {
    const ssize_t size = ::recv(from.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (size == 0) return false;
    if (size < 0 && errno == EAGAIN) break;
    if (size < 0) return false;
    half.pieces.push_back({now + delay, {buffer.begin(), buffer.begin() + size}});
  }
  while (!swallow_ && !half.pieces.empty() && half.pieces.front().due <= now) {
    auto& bytes = half.pieces.front().bytes;
    const ssize_t size = ::send(to.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (size < 0 && (errno == EAGAIN || errno == ENOTCONN)) break;
    if (size < 0) return false;
    bytes.erase(bytes.begin(), bytes.begin() + size);
    if (bytes.empty()) half.pieces.pop_front();
    if (left == nullptr) continue;
    const std::int64_t before = left->fetch_sub(size);
    if (before > 0 && before <= size) swallow_ = true;
  }
  return true;
}

// A test's helper: it polls.
void Wire::run() {
  std::list<Pair> pairs;
  while (!stop_) {
    pollfd waiting{listener_.get(), POLLIN, 0};
    (void)::poll(&waiting, 1, 1);
    if (cut_.exchange(false)) pairs.clear();
    if (auto accepted = net::accept_tcp(listener_); accepted.ok() && accepted.value().valid()) {
      std::string to;
      {
        MutexLock lock(mutex_);
        to = to_;
      }
      auto far = net::connect_tcp(to);
      if (far.ok()) pairs.push_back({std::move(accepted).value(), std::move(far).value(), {}, {}});
    }
    std::erase_if(pairs, [&](Pair& pair) {
      return !forward(pair.near, pair.far, pair.there, there_, nullptr) ||
             !forward(pair.far, pair.near, pair.back, back_, left_);
    });
  }
}

}  // namespace flexkv::testing
