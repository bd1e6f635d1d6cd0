// What a node knows of a place beyond its machine that it reads blocks from, by the reads that went there: how long
// they take, what is still to come, whether one of them has stopped, and whether the place is left alone for a while.
//
// Pure logic, guarded by the node's lock.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/plan/flow_rate.h"
#include "flexkv/plan/transfer_cost.h"

namespace flexkv::server {

// A place that could not be reached, or that let a read wait in vain, is not asked for so long; doubles each time.
constexpr Nanos kRestMin = 1 * kSecond;
constexpr Nanos kRestMax = 30 * kSecond;
// A read of which nothing has come for so many times what that usually takes has stopped, but not before the least:
// within that networks send again what they lost, and busy machines have their turns.
constexpr double kPatienceTimes = 8;
constexpr Nanos kPatienceMin = 2 * kSecond;
constexpr Nanos kPatienceUnknown = 5 * kSecond;  // of places that nothing has come from yet

// Where a place keeps what it is asked for.
enum class Tier : std::uint8_t { kMemory, kDrives };
constexpr std::size_t kReadTiers = 2;
using TierCosts = std::array<plan::TransferCost, kReadTiers>;

class ReadSource {
 public:
  // One read, of blocks that come in order.
  struct Read {
    Tier tier = Tier::kMemory;
    std::uint64_t block_bytes = 0;
    std::uint32_t blocks = 0;
    std::uint32_t came = 0;
    Nanos begun = 0;
    Nanos latest = 0;                // sign of it
    Nanos first_at = 0;              // the first block came
    Nanos longest_gap = 0;           // between two blocks
    std::uint64_t came_before = 0;   // bytes that the place had brought when it began,
    std::uint64_t first_bytes = 0;   // since then, when the first block came,
    std::uint64_t latest_bytes = 0;  // and the latest
    bool given_up = false;
  };
  enum class End : std::uint8_t {
    kAnswered,  // with all of it or less
    kCut,       // by this node, or its time was over while it went on
    kFailed,    // no answer: the place is to rest
  };

  // `step_bytes`: blocks come together by so many, at least.
  explicit ReadSource(std::uint64_t step_bytes = 0) : step_bytes_(step_bytes) {}

  Read begin(Tier tier, std::uint64_t block_bytes, std::uint32_t blocks, Nanos now);
  void came(Read& read, Nanos now);
  // `all`: of all places of this kind together, where it is counted as well.
  void end(const Read& read, End how, TierCosts& all, Nanos now);

  // Of bytes from there, without what waits before them. `all`: what is not known of this place.
  plan::TransferTime time(Tier tier, const TierCosts& all, Nanos now) const;
  // When it has stopped, if nothing comes until then.
  Nanos stops_at(const Read& read, const TierCosts& all, Nanos now) const;
  // It has. The next ones are given twice as long, as what is slow must not look stopped for ever.
  void stopped(Read& read, Nanos now);

  bool resting(Nanos now) const { return now < rests_until_; }
  bool idle() const { return reads_ == 0; }
  std::uint64_t waiting_bytes() const { return rate_.waiting_bytes(); }
  double bytes_per_second() const { return rate_.bytes_per_second(); }  // 0: not known

 private:
  void learn(const Read& read, TierCosts& all, Nanos now);

  std::uint64_t step_bytes_;
  plan::FlowRate rate_;
  TierCosts costs_;
  std::uint32_t reads_ = 0;  // under way
  std::uint64_t came_bytes_ = 0;
  Nanos rests_until_ = 0;
  Nanos next_rest_ = kRestMin;
  bool stopped_ = false;  // since it last gave all that it was asked for
};

// When to look at which read again. Thread-compatible.
class ReadWatch {
 public:
  void watch(std::uint64_t read, Nanos at);  // also one that is watched
  void forget(std::uint64_t read);
  std::optional<Nanos> next() const;
  // Those whose time has come, which are not watched any more.
  std::vector<std::uint64_t> take_due(Nanos now);

 private:
  std::map<std::uint64_t, Nanos> times_;
  std::set<std::pair<Nanos, std::uint64_t>> order_;
};

}  // namespace flexkv::server
