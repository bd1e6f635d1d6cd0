// Whom RemoteReads asks, and when it gives a peer up.
#include <map>

#include "flexkv/base/prng.h"
#include "flexkv/server/remote_reads_fixture.h"

namespace flexkv::server {
namespace {

using node::RemoteOutcome;
using peer::Outcome;

TEST_F(RemoteReadsTest, GivesUpAReadThatHasStopped) {
  load_timeout = 600 * kSecond;
  has(kA, 0, 8);
  has(kB, 0, 7);
  ASSERT_TRUE(read(8, 0));
  deliver(2);
  wait_until_given_up();
  EXPECT_EQ(given_up, std::vector{asked.back().id});
  EXPECT_TRUE(canceled.empty());
  EXPECT_FALSE(end(Outcome::kDeadline));
  expect_asked(kB, 2, 5);
  deliver(5);
  EXPECT_EQ(end(Outcome::kDone)->outcome, RemoteOutcome::kMissing) << "only a had the last one";
  EXPECT_EQ(came, (std::vector<std::uint32_t>{0, 1, 2, 3, 4, 5, 6}));
  EXPECT_FALSE(reads.next_time());
  EXPECT_EQ(reads.given_up(), 1U);
  EXPECT_EQ(found(8, 0), 7U) << "the next load would walk into the same stall";
}

TEST_F(RemoteReadsTest, AReadThatGoesOnIsNotGivenUp) {
  load_timeout = 600 * kSecond;
  has(kA, 0, 8);
  ASSERT_TRUE(read(8, 0));
  for (int block = 0; block < 7; ++block) {
    now += kPatienceMin - 2 * kMillisecond;
    reads.on_time(now);
    deliver(1);
  }
  EXPECT_TRUE(given_up.empty());
  // One that was given up, and came all the same: the peers found another way to bring it.
  wait_until_given_up();
  deliver(1);
  EXPECT_EQ(end(Outcome::kDone)->outcome, RemoteOutcome::kDone);
  EXPECT_EQ(found(8, 0), 8U);
}

// Owners that stop in the middle, for ever or for a while, with answers that cross with what this node has said.
TEST_F(RemoteReadsTest, EveryReadEndsBeforeItsTimeAndNothingComesOfItAfterwards) {
  constexpr std::uint32_t kBlocks = 12;
  const auto keys = chain(kBlocks);
  std::uint64_t stopped_reads = 0;
  std::uint64_t whole = 0;
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    SCOPED_TRACE(seed);
    Prng random(seed);
    struct Owner {
      bool stopped = false;
      Nanos each = kMillisecond;
    };
    struct Request {
      peer::ReadRequest asked;
      std::uint32_t came = 0;
      Nanos next = 0;
      std::optional<Outcome> ended;  // by this node
    };
    std::map<cluster::Incarnation, Owner> owners;
    for (const auto node : {kA, kB}) {
      replica.clear(node, 0);
      has(node, 0, static_cast<std::uint32_t>(1 + random.below(kBlocks)));
      owners[node] = {random.chance(40), static_cast<Nanos>(1 + random.below(100)) * kMillisecond};
    }
    std::map<peer::RequestId, Request> lane;
    std::map<node::RemoteOp, std::uint32_t> wanted;
    std::map<node::RemoteOp, std::uint32_t> got;
    RemoteReads tested(replica, pool, random.next(),
                       {[&](peer::ReadRequest request) {
                          const auto id = request.id;
                          lane[id] = {std::move(request), 0, now + kMillisecond, {}};
                        },
                        [&](peer::RequestId id) {
                          if (lane.contains(id)) lane.at(id).ended = Outcome::kCanceled;
                        },
                        [&](peer::RequestId id) {
                          if (lane.contains(id)) lane.at(id).ended = Outcome::kDeadline;
                        }});
    tested.open_space(kSpace, 0, {7}, kSlotBytes);
    node::RemoteOp last = 0;
    for (int step = 0; step < 400; ++step) {
      now += static_cast<Nanos>(random.below(random.chance(10) ? kSecond : 5 * kMillisecond));
      if (random.chance(5)) owners[random.chance(50) ? kA : kB].stopped ^= true;
      if (last < 6 && random.chance(20)) {
        const auto first = static_cast<std::uint32_t>(random.below(kBlocks));
        node::RemoteRead asking;
        asking.op = ++last;
        asking.space = kSpace;
        asking.keys = keys;
        asking.first = first;
        for (std::uint32_t i = first; i < kBlocks; ++i) asking.host_offsets.push_back(i * kSlotBytes);
        asking.deadline = now + 600 * kSecond;  // far beyond what this test waits for
        if (tested.read(std::move(asking), now)) wanted[last] = kBlocks - first;
      }
      if (!wanted.empty() && random.chance(2)) tested.cancel(wanted.begin()->first);
      if (tested.next_time() && *tested.next_time() <= now) tested.on_time(now);
      for (auto at = lane.begin(); at != lane.end();) {
        auto& [id, request] = *at;
        const Owner& owner = owners.at(request.asked.node == cluster::hex(kA) ? kA : kB);
        std::optional<Outcome> outcome = request.ended;
        const auto blocks = static_cast<std::uint32_t>(request.asked.buffers.size());
        if (!outcome && !owner.stopped && request.next <= now) {
          if (request.came == blocks) {
            outcome = Outcome::kDone;
          } else {
            const auto arrived = tested.on_block(id, now);
            ASSERT_TRUE(arrived);
            ASSERT_TRUE(wanted.contains(arrived->op)) << "a block of a read that has ended";
            ASSERT_EQ(arrived->index, got[arrived->op]++);
            ++request.came;
            request.next = now + owner.each;
          }
        }
        if (!outcome) {
          ++at;
          continue;
        }
        stopped_reads += *outcome == Outcome::kDeadline;
        const auto request_id = id;
        at = lane.erase(at);
        if (const auto ended = tested.on_end(request_id, *outcome, true, now)) {
          ASSERT_EQ(wanted.erase(ended->op), 1U) << "it has ended before";
          whole += ended->outcome == RemoteOutcome::kDone;
        }
        break;  // the next one may have been asked for meanwhile
      }
    }
    // Nobody says anything any more: all that is left is given up, long before its deadline.
    for (const Nanos end = now + 120 * kSecond; !wanted.empty() && now < end;) {
      ASSERT_TRUE(tested.next_time()) << "nothing would end it";
      now = std::max(now, *tested.next_time());
      tested.on_time(now);
      for (const auto& [id, request] : std::map(lane)) {
        if (!request.ended) continue;
        lane.erase(id);
        if (const auto ended = tested.on_end(id, *request.ended, true, now)) wanted.erase(ended->op);
      }
    }
    EXPECT_TRUE(wanted.empty());
    EXPECT_FALSE(tested.next_time());
    EXPECT_EQ(tested.reading(), 0U);
    for (const auto node : {kA, kB}) EXPECT_EQ(tested.flow(node, now).waiting_bytes, 0U);
    now += 1000 * kSecond;
    for (const auto node : {kA, kB}) replica.refresh(node, "address of " + cluster::hex(node), now + 10000 * kSecond);
  }
  EXPECT_GT(stopped_reads, 100U);
  EXPECT_GT(whole, 500U);
}

TEST_F(RemoteReadsTest, ALittleMoreOfAPromptBehindASlowPeerDoesNotWin) {
  has(kA, 0, 30);
  has(kB, 0, 32);
  // What a delivers takes a millisecond a block, what b does 50.
  const auto read_once = [&](cluster::Incarnation node, std::uint32_t blocks, Nanos each) {
    ASSERT_TRUE(read(blocks, 0));
    expect_asked(node, 0, blocks);
    for (std::uint32_t i = 0; i < blocks; ++i) {
      now += each - kMillisecond;
      deliver(1);
    }
    ASSERT_TRUE(end(Outcome::kDone, false));
  };
  for (int i = 0; i < 8; ++i) {
    replica.clear(kB, 0);
    read_once(kA, 30, kMillisecond);
    has(kB, 0, 32);
    replica.clear(kA, 0);
    read_once(kB, 32, 50 * kMillisecond);
    has(kA, 0, 30);
  }
  // Two blocks more for a tenth of a second, or computed in a fiftieth.
  const auto found = reads.find(kSpace, chain(32), 0, 10.0 * kMillisecond, now);
  EXPECT_EQ(found.blocks, 30U);
  EXPECT_LT(30 * kSlotBytes / found.bytes_per_second, 0.1);
  EXPECT_EQ(reads.find(kSpace, chain(32), 0, 1.0 * kSecond, now).blocks, 32U);
  // Who does not say how fast it computes gets all, most of it from who is fast.
  const auto all = reads.find(kSpace, chain(32), 0, 0, now);
  EXPECT_EQ(all.blocks, 32U);
  EXPECT_LT(32 * kSlotBytes / all.bytes_per_second, 0.5);
  ASSERT_TRUE(read(32, 0));
  expect_asked(kA, 0, 30);
  deliver(30);
  EXPECT_FALSE(end(Outcome::kDone));
  expect_asked(kB, 30, 2);
  deliver(2);
  EXPECT_EQ(end(Outcome::kDone)->outcome, RemoteOutcome::kDone);
}

TEST_F(RemoteReadsTest, BlocksInMemoryAreReadRatherThanThoseOnDrives) {
  has(kA, 0, 8);
  const auto keys = chain(8);
  for (const auto& key : keys) {
    const cluster::Residency on_drives{cluster::tag_of(key), 2};
    ASSERT_TRUE(replica.apply(kB, 0, {&on_drives, 1}));
  }
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(read(8, 0));
    now += asked.back().node == cluster::hex(kA) ? kMillisecond : 100 * kMillisecond;
    deliver(8);
    ASSERT_TRUE(end(Outcome::kDone));
  }
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(read(8, 0));
    expect_asked(kA, 0, 8);
    deliver(8);
    ASSERT_TRUE(end(Outcome::kDone));
  }
}

TEST_F(RemoteReadsTest, AHotPrefixIsReadFromAllWhoHaveIt) {
  std::map<std::string, int> taken;
  for (cluster::Incarnation node = 1; node <= 100; ++node) {
    replica.refresh(node, "address of " + cluster::hex(node), now + 1000 * kSecond);
    has(node, 0, 8);
  }
  for (node::RemoteOp op = 1; op <= 400; ++op) {
    ASSERT_TRUE(read(8, 0, op));
    ++taken[asked.back().node];
    deliver(8);
    ASSERT_TRUE(end(Outcome::kDone));
  }
  EXPECT_GT(taken.size(), 50U);
  for (const auto& [node, count] : taken) EXPECT_LT(count, 40) << node;
}

}  // namespace
}  // namespace flexkv::server
