// For tests: a wire between two machines, which can be slow, cut, or swallow all that is sent on it.
#pragma once

#include <atomic>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/mutex.h"
#include "flexkv/base/time.h"
#include "flexkv/net/tcp.h"

namespace flexkv::testing {

// Thread-safe. Forwards TCP connections to where it leads.
class Wire {
 public:
  explicit Wire(std::string to);
  ~Wire();

  const std::string& address() const { return address_; }
  void lead_to(std::string to);
  // Of what the connecting side says, and of what it is told.
  void delay(Nanos there, Nanos back);
  void swallow(bool on) { swallow_ = on; }  // all; the connections stay
  // From when the connecting side has been told so many bytes more. Wires may share them: then one of them swallows.
  void swallow_after(std::atomic<std::int64_t>& bytes) { left_ = &bytes; }
  void cut() { cut_ = true; }  // the connections that there are

 private:
  struct Half {
    struct Piece {
      Nanos due = 0;
      std::vector<std::byte> bytes;
    };
    std::deque<Piece> pieces;
  };
  struct Pair {
    Fd near, far;
    Half there, back;
  };
  void run();
  bool forward(const Fd& from, const Fd& to, Half& half, Nanos delay, std::atomic<std::int64_t>* left);

  Fd listener_;
  std::string address_;
  Mutex mutex_;
  std::string to_ FLEXKV_GUARDED_BY(mutex_);
  std::atomic<Nanos> there_{0};
  std::atomic<Nanos> back_{0};
  std::atomic<bool> swallow_{false};
  std::atomic<std::atomic<std::int64_t>*> left_{nullptr};
  std::atomic<bool> cut_{false};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace flexkv::testing
