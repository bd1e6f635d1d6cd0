// The virtual clock of a simulated world: events in the order of their times, one random source, one trace.
//
// Everything that happens follows from the seed; the same seed gives the same trace hash. Owned by one thread.
// Bounds: the trace keeps its newest kTraceLines lines (a crash prints them), the hash covers all.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "flexkv/base/prng.h"
#include "flexkv/base/time.h"

namespace flexkv::testing {

class SimLoop {
 public:
  SimLoop(std::uint64_t seed, bool verbose);
  ~SimLoop();
  SimLoop(const SimLoop&) = delete;
  SimLoop& operator=(const SimLoop&) = delete;

  Nanos now() const { return now_; }
  void at(Nanos time, std::function<void()> action);
  void after(Nanos delay, std::function<void()> action) { at(now_ + delay, std::move(action)); }
  // Runs the next event; false when there is none before `end` (then the clock stands at `end`).
  bool step(Nanos end);

  std::uint64_t below(std::uint64_t bound) { return random_.below(bound); }
  // Uniform in [low, high].
  std::uint64_t between(std::uint64_t low, std::uint64_t high) { return low + random_.below(high - low + 1); }
  // True in `permille` of 1000 calls.
  bool chance(unsigned permille) { return permille > 0 && random_.below(1000) < permille; }
  Nanos delay(Nanos most) { return static_cast<Nanos>(random_.below(static_cast<std::uint64_t>(most) + 1)); }

  // `what` must live for ever (a literal).
  void note(const char* what, std::uint64_t a = 0, std::uint64_t b = 0, std::uint64_t c = 0, std::uint64_t d = 0);
  std::uint64_t hash() const { return hash_; }
  void print_trace() const;

  // Prints the trace of the world that is running and ends the process.
  [[noreturn]] static void fail(const char* what, const char* file, int line);

 private:
  static constexpr std::size_t kTraceLines = 300;
  struct Line {
    Nanos time = 0;
    const char* what = nullptr;
    std::array<std::uint64_t, 4> values{};
    void print() const;
  };

  const std::uint64_t seed_;
  const bool verbose_;
  Prng random_;
  Nanos now_ = 0;
  std::uint64_t next_event_ = 0;
  std::map<std::pair<Nanos, std::uint64_t>, std::function<void()>> events_;
  std::uint64_t hash_ = 0;
  std::array<Line, kTraceLines> lines_;
  std::uint64_t line_count_ = 0;
};

#define SIM_CHECK(condition)                                            \
  do {                                                                  \
    if (!(condition)) [[unlikely]]                                      \
      ::flexkv::testing::SimLoop::fail(#condition, __FILE__, __LINE__); \
  } while (false)

}  // namespace flexkv::testing
