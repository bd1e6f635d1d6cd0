// Engines some of whose ranks hold the same bytes.
#include <map>
#include <set>

#include "flexkv/node/node_fixture.h"

namespace flexkv::node {
namespace {

class NodeShardsTest : public NodeTest {
 protected:
  // One rank for each entry: the shard that it holds. Their agents are the last ones in `agents`.
  EngineHandle engine_with(const std::string& id, const std::vector<std::uint32_t>& shards, std::uint8_t model = 1) {
    const auto ranks = static_cast<std::uint32_t>(shards.size());
    for (std::uint32_t rank = 0; rank < ranks; ++rank) {
      agents.push_back(node->attach_agent(hello_with(id, rank, ranks, shards[rank])).value());
    }
    return node->attach_client(client_hello(id, ranks, model)).value();
  }
  static proto::AgentHello hello_with(const std::string& id, std::uint32_t rank, std::uint32_t ranks,
                                      std::uint32_t shard) {
    auto hello = agent_hello(id, rank, ranks);
    hello.shard = shard;
    return hello;
  }
  void start_with(std::uint64_t slots, std::uint64_t shards) {
    NodeOptions options;
    options.pool_bytes = slots * shards * kPage;
    start(options);
  }
  // What each rank was told to copy for the job: device blocks, and the places of the pool.
  struct Told {
    std::vector<std::uint32_t> device_blocks;
    std::vector<std::uint64_t> places;
  };
  Told told(AgentHandle agent, JobId job) const {
    const auto commands = sent<proto::CopyCommand>(agent, job);
    EXPECT_EQ(commands.size(), 1U);
    EXPECT_TRUE(commands[0].last);
    Told result;
    for (const auto& block : commands[0].blocks()) {
      result.device_blocks.push_back(block.device_block);
      result.places.push_back(block.host_offset);
    }
    return result;
  }
};

TEST_F(NodeShardsTest, SlicesOfASaveCoverEachBlockOnceAndLoadsGoToAllRanksWhole) {
  for (const std::uint32_t ranks : {1U, 2U, 3U, 8U}) {
    for (std::uint32_t blocks = 1; blocks <= 20; ++blocks) {
      agents.clear();
      messages.clear();
      results.clear();
      start_with(64, 1);
      const auto e = engine_with("e", std::vector<std::uint32_t>(ranks, 0));
      const Keys keys = keys_of(1, blocks);
      const JobId job = 100 + ranks + blocks;
      keep(e, 1, job, keys);
      ASSERT_TRUE(done(job));
      std::vector<std::uint32_t> from;
      std::vector<std::uint64_t> places;
      for (const AgentHandle agent : agents) {
        const Told slice = told(agent, job);
        EXPECT_GE(slice.places.size(), blocks / ranks);
        EXPECT_LE(slice.places.size(), (blocks + ranks - 1) / ranks);
        for (std::size_t i = 1; i < slice.device_blocks.size(); ++i) {
          EXPECT_EQ(slice.device_blocks[i], slice.device_blocks[i - 1] + 1);
        }
        from.insert(from.end(), slice.device_blocks.begin(), slice.device_blocks.end());
        places.insert(places.end(), slice.places.begin(), slice.places.end());
      }
      ASSERT_EQ(from.size(), blocks);
      EXPECT_EQ(std::set(places.begin(), places.end()).size(), blocks);
      // Where the block at each position lies.
      std::map<std::uint32_t, std::uint64_t> place_of;
      for (std::size_t i = 0; i < from.size(); ++i) place_of[from[i]] = places[i];
      ASSERT_EQ(place_of.size(), blocks);
      ASSERT_EQ(load(e, 1, 1, keys), Reason::kNone);
      for (const AgentHandle agent : agents) {
        const Told whole = told(agent, 1);
        ASSERT_EQ(whole.places.size(), blocks);
        for (std::uint32_t i = 0; i < blocks; ++i) EXPECT_EQ(whole.places[i], place_of.at(100 + i));
        report(agent, 1);
      }
      EXPECT_TRUE(done(1));
      EXPECT_EQ(node->stats().to_host.bytes, blocks * 1000U);
      EXPECT_EQ(node->stats().to_device.bytes, blocks * 1000U * ranks);
    }
  }
}

TEST_F(NodeShardsTest, ASingleBlockIsCopiedByEachRankInItsTurn) {
  start_with(64, 1);
  const auto e = engine_with("e", {0, 0, 0});
  std::multiset<std::size_t> copied;
  for (JobId job = 1; job <= 6; ++job) {
    ASSERT_EQ(save(e, job, job, keys_of(job, 1)), Reason::kNone);
    for (std::size_t rank = 0; rank < 3; ++rank) {
      if (!told(agents[rank], job).places.empty()) copied.insert(rank);
    }
  }
  EXPECT_EQ(copied, (std::multiset<std::size_t>{0, 0, 1, 1, 2, 2}));
}

TEST_F(NodeShardsTest, ASaveCommitsWhenAllRanksHaveReportedAlsoThoseWithNothingToCopy) {
  start_with(8, 1);
  const auto e = engine_with("e", {0, 0, 0});
  const Keys keys = keys_of(1, 1);
  ASSERT_EQ(save(e, 1, 3, keys), Reason::kNone);  // rank 2's turn
  for (const std::size_t rank : {2U, 0U}) {
    report(agents[rank], 3);
    EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 0U);
  }
  EXPECT_TRUE(told(agents[1], 3).places.empty());
  report(agents[1], 3);
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 1U);
}

TEST_F(NodeShardsTest, ARankThatFailsFailsTheSaveAlsoOneWithNothingToCopy) {
  start_with(8, 1);
  const auto e = engine_with("e", {0, 0});
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 1)), Reason::kNone);
  ASSERT_TRUE(told(agents[0], 2).places.empty());
  report(agents[0], 2, JobStatus::kCanceled);  // what it computed from was wrong
  EXPECT_EQ(sent<proto::CancelCommand>(agents[1], 2).size(), 1U);
  EXPECT_EQ(node->blocks_in_use(), 1U);
  report(agents[1], 2);
  EXPECT_EQ(failure(2), Reason::kCanceled);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

TEST_F(NodeShardsTest, ARankThatLeavesInMidSaveFailsItAndItsPlaceIsTakenByWhoComesBack) {
  start_with(16, 1);
  const auto e = engine_with("e", {0, 0});
  const Keys keys = keys_of(1, 4);
  ASSERT_EQ(save(e, 1, 1, keys), Reason::kNone);
  node->detach_agent(agents[0], now);
  EXPECT_FALSE(node->ready(e));
  EXPECT_FALSE(result(1));
  EXPECT_EQ(node->blocks_in_use(), 4U);  // the other may still write
  report(agents[1], 1);
  EXPECT_EQ(failure(1), Reason::kRankFailed);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  agents[0] = node->attach_agent(hello_with("e", 0, 2, 0)).value();
  keep(e, 2, 2, keys);
  EXPECT_EQ(told(agents[0], 2).places.size(), 2U);
  EXPECT_EQ(told(agents[1], 2).places.size(), 2U);
  EXPECT_EQ(lookup(e, 3, keys).matched_blocks, 4U);
}

// What a rank holds for itself stays whole beside what others hold alike.
TEST_F(NodeShardsTest, ShardsFollowOneAnotherByTheirNumbers) {
  start_with(8, 3);
  const auto e = engine_with("e", {2, 0, 2, 1});
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 2)), Reason::kNone);
  const auto first = told(agents[1], 2);
  const auto second = told(agents[3], 2);
  ASSERT_EQ(first.places.size(), 2U);
  ASSERT_EQ(second.places.size(), 2U);
  for (std::size_t i = 0; i < 2; ++i) EXPECT_EQ(second.places[i], first.places[i] + kPage);
  const auto third = told(agents[0], 2);
  const auto fourth = told(agents[2], 2);
  ASSERT_EQ(third.places.size(), 1U);
  ASSERT_EQ(fourth.places.size(), 1U);
  EXPECT_EQ(third.places[0], first.places[0] + 2 * kPage);
  EXPECT_EQ(fourth.places[0], first.places[1] + 2 * kPage);
  EXPECT_EQ(node->spaces()[0].block_bytes, 3000U);
  EXPECT_EQ(node->spaces()[0].slot_bytes, 3 * kPage);
}

// Blocks that are scattered on the device and in the pool: runs are cut where slices end.
TEST_F(NodeShardsTest, SlicesCutRuns) {
  start_with(64, 1);  // ranges of 4 slots
  const auto e = engine_with("e", {0, 0});
  proto::TransferRequest request{true, true, 1, 4, 0, keys_of(1, 10), 0, {7, 8, 9, 20, 21, 22, 23, 24, 25, 3}};
  ASSERT_EQ(node->save(e, request, now), Reason::kNone);
  EXPECT_EQ(told(agents[0], 4).device_blocks, (std::vector<std::uint32_t>{7, 8, 9, 20, 21}));
  EXPECT_EQ(told(agents[1], 4).device_blocks, (std::vector<std::uint32_t>{22, 23, 24, 25, 3}));
}

TEST_F(NodeShardsTest, AnyNumberOfHoldersSharesBlocksButNotWithRanksThatHoldTheirOwn) {
  start_with(64, 4);
  const auto two = engine_with("two", {0, 0});
  const Keys keys = keys_of(1, 3);
  keep(two, 1, 1, keys);
  const auto four = engine_with("four", {0, 0, 0, 0});
  EXPECT_EQ(lookup(four, 1, keys).matched_blocks, 3U);
  const auto own = engine_with("own", {0, 1});
  EXPECT_EQ(lookup(own, 1, keys).matched_blocks, 0U);
  const auto numbered_by_rank = engine("numbered by rank", 2);
  keep(own, 1, 2, keys);
  EXPECT_EQ(lookup(numbered_by_rank, 1, keys).matched_blocks, 3U);
  EXPECT_EQ(node->spaces().size(), 2U);
}

TEST_F(NodeShardsTest, RefusesUnlikeRanksOfOneShardAndNamesBoth) {
  start_with(8, 2);
  const auto first = node->attach_agent(hello_with("e", 0, 2, 0));
  ASSERT_TRUE(first.ok());
  auto other = hello_with("e", 1, 2, 0);
  other.shard_bytes = 2000;
  const auto longer = node->attach_agent(other);
  ASSERT_FALSE(longer.ok());
  for (const char* part : {"rank 1 of engine 'e'", "2000 bytes", "rank 0", "1000 bytes", "shard 0"}) {
    EXPECT_NE(longer.error().message.find(part), std::string::npos) << longer.error().message;
  }
  other = hello_with("e", 1, 2, 0);
  other.layout_id[3] = std::byte{1};
  EXPECT_FALSE(node->attach_agent(other).ok());
  other.shard = 2;
  EXPECT_FALSE(node->attach_agent(other).ok());  // two ranks have no third shard
  other.shard = 1;
  EXPECT_TRUE(node->attach_agent(other).ok());
  // Who has left is not compared with.
  node->detach_agent(first.value(), now);
  other.rank = 0;
  EXPECT_TRUE(node->attach_agent(other).ok());
}

}  // namespace
}  // namespace flexkv::node
