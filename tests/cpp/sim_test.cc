// Seeds of the simulated world: see src/flexkv/testing/sim_world.h for what is checked in each.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "flexkv/base/log.h"
#include "flexkv/testing/sim_world.h"
#include "seeds.h"

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kDefaultSeeds = 2000;
// Every so many seeds one is run twice.
constexpr std::uint64_t kRepeatEvery = 20;

std::uint64_t run_seed(std::uint64_t seed, bool verbose, SimTotals& totals) {
  SimWorld world(seed, verbose);
  const std::uint64_t hash = world.run();
  totals.add(world.totals());
  return hash;
}

template <typename Counts>
void print_reasons(const char* what, const Counts& counts) {
  std::printf("%s:", what);
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] > 0) {
      std::printf(" %s %llu", proto::reason_name(static_cast<proto::Reason>(i)),
                  static_cast<unsigned long long>(counts[i]));
    }
  }
  std::printf("\n");
}

void print(const SimTotals& totals) {
  const auto show = [](const char* what, std::uint64_t value) {
    std::printf("%s %llu, ", what, static_cast<unsigned long long>(value));
  };
  show("requests", totals.requests);
  show("loads", totals.loads);
  show("of them ok", totals.loads_ok);
  show("in part", totals.loads_in_part);
  show("blocks hit", totals.blocks_hit);
  show("block shards loaded", totals.blocks_loaded);
  show("of them held alike", totals.blocks_loaded_alike);
  show("blocks saved", totals.blocks_saved);
  show("evicted", totals.blocks_evicted);
  show("fetched from drives", totals.blocks_fetched);
  show("of them prefetched", totals.blocks_prefetched);
  show("written to drives", totals.blocks_written);
  show("recovered", totals.blocks_recovered);
  show("scrubbed", totals.blocks_scrubbed);
  show("of them bad", totals.bad_blocks_scrubbed);
  show("imported", totals.blocks_imported);
  show("lent", totals.blocks_lent);
  show("stored beyond", totals.blocks_stored);
  show("offered at the end", totals.blocks_offered);
  show("checked before they were written", totals.blocks_checked);
  show("taken for damaged", totals.blocks_damaged);
  show("nodes", totals.nodes);
  show("engines", totals.engines);
  std::printf("\n");
  print_reasons("failed loads", totals.failed_loads);
  print_reasons("unsaved blocks", totals.unsaved_blocks);
  print_reasons("missed blocks", totals.missed_blocks);
  print_reasons("unfetched blocks", totals.unfetched_blocks);
  print_reasons("unwritten blocks", totals.unwritten_blocks);
  print_reasons("unimported blocks", totals.unimported_blocks);
  print_reasons("unstored blocks", totals.unstored_blocks);
}

TEST(Simulation, Seeds) {
  set_log_level(LogLevel::kError);
  SimTotals totals;
  if (std::getenv("FLEXKV_SEED") != nullptr) {
    (void)run_seed(number_from("FLEXKV_SEED", 0), true, totals);
    print(totals);
    return;
  }
  const std::uint64_t first = number_from("FLEXKV_FIRST_SEED", 0);
  const std::uint64_t count = number_from("FLEXKV_SEEDS", kDefaultSeeds);
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const std::uint64_t hash = run_seed(seed, false, totals);
    if (seed % kRepeatEvery != 0) continue;
    SimTotals again;
    ASSERT_EQ(hash, run_seed(seed, false, again)) << "seed " << seed << " does not repeat itself";
  }
  print(totals);
  // A world in which nothing is ever found would pass all checks.
  EXPECT_GE(totals.requests, 20 * count);
  EXPECT_GE(totals.loads_ok, 5 * count);
  EXPECT_GE(totals.loads_in_part, count / 4);
  EXPECT_GE(totals.blocks_loaded_alike, 5 * count);
  EXPECT_GE(totals.blocks_saved, 20 * count);
  EXPECT_GE(totals.blocks_written, 5 * count);
  EXPECT_GE(totals.blocks_fetched, count);
  EXPECT_GE(totals.blocks_prefetched, count / 10);
  EXPECT_GE(totals.blocks_recovered, count / 10);
  EXPECT_GE(totals.blocks_imported, count);
  EXPECT_GE(totals.blocks_lent, count);
  EXPECT_GE(totals.blocks_stored, count);
  EXPECT_GE(totals.blocks_offered, count / 10);
  EXPECT_GE(totals.blocks_checked, count);
  EXPECT_GE(totals.blocks_damaged, count / 10);
}

}  // namespace
}  // namespace flexkv::testing
