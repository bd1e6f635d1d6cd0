// Hands operations to a store, as many at once as it carries out: reads first, then writes, then scans. Tries again
// what failed, notices when the store hangs, leaves it alone for a while when it does or fails too often, and probes
// whether it is back; reads and writes each on their own, so that a full or read-only store still serves. Pure logic;
// one thread (the lane's).
#pragma once

#include <array>
#include <functional>
#include <set>
#include <unordered_map>
#include <variant>

#include "flexkv/base/prng.h"
#include "flexkv/file/breaker.h"
#include "flexkv/remote/store.h"

namespace flexkv::remote {

struct DispatchLimits {
  // stall_after: an operation that takes longer hangs.
  file::BreakerLimits breaker{.stall_after = 10 * kSecond};
  unsigned tries = 3;                     // of one operation
  Nanos again_after = 50 * kMillisecond;  // doubles with every try
};

class Dispatch {
 public:
  enum class Kind : std::uint8_t { kRead, kWrite, kScan };
  using StoreOp = std::variant<PutOp, GetOp, ListOp>;
  using Make = std::function<StoreOp()>;     // called for each try
  using Done = std::function<void(Ended&)>;  // may order and drop

  struct Counts {
    std::uint64_t gets = 0;
    std::uint64_t puts = 0;
    std::uint64_t lists = 0;
    std::uint64_t tried_again = 0;
  };

  // `switched` is called whenever why_off() has changed, before anybody is told that the store is not asked.
  Dispatch(DispatchLimits limits, Store& store, std::uint64_t seed, std::function<void()> switched);
  ~Dispatch();

  // `done` is called once, later, unless it is dropped. The store may not be asked at all: kUnavailable.
  OpId order(Kind kind, Make make, Done done);
  // Its memory is not touched any more.
  void drop(OpId id);
  // Whether it has been with the store for so long that eight like it would be a stall.
  bool slow(OpId id, Nanos now) const;
  // Something slow was dropped because its time was over: if every caller is less patient than stall_after, nothing
  // else tells that the store hangs.
  void gave_up(Kind kind, Nanos now);
  void take(std::vector<Ended>& ended, Nanos now);
  // Does what is due, and begins what can begin.
  void on_time(Nanos now);
  std::optional<Nanos> next_time() const;

  // Why the store is not asked; empty: it is.
  const std::string& why_off(Kind kind) const { return breaker(kind).why(); }
  const std::string& last_error() const { return last_error_; }
  const Counts& counts() const { return counts_; }

 private:
  struct Op {
    Kind kind{};
    Make make;
    Done done;
    unsigned tries = 0;
    Nanos again_at = 0;
  };
  struct Direction {
    file::Breaker breaker;
    std::optional<OpId> probe;
    Nanos probe_begun = 0;
  };
  static constexpr std::size_t direction_of(Kind kind) { return kind == Kind::kWrite ? 1 : 0; }
  const file::Breaker& breaker(Kind kind) const { return directions_[direction_of(kind)].breaker; }

  void withdraw(OpId id, const Op& op);
  bool room_for(Kind kind) const;
  void begin_some(Nanos now);
  void begin(OpId id, Op& op, Nanos now);
  void end(Ended& ended);
  void judge(Ended& ended, Nanos now);
  void probe(std::size_t number, Nanos now);
  bool take_probe(const Ended& ended, Nanos now);
  void find_stalled(Nanos now);
  void switch_off(std::size_t number);
  void hand_over(OpId id, const StoreOp& op);

  const DispatchLimits limits_;
  Store& store_;
  Prng random_;
  const std::function<void()> switched_;
  OpId next_id_ = 1;
  std::unordered_map<OpId, Op> ops_;
  // Each operation is in one of these three.
  std::array<std::set<OpId>, 3> waiting_;      // by kind
  std::set<std::pair<Nanos, OpId>> later_;     // tried again then
  std::unordered_map<OpId, Nanos> under_way_;  // handed to the store at that time
  std::array<unsigned, 3> under_way_of_{};     // by kind
  std::array<Direction, 2> directions_;
  std::array<std::byte, 16> probe_bytes_{};
  std::string last_error_;
  Counts counts_;
};

}  // namespace flexkv::remote
