#include "flexkv/cluster/replica.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

key::BlockKey key_of(std::uint64_t number) { return {number, Prng::mix(number)}; }

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
  std::vector<Tiers> tiers(100);
  replica.tiers(2, 0, keys_of(100), 50, tiers);
  EXPECT_EQ(tiers[59], 2);
  EXPECT_EQ(tiers[60], 0);
  EXPECT_EQ(tiers[61], 2);
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

TEST(Replica, GivesMemoryBack) {
  Replica replica(1'000'000);
  replica.refresh(1, "", 100);
  EXPECT_TRUE(replica.apply(1, 0, blocks(0, 100'000, 1)));
  EXPECT_LE(replica.stats().memory_bytes, 100'000U * 19);
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
