#include "flexkv/cluster/replica.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

key::BlockKey key_of(std::uint64_t number) { return {number, Prng::mix(number + 1)}; }

std::vector<key::BlockKey> keys_of(std::uint64_t count) {
  std::vector<key::BlockKey> keys;
  for (std::uint64_t k = 0; k < count; ++k) keys.push_back(key_of(k));
  return keys;
}

std::vector<Residency> blocks(std::uint64_t first, std::uint64_t count, Tiers tiers) {
  std::vector<Residency> all;
  for (std::uint64_t k = first; k < first + count; ++k) all.push_back({tag_of(key_of(k)), tiers});
  return all;
}

std::vector<Replica::Holding> lookup(const Replica& replica, std::uint64_t count, Nanos now) {
  std::vector<Replica::Holding> out;
  replica.lookup(0, keys_of(count), now, out);
  return out;
}

TEST(Replica, SaysWhoHasHowLongAPrefixAndWhere) {
  Replica replica(1000);
  for (const Incarnation node : {1U, 2U, 3U}) replica.refresh(node, "at" + std::to_string(node), 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 50, 1)));
  EXPECT_TRUE(replica.apply(1, 0, blocks(10, 10, 3)));
  EXPECT_TRUE(replica.apply(2, 0, blocks(0, 80, 2)));
  EXPECT_TRUE(replica.apply(2, 0, blocks(60, 1, 0)));
  EXPECT_TRUE(replica.apply(3, 0, blocks(1, 90, 1)));  // not the first one
  EXPECT_TRUE(replica.apply(3, 1, blocks(0, 90, 1)));  // of another space
  const auto found = lookup(replica, 100, 50);
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found[0].node, 2U);
  EXPECT_EQ(found[0].blocks, 60U);
  EXPECT_EQ(found[0].in_tier[1], 60U);
  EXPECT_EQ(found[1].node, 1U);
  EXPECT_EQ(found[1].blocks, 50U);
  EXPECT_EQ(found[1].in_tier[0], 50U);
  EXPECT_EQ(found[1].in_tier[1], 10U);
  EXPECT_EQ(replica.address(2, 50), "at2");
}

TEST(Replica, ANodeThatIsNotRefreshedIsNotFoundAndComesBackWhenItIs) {
  Replica replica(1000);
  replica.refresh(1, "here", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 5, 1)));
  EXPECT_EQ(lookup(replica, 5, 100).size(), 1U);
  EXPECT_TRUE(lookup(replica, 5, 101).empty());
  EXPECT_EQ(replica.address(1, 101), "");
  replica.refresh(1, "here", 200);
  EXPECT_EQ(lookup(replica, 5, 101).size(), 1U);
}

TEST(Replica, NeverHoldsMoreThanItsBound) {
  Replica replica(100);
  replica.refresh(1, "", 100);
  replica.refresh(2, "", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 60, 1)));
  EXPECT_FALSE(replica.apply(2, 0, blocks(0, 60, 1)));
  EXPECT_EQ(replica.stats().blocks, 100U);
  EXPECT_EQ(replica.stats().left_out, 20U);
  EXPECT_FALSE(replica.roomy());
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 60, 2))) << "changing what is there needs no room";
  replica.remove(1);
  EXPECT_TRUE(replica.roomy());
  EXPECT_TRUE(replica.apply(2, 0, blocks(0, 60, 1)));
  replica.clear(2, 0);
  EXPECT_EQ(replica.stats().blocks, 0U);
  EXPECT_TRUE(replica.apply(3, 0, blocks(0, 60, 1)));
  EXPECT_EQ(replica.stats().blocks, 0U) << "of a node that nobody knows";
}

using Model = std::map<Incarnation, std::map<std::uint64_t, Tiers>>;

// Nodes that have much in common, gain and lose blocks with holes anywhere, are forgotten, die and come back, beside
// maps that say what each has.
RC_GTEST_PROP(Replica, IsWhatTheNodesSaidWhoeverElseSaidIt, ()) {
  constexpr std::uint64_t kBlocks = 120;
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  Replica replica(1'000'000);
  Model model;
  const std::uint64_t nodes = *rc::gen::inRange<std::uint64_t>(1, 12);
  const auto prompt = keys_of(kBlocks);
  for (int turn = 0; turn < 200; ++turn) {
    const Incarnation node = 1 + random.below(nodes);
    const std::uint64_t what = random.below(100);
    if (what < 2) {
      replica.clear(node, 0);
      if (model.contains(node)) model[node].clear();
    } else if (what < 4) {
      replica.remove(node);
      model.erase(node);
    } else {
      replica.refresh(node, "", 100);
      const std::uint64_t first = random.below(3) == 0 ? random.below(kBlocks) : model[node].size();
      const std::uint64_t end = std::min(kBlocks, first + 1 + random.below(random.below(3) == 0 ? kBlocks : 8));
      const auto tiers = static_cast<Tiers>(random.below(4) == 0 ? random.below(4) : 1);
      std::vector<Residency> told;
      for (std::uint64_t k = first; k < end; ++k) {
        told.push_back({tag_of(prompt[k]), tiers, k == 0 ? kFirst : half(tag_of(prompt[k - 1]))});
        model[node].erase(k);
        if (tiers != 0) model[node][k] = tiers;
      }
      RC_ASSERT(replica.apply(node, 0, told));
    }
    const std::uint64_t from = random.below(2) == 0 ? 0 : random.below(kBlocks);
    std::vector<Replica::Holding> found;
    replica.lookup(0, std::span(prompt).subspan(from), 50, found);
    std::map<Incarnation, Replica::Holding> expected;
    std::uint64_t blocks = 0;
    for (const auto& [id, has] : model) {
      Replica::Holding holding{id, 0, {}};
      for (std::uint64_t k = from; has.contains(k); ++k) {
        ++holding.blocks;
        for (unsigned tier = 0; tier < kTierCount; ++tier) holding.in_tier[tier] += has.at(k) >> tier & 1U;
      }
      if (holding.blocks > 0) expected[id] = holding;
      blocks += has.size();
      RC_ASSERT(replica.blocks(id) == has.size());
      RC_ASSERT(replica.content(id, 0).size() == has.size());
    }
    RC_ASSERT(replica.stats().blocks == blocks);
    RC_ASSERT(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (i > 0) RC_ASSERT(found[i - 1].blocks >= found[i].blocks);
      RC_ASSERT(found[i].blocks == expected[found[i].node].blocks);
      RC_ASSERT(found[i].in_tier == expected[found[i].node].in_tier);
    }
  }
}

TEST(Replica, BlocksOfNodesThatAreGoneAreGivenBack) {
  constexpr std::uint64_t kBlocks = 20'000;
  Replica replica(1'000'000);
  replica.refresh(1, "", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, kBlocks, 1)));
  for (Incarnation node = 2; node < 12; ++node) {
    replica.refresh(node, "", 100);
    EXPECT_TRUE(replica.apply(node, 0, blocks(node * kBlocks, kBlocks, 1)));
    replica.remove(node);
    EXPECT_LE(replica.stats().memory_bytes, kBlocks * 80) << node;
  }
  EXPECT_EQ(lookup(replica, kBlocks, 50).at(0).blocks, kBlocks);
}

// A node that is cleared gets another number each time, and there are 65,535.
TEST(Replica, ANodeMayBeClearedAnyNumberOfTimes) {
  Replica replica(1000);
  for (const Incarnation node : {1U, 2U}) replica.refresh(node, "", 100);
  EXPECT_TRUE(replica.apply(2, 0, blocks(0, 5, 1)));
  for (int turn = 0; turn < 70'000; ++turn) {
    replica.clear(1, 0);
    ASSERT_TRUE(replica.apply(1, 0, blocks(0, 1, 1)));
  }
  const auto found = lookup(replica, 5, 50);
  ASSERT_EQ(found.size(), 2U);
  EXPECT_EQ(found[0].node, 2U);
  EXPECT_EQ(found[0].blocks, 5U);
  EXPECT_EQ(found[1].blocks, 1U);
}

TEST(Replica, GivesMemoryBack) {
  Replica replica(1'000'000);
  replica.refresh(1, "", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 100'000, 1)));
  EXPECT_LE(replica.stats().memory_bytes, 100'000U * 23);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 99'000, 0)));
  EXPECT_LE(replica.stats().memory_bytes, 100'000U * 4);
}

// For the thread sanitizer, and for answers that can never have been true.
TEST(Replica, LookupsGoOnWhileItIsWritten) {
  Replica replica(1'000'000);
  replica.refresh(1, "", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 10, 1)));
  std::atomic<bool> over = false;
  std::thread reader([&] {
    while (!over) {
      const auto found = lookup(replica, 20, 50);
      ASSERT_EQ(found.size(), 1U);
      ASSERT_EQ(found[0].blocks, 10U);
    }
  });
  for (int turn = 0; turn < 3; ++turn) {
    EXPECT_TRUE(replica.apply(1, 0, blocks(1000, 20'000, 1)));
    EXPECT_TRUE(replica.apply(1, 0, blocks(1000, 20'000, 0)));
    replica.refresh(2, "", 100);
    EXPECT_TRUE(replica.apply(2, 0, blocks(1000, 100, 1)));
    replica.remove(2);
  }
  over = true;
  reader.join();
}

}  // namespace
}  // namespace flexkv::cluster
