// Seeds of the SSD tier's simulated use: see disk_sim.h for what is checked in each.
#include "disk_sim.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "flexkv/base/log.h"
#include "seeds.h"

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kDefaultSeeds = 3000;

void print(const DiskSimTotals& totals) {
  const auto show = [](const char* what, std::uint64_t value) {
    std::printf("%s %llu, ", what, static_cast<unsigned long long>(value));
  };
  show("lives", totals.lives);
  show("kills", totals.kills);
  show("power cuts", totals.power_cuts);
  show("openings", totals.openings);
  show("blocks recovered", totals.recovered);
  show("of them had to be", totals.expected);
  show("resets", totals.resets);
  show("durable", totals.resets_durable);
  std::printf("\n");
  show("writes done", totals.writes_done);
  show("failed", totals.writes_failed);
  show("reads done", totals.reads_done);
  show("of them only verified", totals.verified);
  show("failed", totals.reads_failed);
  show("wrong checksum", totals.checksum);
  show("past deadline", totals.deadline);
  show("overdue", totals.overdue);
  show("refused", totals.refused);
  std::printf("\n");
  show("damages", totals.damages);
  show("hangs", totals.hangs);
  show("drives off", totals.unhealthy);
  show("drives away", totals.absent);
  std::printf("\n");
}

std::uint64_t running_seed = 0;

TEST(DiskSimulation, Seeds) {
  set_log_level(LogLevel::kError);
  std::signal(SIGABRT, [](int) { std::fprintf(stderr, "FLEXKV_SEED=%llu\n", (unsigned long long)running_seed); });
  DiskSimTotals totals;
  if (std::getenv("FLEXKV_SEED") != nullptr) {
    set_log_level(LogLevel::kInfo);
    DiskSim(number_from("FLEXKV_SEED", 0), true, totals).run();
    print(totals);
    return;
  }
  const std::uint64_t first = number_from("FLEXKV_FIRST_SEED", 0);
  const std::uint64_t count = number_from("FLEXKV_SEEDS", kDefaultSeeds);
  for (running_seed = first; running_seed < first + count; ++running_seed) {
    DiskSim(running_seed, false, totals).run();
    if (HasFailure()) return;
  }
  print(totals);
  // A store in which nothing is ever found would pass all checks.
  EXPECT_GE(totals.writes_done, 50 * count);
  EXPECT_GE(totals.reads_done, 20 * count);
  EXPECT_GE(totals.expected, 5 * count);
  EXPECT_GE(totals.resets_durable, count);
  EXPECT_GE(totals.checksum, count / 4);
  EXPECT_GE(totals.kills, count / 2);
  EXPECT_GE(totals.power_cuts, count / 2);
}

}  // namespace
}  // namespace flexkv::testing
