// The metadata store of a cluster in memory, on a virtual clock, and connections to it with injected faults. It does
// what Redis does with the operations of meta/request.h. Owned by the simulation's thread.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>

#include "flexkv/meta/backoff.h"
#include "flexkv/meta/request.h"
#include "flexkv/testing/sim_loop.h"

namespace flexkv::testing {

struct SimMetaFaults {
  Nanos delay_max = kMillisecond;  // of a message, one way
  unsigned slow_permille = 0;      // messages that take up to three seconds
  unsigned lost_request_permille = 0;
  unsigned lost_answer_permille = 0;
  unsigned repeated_permille = 0;  // requests that the store carries out again, up to five seconds later
};

class SimMeta {
 public:
  explicit SimMeta(SimLoop& loop) : loop_(loop) {}

  SimMetaFaults faults;

  // The store stops; connections to it break.
  void stop();
  void start() { running_ = true; }
  bool running() const { return running_; }
  void forget_all() { data_ = {}; }
  // What is on its disk, to come back to.
  void save() { saved_ = data_; }
  void restore() { data_ = saved_; }

  // Flips a bit of something that it holds.
  void damage();

  // Frees what has lapsed, which otherwise stays until somebody asks for it.
  void drop_lapsed();
  std::uint64_t value_bytes() const;  // of all that it holds, without names and without Redis's own structures

 private:
  friend class SimMetaChannel;
  struct Stream {
    std::deque<std::pair<std::uint64_t, std::string>> entries;
    std::uint64_t last = 0;
  };
  struct Value {
    std::string text;
    std::set<std::string> members;
    std::map<std::uint64_t, std::string> parts;
    Stream stream;
    std::optional<Nanos> until;
  };
  using Data = std::unordered_map<std::string, Value>;
  using Shared = std::shared_ptr<const meta::Request>;  // with hundreds of streams in it
  struct Waiter {
    Shared read;  // its only operation
    std::function<void(meta::Answer)> answer;
  };

  Value* find(const std::string& key);
  meta::Answer carry_out(const meta::Op& op);
  std::uint64_t wait(Shared read, std::function<void(meta::Answer)> answer);
  // Those whose reads the request has brought something for.
  void wake_waiters(const meta::Request& request);

  SimLoop& loop_;
  bool running_ = true;
  std::uint64_t run_ = 0;  // of the store, counted by its stops
  Data data_;
  Data saved_;
  std::map<std::uint64_t, Waiter> waiters_;
  std::uint64_t next_waiter_ = 0;
};

// One connection. Calls back when a request has ended, and when it is ready again after a failure.
class SimMetaChannel {
 public:
  static constexpr Nanos kAnswerWithin = 2 * kSecond;
  static constexpr Nanos kRetryMax = 4 * kSecond;

  SimMetaChannel(SimLoop& loop, SimMeta& store, std::uint64_t seed, std::function<void()> ready)
      : loop_(loop), store_(store), backoff_(100 * kMillisecond, kRetryMax, seed), on_ready_(std::move(ready)) {}

  bool ready() const { return ready_ && !busy_; }
  void submit(meta::Request request, std::function<void(Result<meta::Answers>)> done);
  // Nothing gets through from now on, or again.
  void cut(bool is_cut) { *cut_ = is_cut; }

 private:
  struct Call {
    std::function<void(Result<meta::Answers>)> done;
    bool over = false;
  };
  void arrive(const SimMeta::Shared& request, const std::shared_ptr<Call>& call);
  void answer_with(meta::Answers answers, const std::shared_ptr<Call>& call);
  void end(const std::shared_ptr<Call>& call, Result<meta::Answers> result);
  void fail(const std::shared_ptr<Call>& call, ErrorCode code);
  void reconnect();
  Nanos delay();

  SimLoop& loop_;
  SimMeta& store_;
  meta::Backoff backoff_;
  std::function<void()> on_ready_;
  bool ready_ = true;
  bool busy_ = false;
  // Shared with events, which may outlive this.
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::shared_ptr<bool> cut_ = std::make_shared<bool>(false);

 public:
  ~SimMetaChannel() { *alive_ = false; }
};

}  // namespace flexkv::testing
