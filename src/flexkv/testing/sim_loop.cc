#include "flexkv/testing/sim_loop.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>

namespace flexkv::testing {
namespace {

SimLoop* running = nullptr;

// Assertions of the code under test abort: the events that led there are wanted then, too.
extern "C" void print_trace_and_abort(int) {
  std::signal(SIGABRT, SIG_DFL);
  if (running != nullptr) running->print_trace();
  std::abort();
}

}  // namespace

SimLoop::SimLoop(std::uint64_t seed, bool verbose) : seed_(seed), verbose_(verbose), random_(Prng::mix(seed + 1)) {
  running = this;
  std::signal(SIGABRT, print_trace_and_abort);
}

SimLoop::~SimLoop() { running = nullptr; }

void SimLoop::at(Nanos time, std::function<void()> action) {
  events_.emplace(std::pair{std::max(time, now_), next_event_++}, std::move(action));
}

bool SimLoop::step(Nanos end) {
  if (events_.empty() || events_.begin()->first.first > end) {
    now_ = std::max(now_, end);
    return false;
  }
  auto event = events_.extract(events_.begin());
  now_ = event.key().first;
  event.mapped()();
  return true;
}

void SimLoop::note(const char* what, std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
  Line& line = lines_[line_count_++ % kTraceLines];
  line = {now_, what, {a, b, c, d}};
  hash_ = Prng::mix(hash_ ^ static_cast<std::uint64_t>(now_));
  for (const char* letter = what; *letter != 0; ++letter) hash_ = hash_ * 31 + static_cast<unsigned char>(*letter);
  for (const std::uint64_t value : line.values) hash_ = Prng::mix(hash_ + value);
  if (verbose_) line.print();
}

void SimLoop::Line::print() const {
  std::fprintf(stderr, "%12.3f us  %-28s %llu %llu %llu %llu\n", static_cast<double>(time) / 1000.0, what,
               static_cast<unsigned long long>(values[0]), static_cast<unsigned long long>(values[1]),
               static_cast<unsigned long long>(values[2]), static_cast<unsigned long long>(values[3]));
}

void SimLoop::print_trace() const {
  if (!verbose_) {
    const std::uint64_t first = line_count_ > kTraceLines ? line_count_ - kTraceLines : 0;
    for (std::uint64_t i = first; i < line_count_; ++i) lines_[i % kTraceLines].print();
  }
  std::fprintf(stderr, "seed %llu failed at %.3f us; replay with FLEXKV_SEED=%llu\n",
               static_cast<unsigned long long>(seed_), static_cast<double>(now_) / 1000.0,
               static_cast<unsigned long long>(seed_));
}

void SimLoop::fail(const char* what, const char* file, int line) {
  std::fprintf(stderr, "simulation: check failed: %s, at %s:%d\n", what, file, line);
  std::abort();
}

}  // namespace flexkv::testing
