#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <set>

#include "flexkv/base/prng.h"
#include "flexkv/index/ghost_table.h"
#include "flexkv/index/run_table.h"

namespace flexkv::index {
namespace {

TEST(RunTable, AgreesWithASet) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    Prng prng(seed);
    RunTable table;
    std::set<std::pair<std::uint32_t, std::uint32_t>> expected;  // (tag, run); few tags, so that they collide
    std::uint32_t next_run = 0;
    const std::uint64_t spread = 1 + prng.below(200);
    for (int i = 0; i < 600; ++i) {
      if (expected.empty() || prng.chance(55)) {
        const auto tag = static_cast<std::uint32_t>(prng.below(spread)) * (seed % 2 == 0 ? 1 : 0x01000001);
        table.insert({1, tag}, next_run);
        expected.insert({tag, next_run++});
      } else {
        const auto it = std::next(expected.begin(), static_cast<std::ptrdiff_t>(prng.below(expected.size())));
        if (prng.chance(30)) {
          const auto [tag, run] = *it;
          table.replace({1, tag}, run, next_run);
          expected.erase(it);
          expected.insert({tag, next_run++});
        } else {
          table.erase({1, it->first}, it->second);
          expected.erase(it);
        }
      }
      RC_ASSERT(table.size() == expected.size());
    }
    for (const auto& [tag, run] : expected) {
      RC_ASSERT(table.find({1, tag}, [&, wanted = run](std::uint32_t found) { return found == wanted; }) == run);
    }
    RC_ASSERT(table.find({1, 12345678}, [](std::uint32_t) { return true; }) == kNone);
  }));
}

TEST(GhostTable, RemembersTheLatestAndIsBounded) {
  GhostTable ghosts(1024);
  const std::size_t bytes = ghosts.memory_bytes();
  Prng prng(1);
  std::vector<key::BlockKey> keys(100'000);
  for (auto& key : keys) key = {prng.next(), prng.next()};
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const Ghost ghost{MissReason::kEvicted, static_cast<unsigned>(i % 64), static_cast<Nanos>(i) * kMillisecond};
    ghosts.record(keys[i], ghost);
    const Ghost found = ghosts.find(keys[i]);
    ASSERT_EQ(found.reason, ghost.reason);
    ASSERT_EQ(found.uses, ghost.uses);
    ASSERT_LE(found.gone_at, ghost.gone_at);
    ASSERT_GT(found.gone_at, ghost.gone_at - 1024);
  }
  EXPECT_EQ(ghosts.memory_bytes(), bytes);
  std::size_t known = 0;
  for (const auto& key : keys) known += ghosts.find(key).reason != MissReason::kNeverSeen ? 1U : 0U;
  EXPECT_EQ(known, 1024u);
  std::size_t recent = 0;
  for (std::size_t i = keys.size() - 256; i < keys.size(); ++i) {
    recent += ghosts.find(keys[i]).reason == MissReason::kEvicted ? 1U : 0U;
  }
  EXPECT_GE(recent, 250u);
  ghosts.record(keys.back(), {MissReason::kReset, 0, 1'000 * kSecond});
  EXPECT_EQ(ghosts.find(keys.back()).reason, MissReason::kReset);
}

TEST(GhostTable, MayBeEmpty) {
  GhostTable ghosts(0);
  ghosts.record({1, 2}, {MissReason::kEvicted, 0, 1});
  EXPECT_EQ(ghosts.find({1, 2}).reason, MissReason::kNeverSeen);
  EXPECT_EQ(ghosts.memory_bytes(), 0u);
}

}  // namespace
}  // namespace flexkv::index
