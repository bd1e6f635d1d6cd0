// Seeds of the remote tier's simulated use: see remote_sim.h for what is checked in each.
#include "remote_sim.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "flexkv/base/log.h"
#include "seeds.h"

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kDefaultSeeds = 300;

void print(const RemoteSimTotals& totals) {
  const auto show = [](const char* what, std::uint64_t value) {
    std::printf("%s %llu, ", what, static_cast<unsigned long long>(value));
  };
  show("blocks read", totals.blocks_read);
  show("written", totals.blocks_written);
  show("times off", totals.switched_off);
  std::printf("\nreads: ");
  for (std::size_t i = 0; i < totals.reads.size(); ++i)
    show(outcome_name(static_cast<remote::Outcome>(i)), totals.reads[i]);
  std::printf("\nwrites: ");
  for (std::size_t i = 0; i < totals.writes.size(); ++i)
    show(outcome_name(static_cast<remote::Outcome>(i)), totals.writes[i]);
  std::printf("\nfaults: ");
  for (std::size_t i = 0; i < totals.faults.size(); ++i)
    show(fault_name(static_cast<remote::Fault>(i)), totals.faults[i]);
  std::printf("\n");
}

TEST(RemoteSimulation, Seeds) {
  set_log_level(LogLevel::kError);
  RemoteSimTotals totals;
  const bool one = std::getenv("FLEXKV_SEED") != nullptr;
  const std::uint64_t first = one ? number_from("FLEXKV_SEED", 0) : number_from("FLEXKV_FIRST_SEED", 0);
  const std::uint64_t count = one ? 1 : number_from("FLEXKV_SEEDS", kDefaultSeeds);
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    RemoteSim(seed, totals).run();
    ASSERT_FALSE(HasFailure()) << "FLEXKV_SEED=" << seed;
  }
  print(totals);
  if (count < kDefaultSeeds) return;
  // A tier that finds nothing, or a store without faults, would pass all checks.
  EXPECT_GT(totals.blocks_read, 100 * count);
  EXPECT_GT(totals.switched_off, 0U);
  for (const std::uint64_t faults : totals.faults) EXPECT_GT(faults, 0U);
}

}  // namespace
}  // namespace flexkv::testing
