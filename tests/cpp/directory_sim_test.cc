// Seeds of a simulated cluster: see directory_sim.h.
#include "directory_sim.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "seeds.h"

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kDefaultSeeds = 2000;
constexpr std::uint64_t kRepeatEvery = 20;  // one of so many seeds is run twice

TEST(DirectorySimulation, Seeds) {
  DirectorySimTotals totals;
  if (std::getenv("FLEXKV_SEED") != nullptr) {
    (void)DirectorySim(number_from("FLEXKV_SEED", 0), true).run(totals);
    return;
  }
  const std::uint64_t first = number_from("FLEXKV_FIRST_SEED", 0);
  const std::uint64_t count = number_from("FLEXKV_SEEDS", kDefaultSeeds);
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const std::uint64_t hash = DirectorySim(seed, false).run(totals);
    if (seed % kRepeatEvery != 0) continue;
    DirectorySimTotals again;
    ASSERT_EQ(hash, DirectorySim(seed, false).run(again)) << "seed " << seed << " does not repeat itself";
  }
  std::printf(
      "changes %llu, batches followed %llu, snapshots loaded %llu, gaps %llu, entries refused %llu, resets %llu, "
      "nodes %llu, blocks at the end %llu, slowest convergence %lld s\n",
      static_cast<unsigned long long>(totals.changes), static_cast<unsigned long long>(totals.batches),
      static_cast<unsigned long long>(totals.snapshots), static_cast<unsigned long long>(totals.gaps),
      static_cast<unsigned long long>(totals.refused), static_cast<unsigned long long>(totals.resets),
      static_cast<unsigned long long>(totals.nodes), static_cast<unsigned long long>(totals.blocks_at_end),
      static_cast<long long>(totals.slowest / kSecond));
  // A cluster in which nothing ever happens would pass all checks.
  EXPECT_GE(totals.batches, 100 * count);
  EXPECT_GE(totals.snapshots, count);
  EXPECT_GE(totals.gaps, count / 2);
  EXPECT_GE(totals.refused, count / 20);
  EXPECT_GE(totals.resets, count / 20);
  EXPECT_GE(totals.blocks_at_end, 50 * count);
}

}  // namespace
}  // namespace flexkv::testing
