#include <gtest/gtest.h>

#include <map>
#include <set>

#include "flexkv/events/feed.h"
#include "flexkv/events/follower.h"

namespace flexkv::events {
namespace {

using Kind = Change::Kind;

key::BlockKey key(std::uint64_t n) { return {n, n}; }

DescriptionRef named(const std::string& hash, const std::string& parent = "") {
  return std::make_shared<const Description>(
      Description{hash, parent, {1, 2}, std::make_shared<const std::string>("details")});
}

class FeedTest : public ::testing::Test {
 protected:
  // All that the subscription has to say, a few changes at a time.
  std::vector<Change> read(Subscription& subscription, SpaceNumber number = 0) {
    std::vector<Change> out;
    while (subscription.read(
        feed, number, 3, [&](auto& kept) { kept.insert(kept.end(), snapshot.begin(), snapshot.end()); }, out)) {
    }
    return out;
  }
  static std::vector<Kind> kinds(const std::vector<Change>& changes) {
    std::vector<Kind> out;
    for (const Change& change : changes) out.push_back(change.kind);
    return out;
  }

  int wakes = 0;
  Feed feed{8, [this] { ++wakes; }};
  SpaceFeed space{feed, 1};
  std::vector<Change> snapshot;
};

TEST_F(FeedTest, ReaderBeginsWithSnapshotAndGoesOnWithChanges) {
  const key::BlockKey keys[] = {key(1), key(2)};
  space.added(0, {}, keys);
  snapshot = {space.kept(0, {}, key(1)), space.kept(0, key(1), key(2))};
  Subscription reader;
  EXPECT_EQ(kinds(read(reader)), (std::vector{Kind::kRestart, Kind::kAdded, Kind::kAdded, Kind::kCurrent}));
  EXPECT_TRUE(read(reader).empty());
  space.removed(0, key(2), true);
  const auto news = read(reader);
  ASSERT_EQ(kinds(news), std::vector{Kind::kRemoved});
  EXPECT_EQ(news[0].key, key(2));
}

TEST_F(FeedTest, ReaderThatFellBehindBeginsAnew) {
  Subscription reader;
  read(reader);
  for (std::uint64_t n = 1; n <= 8; ++n) space.added(0, {}, std::vector{key(n)});
  EXPECT_EQ(read(reader).size(), 8U);
  for (std::uint64_t n = 1; n <= 9; ++n) space.added(0, {}, std::vector{key(n)});
  EXPECT_EQ(kinds(read(reader)), (std::vector{Kind::kRestart, Kind::kCurrent}));
}

TEST_F(FeedTest, ReaderOfOneSpaceHearsOfNoOtherAndBeginsAnewInAnother) {
  SpaceFeed other{feed, 2};
  Subscription reader;
  read(reader, 1);
  other.added(0, {}, std::vector{key(7)});
  space.added(0, {}, std::vector{key(8)});
  EXPECT_EQ(read(reader, 1).size(), 1U);
  EXPECT_EQ(kinds(read(reader, 2)), (std::vector{Kind::kRestart, Kind::kCurrent}));
}

TEST_F(FeedTest, DescriptionIsToldForEachTierAndForgottenWithTheLastPlace) {
  Subscription reader;
  space.added(0, key(1), std::vector{key(2)});
  space.added(1, key(1), std::vector{key(2)});
  read(reader);
  space.describe(key(1), key(2), named("b", "a"), 0b11);
  space.describe(key(1), key(2), named("again", "a"), 0b11);
  const auto told = read(reader);
  ASSERT_EQ(kinds(told), (std::vector{Kind::kAdded, Kind::kAdded}));
  EXPECT_EQ(told[0].tier + told[1].tier, 1);
  EXPECT_EQ(told[1].description->hash, "b");
  EXPECT_EQ(told[1].parent, key(1));
  space.removed(0, key(2), false);
  space.removed(1, key(2), true);
  const auto gone = read(reader);
  ASSERT_EQ(gone.size(), 2U);
  EXPECT_EQ(gone[1].description->hash, "b");
  EXPECT_EQ(space.description_count(), 0U);
}

TEST_F(FeedTest, NothingIsDescribedThatHasNoPlace) {
  space.describe({}, key(1), named("a"), 0);
  EXPECT_EQ(space.description_count(), 0U);
}

TEST_F(FeedTest, WakesOnceForEachWish) {
  space.added(0, {}, std::vector{key(1)});
  EXPECT_EQ(wakes, 0);
  feed.want_wake();
  space.added(0, {}, std::vector{key(2)});
  space.added(0, {}, std::vector{key(3)});
  EXPECT_EQ(wakes, 1);
}

Change added(std::uint64_t n, std::uint8_t tier, DescriptionRef description, SpaceNumber space = 1) {
  return {Kind::kAdded, tier, space, key(n), n > 1 ? key(n - 1) : key::BlockKey{}, std::move(description)};
}
Change said(Kind kind, std::uint64_t n = 0, std::uint8_t tier = 0, SpaceNumber space = 1) {
  return {kind, tier, space, key(n), {}, nullptr};
}

class FollowerTest : public ::testing::Test {
 protected:
  std::vector<Change> apply(const Change& change) {
    std::vector<Change> out;
    follower.apply(change, out);
    return out;
  }

  Follower follower{true};
};

TEST_F(FollowerTest, TellsEachBlockAndTierOnceAndOnlyWithDescription) {
  EXPECT_TRUE(apply(added(1, 0, nullptr)).empty());
  EXPECT_EQ(apply(added(1, 0, named("a"))).size(), 1U);
  EXPECT_TRUE(apply(added(1, 0, named("a"))).empty());
  EXPECT_EQ(apply(added(1, 1, named("a"))).size(), 1U);
  const auto removed = apply(said(Kind::kRemoved, 1, 0));
  ASSERT_EQ(removed.size(), 1U);
  EXPECT_EQ(removed[0].description->hash, "a");
  EXPECT_TRUE(apply(said(Kind::kRemoved, 1, 0)).empty());
  EXPECT_TRUE(apply(said(Kind::kRemoved, 2, 0)).empty());
}

TEST_F(FollowerTest, AfterARestartTakesBackWhatIsNotSaidAgain) {
  apply(added(1, 0, named("a")));
  apply(added(1, 1, named("a")));
  apply(added(2, 0, named("b", "a")));
  EXPECT_TRUE(apply(said(Kind::kRestart)).empty());
  EXPECT_TRUE(apply(added(1, 1, named("a"))).empty());
  const auto lost = apply(said(Kind::kCurrent));
  std::set<std::pair<std::string, int>> names;
  for (const Change& change : lost) {
    EXPECT_EQ(change.kind, Kind::kRemoved);
    names.emplace(change.description->hash, change.tier);
  }
  EXPECT_EQ(names, (std::set<std::pair<std::string, int>>{{"a", 0}, {"b", 0}}));
}

TEST_F(FollowerTest, OneWordClearsTheLastSpaceOnly) {
  apply(added(1, 0, named("a"), 1));
  apply(added(9, 0, named("z"), 2));
  const auto first = apply(said(Kind::kCleared, 0, 0, 1));
  ASSERT_EQ(first.size(), 1U);
  EXPECT_EQ(first[0].kind, Kind::kRemoved);
  const auto second = apply(said(Kind::kCleared, 0, 0, 2));
  ASSERT_EQ(second.size(), 1U);
  EXPECT_EQ(second[0].kind, Kind::kCleared);
  EXPECT_TRUE(apply(said(Kind::kCleared, 0, 0, 2)).empty());
}

TEST_F(FollowerTest, WhatWasToldComesParentsFirst) {
  for (std::uint64_t n = 40; n > 0; --n) apply(added(n, 0, named(std::to_string(n))));
  const auto told = follower.told();
  ASSERT_EQ(told.size(), 40U);
  for (std::uint64_t n = 1; n <= 40; ++n) EXPECT_EQ(told[n - 1].key, key(n));
}

}  // namespace
}  // namespace flexkv::events
