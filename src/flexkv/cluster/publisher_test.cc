#include "flexkv/cluster/publisher.h"

#include <gtest/gtest.h>

#include "flexkv/base/prng.h"
#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

using Kind = Change::Kind;

key::BlockKey key_of(std::uint64_t number) { return {number, Prng::mix(number + 1)}; }

class PublisherTest : public ::testing::Test {
 protected:
  PublisherTest() { publisher.move_to({"stream", "snapshot:"}, 0); }

  void change(Kind kind, std::uint8_t tier, std::uint64_t number) {
    publisher.apply({kind, tier, 0, key_of(number), number == 0 ? key::BlockKey{} : key_of(number - 1)}, 0);
  }
  static Residency told(std::uint64_t number, Tiers tiers) {
    if (tiers == 0) return {tag_of(key_of(number)), tiers, kUnsaid};
    return {tag_of(key_of(number)), tiers, number == 0 ? kFirst : half(tag_of(key_of(number - 1)))};
  }
  // What the next request appends.
  std::vector<Batch> take() {
    std::vector<Batch> batches;
    if (publisher.due(kSecond) > kSecond) return batches;
    for (const meta::Op& op : publisher.publish_request(kSecond, kSecond)) {
      if (op.kind != meta::Op::Kind::kAppend) continue;
      EXPECT_EQ(op.key, "stream");
      auto batch = decode_batch(op.value, "stream");
      EXPECT_TRUE(batch.ok());
      EXPECT_EQ(batch.value().number, op.number);
      batches.push_back(std::move(batch).value());
    }
    return batches;
  }

  Publisher publisher{PublisherLimits{}};
};

TEST_F(PublisherTest, SaysWhereABlockIsNotWhatHappenedToIt) {
  change(Kind::kAdded, 0, 1);
  change(Kind::kAdded, 1, 1);
  change(Kind::kAdded, 0, 2);
  change(Kind::kRemoved, 0, 2);  // came and went: nobody need know
  const auto batches = take();
  ASSERT_EQ(batches.size(), 1U);
  EXPECT_EQ(batches[0].residencies, std::vector{told(1, 3)});
  publisher.published();
  EXPECT_TRUE(take().empty());
  change(Kind::kRemoved, 0, 1);
  change(Kind::kRemoved, 1, 1);
  change(Kind::kAdded, 1, 1);
  const Residency left{tag_of(key_of(1)), 2, kUnsaid};  // the others know where it lies
  EXPECT_EQ(take().at(0).residencies, std::vector{left});
}

TEST_F(PublisherTest, WaitsForOthersToJoinTheFirstChange) {
  change(Kind::kAdded, 0, 1);
  EXPECT_EQ(publisher.due(0), 100 * kMillisecond);
  for (std::uint64_t k = 2; k < 5000; ++k) change(Kind::kAdded, 0, k);
  EXPECT_EQ(publisher.due(0), 0) << "a full batch waits for nothing";
}

TEST_F(PublisherTest, RepeatsWhatMayHaveBeenLostAsItWas) {
  change(Kind::kAdded, 0, 1);
  const auto first = publisher.publish_request(kSecond, kSecond);
  change(Kind::kAdded, 0, 2);
  const auto again = publisher.publish_request(kSecond, kSecond);
  EXPECT_EQ(first[0].value, again[0].value);
  EXPECT_EQ(first[0].number, again[0].number);
  publisher.published();
  EXPECT_EQ(take().at(0).residencies, std::vector{told(2, 1)});
}

TEST_F(PublisherTest, AfterARestartOfTheFeedOnlyDifferencesAreTold) {
  for (std::uint64_t k = 0; k < 100; ++k) change(Kind::kAdded, 0, k);
  ASSERT_EQ(take().size(), 1U);
  publisher.published();
  change(Kind::kRestart, 0, 0);
  for (std::uint64_t k = 1; k < 101; ++k) change(Kind::kAdded, 0, k);
  change(Kind::kCurrent, 0, 0);
  EXPECT_EQ(take().at(0).residencies, (std::vector{told(0, 0), told(100, 1)}));
}

TEST_F(PublisherTest, OneWordClearsAll) {
  for (std::uint64_t k = 0; k < 100; ++k) change(Kind::kAdded, 0, k);
  ASSERT_EQ(take().size(), 1U);
  publisher.published();
  change(Kind::kCleared, 0, 0);
  change(Kind::kAdded, 0, 7);
  const auto batches = take();
  ASSERT_EQ(batches.size(), 1U);
  EXPECT_TRUE(batches[0].cleared);
  EXPECT_EQ(batches[0].residencies, std::vector{told(7, 1)});
}

// The formula of docs/decisions/0019, for a cache that turns over: all bytes are at most 2 * 8 * changes and a little.
TEST_F(PublisherTest, CostsAtMostAboutTwiceItsChanges) {
  constexpr std::uint64_t kBlocks = 100'000;
  std::uint64_t told = 0;
  for (std::uint64_t k = 0; k < 5 * kBlocks; ++k) {
    change(Kind::kAdded, 0, k);
    if (k >= kBlocks) change(Kind::kRemoved, 0, k - kBlocks);
    while (publisher.due(0) <= 0) {
      for (const Batch& batch : take()) told += batch.residencies.size();
      publisher.published();
    }
    while (publisher.snapshot_due()) {
      const auto request = publisher.snapshot_request(kSecond);
      ASSERT_TRUE(decode_batch(request[0].value, request[0].key).ok());
      (void)publisher.part_written();
    }
  }
  const std::uint64_t bytes = told * sizeof(Tag);
  EXPECT_GT(told, 8 * kBlocks);
  EXPECT_LE(publisher.stream_bytes(), bytes + bytes / 50);
  EXPECT_LE(publisher.snapshot_bytes(), publisher.stream_bytes());
  EXPECT_GT(publisher.snapshot_bytes(), 0U);
}

// Two chains that grew in turns, a few blocks at a time.
TEST_F(PublisherTest, SaysWhomBlocksFollowInBatchesAndWritesSnapshotsRowByRow) {
  constexpr std::uint64_t kOther = 1000;  // the second chain's first block
  std::vector<Residency> all;
  for (std::uint64_t k = 0; k < 100; k += 4) {
    for (const std::uint64_t first : {std::uint64_t{0}, kOther}) {
      for (std::uint64_t n = first + k; n < first + k + 4; ++n) {
        change(Kind::kAdded, 0, n);
        all.push_back(told(n, 1));
      }
    }
  }
  EXPECT_EQ(take().at(0).residencies, all);
  publisher.published();
  publisher.ask(0, kSecond);
  const auto request = publisher.snapshot_request(kSecond);
  const auto part = decode_batch(request[0].value, request[0].key);
  ASSERT_TRUE(part.ok());
  all.clear();
  for (std::uint64_t n = 0; n < 100; ++n) all.push_back(told(n, 1));
  for (std::uint64_t n = kOther; n < kOther + 100; ++n) all.push_back(told(n, 1));
  all[100].before = kFirst;  // in the snapshot it is the beginning of a row
  EXPECT_EQ(part.value().residencies, all);
}

TEST_F(PublisherTest, HeedsAskersNowAndThen) {
  change(Kind::kAdded, 0, 1);
  (void)take();
  publisher.published();
  EXPECT_FALSE(publisher.snapshot_due());
  publisher.ask(5, kSecond);
  EXPECT_FALSE(publisher.snapshot_due()) << "of a snapshot that is not the newest";
  publisher.ask(0, kSecond);
  ASSERT_TRUE(publisher.snapshot_due());
  (void)publisher.snapshot_request(kSecond);
  EXPECT_TRUE(publisher.part_written());
  EXPECT_TRUE(publisher.was_asked());
  publisher.ask(1, 2 * kSecond);
  EXPECT_FALSE(publisher.snapshot_due()) << "too soon";
  publisher.ask(1, 4 * kSecond);
  EXPECT_TRUE(publisher.snapshot_due());
}

}  // namespace
}  // namespace flexkv::cluster
