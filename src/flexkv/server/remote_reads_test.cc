#include <set>
#include <string>

#include "flexkv/server/remote_reads_fixture.h"

namespace flexkv::server {
namespace {

using node::RemoteOutcome;
using peer::Outcome;

TEST_F(RemoteReadsTest, AsksWhoHasLeftForWhatWasFoundThereAMomentAgo) {
  has(kA, 0, 8);
  has(kB, 0, 3);
  ASSERT_EQ(found(8, 0), 8U);
  replica.clear(kA, 0);
  EXPECT_EQ(found(8, 0), 3U) << "nobody finds it there any more";
  ASSERT_TRUE(read(8, 0));
  expect_asked(kB, 0, 3);
  deliver(3);
  EXPECT_FALSE(end(Outcome::kDone));
  expect_asked(kA, 3, 5);
  deliver(5);
  ASSERT_EQ(end(Outcome::kDone)->outcome, RemoteOutcome::kDone);
  // It says that it has no more of it: nobody is asked twice.
  ASSERT_TRUE(read(8, 4, 2));
  expect_asked(kA, 4, 4);
  EXPECT_TRUE(end(Outcome::kMissing));
  now += kPromise;
  EXPECT_FALSE(read(8, 4, 3)) << "a promise lasts as long as what was looked up is safe at its owner";
}

TEST_F(RemoteReadsTest, ReadsFromWhoHasMost) {
  has(kA, 0, 8);
  has(kB, 0, 6);
  EXPECT_EQ(found(10, 4), 4U);
  EXPECT_EQ(found(10, 8), 0U);
  EXPECT_EQ(reads.find(kSpace + 1, chain(10), 4, 0, now).blocks, 0U);
  ASSERT_TRUE(read(8, 4));
  expect_asked(kA, 4, 4);
  deliver(4);
  const auto ended = end(Outcome::kDone);
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->op, 1U);
  EXPECT_EQ(ended->outcome, RemoteOutcome::kDone);
  EXPECT_EQ(came, (std::vector<std::uint32_t>{0, 1, 2, 3}));
  EXPECT_EQ(reads.reading(), 0U);
  // Four blocks in four milliseconds.
  EXPECT_NEAR(reads.find(kSpace, chain(8), 4, 0, now).bytes_per_second, 1000.0 * kSlotBytes, 100.0 * kSlotBytes);
}

TEST_F(RemoteReadsTest, NobodyHasIt) {
  EXPECT_EQ(found(4, 0), 0U);
  EXPECT_FALSE(read(4, 0));
  has(kA, 1, 4);  // but not the first
  EXPECT_EQ(found(4, 0), 0U);
  EXPECT_EQ(found(4, 1), 3U);
  replica.remove(kA);
  EXPECT_FALSE(read(4, 1));
  EXPECT_TRUE(asked.empty());
}

TEST_F(RemoteReadsTest, GoesOnWhereAnotherHasTheRest) {
  has(kA, 0, 8);
  has(kB, 0, 7);
  for (const Outcome outcome : {Outcome::kMissing, Outcome::kChecksum, Outcome::kExpired, Outcome::kUnreachable}) {
    came.clear();
    ASSERT_TRUE(read(8, 2));
    expect_asked(kA, 2, 6);
    deliver(3);
    EXPECT_FALSE(end(outcome));
    expect_asked(kB, 5, 2);
    deliver(2);
    // That is all that b has, and a is not asked again.
    const auto ended = end(Outcome::kDone);
    ASSERT_TRUE(ended);
    EXPECT_EQ(ended->outcome, RemoteOutcome::kMissing);
    EXPECT_EQ(came, (std::vector<std::uint32_t>{0, 1, 2, 3, 4}));
    now += kRestMax;
  }
}

TEST_F(RemoteReadsTest, AsksAgainWhoGivesOnlySoMuchAtATime) {
  has(kA, 0, 8);
  ASSERT_TRUE(read(8, 0));
  deliver(5);
  EXPECT_FALSE(end(Outcome::kBusy));
  expect_asked(kA, 5, 3);
  const auto ended = end(Outcome::kBusy);  // and nothing came
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->outcome, RemoteOutcome::kBusy);
}

TEST_F(RemoteReadsTest, EndsWithoutAnotherTry) {
  has(kA, 0, 8);
  has(kB, 0, 8);
  ASSERT_TRUE(read(8, 0, 1));
  reads.cancel(1);
  EXPECT_EQ(canceled, std::vector{asked.back().id});
  EXPECT_EQ(end(Outcome::kCanceled)->outcome, RemoteOutcome::kCanceled);
  reads.cancel(1);  // it has ended
  EXPECT_EQ(canceled.size(), 1U);
  ASSERT_TRUE(read(8, 0, 2));
  EXPECT_EQ(end(Outcome::kMissing, false)->outcome, RemoteOutcome::kMissing);
  ASSERT_TRUE(read(8, 0, 3));
  now += 10 * kSecond;
  EXPECT_EQ(end(Outcome::kMissing)->outcome, RemoteOutcome::kMissing) << "the deadline has passed";
  EXPECT_EQ(asked.size(), 3U);
  EXPECT_FALSE(end(Outcome::kDone)) << "of a request that has ended";
}

TEST_F(RemoteReadsTest, LetsAPeerRestThatCannotBeReachedOrIsSilent) {
  has(kA, 0, 8);
  Nanos rest = kRestMin;
  for (const Outcome outcome : {Outcome::kUnreachable, Outcome::kDeadline, Outcome::kUnreachable}) {
    ASSERT_TRUE(read(8, 0));
    EXPECT_TRUE(end(outcome));
    EXPECT_EQ(found(8, 0), 0U);
    EXPECT_FALSE(read(8, 0));
    now += rest - 1;
    EXPECT_EQ(found(8, 0), 0U);
    now += 1;
    EXPECT_EQ(found(8, 0), 8U);
    rest *= 2;
  }
  // Once it has delivered, the next rest is short again.
  ASSERT_TRUE(read(8, 0));
  deliver(8);
  EXPECT_TRUE(end(Outcome::kDone));
  ASSERT_TRUE(read(8, 0));
  EXPECT_TRUE(end(Outcome::kUnreachable));
  now += kRestMin;
  EXPECT_EQ(found(8, 0), 8U);
  // Slow is not silent.
  ASSERT_TRUE(read(8, 0));
  deliver(1);
  EXPECT_TRUE(end(Outcome::kDeadline));
  EXPECT_EQ(found(8, 0), 8U);
}

TEST_F(RemoteReadsTest, LetsAPeerRestThatStops) {
  has(kA, 0, 8);
  ASSERT_TRUE(read(8, 0));
  reads.cancel(1);
  EXPECT_TRUE(end(Outcome::kCanceled));
  EXPECT_EQ(found(8, 0), 8U) << "this node called the read off, not the peer";
  ASSERT_TRUE(read(8, 0));
  deliver(2);
  EXPECT_TRUE(end(Outcome::kCanceled));
  EXPECT_EQ(found(8, 0), 0U);
  now += kRestMin;
  EXPECT_EQ(found(8, 0), 8U);
}

TEST_F(RemoteReadsTest, ReadsThatFailTogetherAreOneFailure) {
  has(kA, 0, 8);
  for (node::RemoteOp op = 1; op <= 5; ++op) ASSERT_TRUE(read(8, 0, op));
  for (const auto& request : std::exchange(asked, {})) {
    EXPECT_TRUE(reads.on_end(request.id, Outcome::kUnreachable, true, now));
  }
  now += kRestMin;
  EXPECT_EQ(found(8, 0), 8U);
}

TEST_F(RemoteReadsTest, SpreadsReadsOverThoseWhoHaveTheSame) {
  has(kA, 0, 8);
  has(kB, 0, 8);
  for (node::RemoteOp op = 1; op <= 4; ++op) ASSERT_TRUE(read(8, 0, op));
  EXPECT_NE(asked[0].node, asked[1].node);
  EXPECT_NE(asked[2].node, asked[3].node);
  EXPECT_EQ(reads.flow(kA, now).waiting_bytes, 16 * kSlotBytes);
  for (const auto& request : std::exchange(asked, {})) {
    ASSERT_TRUE(reads.on_end(request.id, Outcome::kCanceled, false, now));
  }
  EXPECT_EQ(reads.flow(kA, now).waiting_bytes, 0U);
  EXPECT_EQ(reads.flow(kB, now).waiting_bytes, 0U);
}

// Not all of very many are compared: reads spread all the same, and nobody who rests or failed is asked.
TEST_F(RemoteReadsTest, SpreadsReadsOverManyWhoHaveTheSame) {
  constexpr cluster::Incarnation kMany = 100;
  for (cluster::Incarnation node = 1000; node < 1000 + kMany; ++node) {
    replica.refresh(node, "somewhere", now + 1000 * kSecond);
    has(node, 0, 2);
  }
  std::set<std::string> nodes;
  for (node::RemoteOp op = 1; op <= 10; ++op) {
    ASSERT_TRUE(read(2, 0, op));
    nodes.insert(asked.back().node);
  }
  EXPECT_EQ(nodes.size(), 10U) << "who has something to send us already is not asked first";
  for (std::uint32_t tries = 1; tries < kMany; ++tries) {
    EXPECT_FALSE(end(Outcome::kUnreachable)) << "another one is asked";
    nodes.insert(asked.back().node);
  }
  EXPECT_EQ(nodes.size(), kMany);
  EXPECT_TRUE(end(Outcome::kUnreachable));
}

TEST_F(RemoteReadsTest, AChainThatIsTooLongForARequestEndsThere) {
  const auto keys = static_cast<std::uint32_t>(peer::kKeysMax);
  has(kA, keys - 2, keys + 10);
  EXPECT_EQ(found(keys + 10, keys - 2), 2U);
  EXPECT_EQ(found(keys + 10, keys), 0U);
}

}  // namespace
}  // namespace flexkv::server
