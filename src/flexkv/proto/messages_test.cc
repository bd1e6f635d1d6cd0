#include "flexkv/proto/messages.h"

#include <gtest/gtest.h>

#include "flexkv/base/prng.h"

namespace flexkv::proto {
namespace {

TEST(Messages, CopyCommandSurvivesTheTrip) {
  CopyCommand copy{
      7, device::Direction::kToDevice, true, 8192, {{1, 1, 4096}, {9, 3, 1ULL << 40}}, 3, false, 9, {{8, 1}, {2, 3}}};
  const auto decoded = decode_to_agent(encode(ToAgent{copy}));
  ASSERT_TRUE(decoded.ok());
  const auto& got = std::get<CopyCommand>(decoded.value());
  EXPECT_EQ(got.job, 7u);
  EXPECT_EQ(got.direction, device::Direction::kToDevice);
  EXPECT_TRUE(got.armed);
  const auto blocks = got.blocks();
  ASSERT_EQ(blocks.size(), 4u);
  EXPECT_EQ(got.block_count(), 4u);
  EXPECT_EQ(blocks[0].host_offset, 4096u);
  EXPECT_EQ(blocks[1].device_block, 9u);
  EXPECT_EQ(blocks[1].host_offset, 1ULL << 40);
  EXPECT_EQ(blocks[3].device_block, 11u);
  EXPECT_EQ(blocks[3].host_offset, (1ULL << 40) + 2 * 8192);
  EXPECT_EQ(got.piece, 3U);
  EXPECT_FALSE(got.last);
  EXPECT_EQ(got.job_blocks, 9U);
  ASSERT_EQ(got.spans.size(), 2U);
  EXPECT_EQ(got.spans[1].first, 2U);
  EXPECT_EQ(got.spans[1].count, 3U);
}

TEST(Messages, BlocksOfALoadThatAreNotTheJobsAreRefused) {
  const auto accepted = [](device::Direction direction, std::vector<BlockSpan> spans) {
    return decode_to_agent(
               encode(ToAgent{CopyCommand{1, direction, true, 4096, {{5, 3, 0}}, 0, true, 4, std::move(spans)}}))
        .ok();
  };
  EXPECT_TRUE(accepted(device::Direction::kToDevice, {{1, 3}}));
  EXPECT_TRUE(accepted(device::Direction::kToDevice, {{3, 1}, {0, 2}}));
  EXPECT_FALSE(accepted(device::Direction::kToDevice, {{2, 3}}));
  EXPECT_FALSE(accepted(device::Direction::kToDevice, {{UINT32_MAX, 3}}));
  EXPECT_FALSE(accepted(device::Direction::kToDevice, {{0, 2}}));
  EXPECT_FALSE(accepted(device::Direction::kToDevice, {{0, 3}, {3, 0}}));
  EXPECT_FALSE(accepted(device::Direction::kToDevice, {}));
  EXPECT_TRUE(accepted(device::Direction::kToHost, {}));
  EXPECT_FALSE(accepted(device::Direction::kToHost, {{0, 3}}));
}

TEST(Messages, HowFarALoadCameSurvivesTheTrip) {
  const auto report = decode_job_report(encode(JobReport{1, JobStatus::kCanceled, 5}));
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report.value().good_blocks, 5U);
  EXPECT_TRUE(report.value().sums.empty());
  const auto result = decode_to_client(encode(ToClient{JobResult{1, JobStatus::kFailed, Reason::kChecksum, 6}}));
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(std::get<JobResult>(result.value()).good_blocks, 6U);
}

TEST(Messages, SumsOfASaveSurviveTheTripAndAreBounded) {
  JobReport report{1, JobStatus::kDone, 0, {7, 0, UINT64_MAX}};
  const auto decoded = decode_job_report(encode(report));
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded.value().sums, report.sums);
  const auto bytes = encode(report);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode_job_report(std::span(bytes).first(size)).ok());
  }
  report.sums.assign(kSumsPerReportMax, 1);
  EXPECT_TRUE(decode_job_report(encode(report)).ok());
  report.sums.push_back(1);
  EXPECT_FALSE(decode_job_report(encode(report)).ok());
}

TEST(Messages, RunsThatGoRoundOrNameTooManyBlocksAreRefused) {
  const auto accepted = [](std::uint64_t stride, std::vector<BlockRun> runs) {
    return decode_to_agent(encode(ToAgent{CopyCommand{1, device::Direction::kToHost, true, stride, std::move(runs)}}))
        .ok();
  };
  constexpr std::uint32_t kBlockMax = UINT32_MAX;
  constexpr std::uint64_t kOffsetMax = UINT64_MAX;
  EXPECT_TRUE(accepted(4096, {}));
  EXPECT_FALSE(accepted(4096, {{1, 0, 0}}));
  EXPECT_TRUE(accepted(4096, {{kBlockMax - 1, 2, 0}}));
  EXPECT_FALSE(accepted(4096, {{kBlockMax - 1, 3, 0}}));
  EXPECT_TRUE(accepted(4096, {{0, 3, kOffsetMax - 2 * 4096}}));
  EXPECT_FALSE(accepted(4096, {{0, 3, kOffsetMax - 2 * 4096 + 1}}));
  EXPECT_FALSE(accepted(kOffsetMax, {{0, 3, 0}}));
  EXPECT_TRUE(accepted(0, {{0, kBlocksPerMessageMax, 0}}));
  EXPECT_FALSE(accepted(0, {{0, kBlocksPerMessageMax + 1, 0}}));
  EXPECT_FALSE(accepted(0, {{0, kBlocksPerMessageMax, 0}, {0, 1, 0}}));
}

TEST(Messages, ClientMessagesSurviveTheTrip) {
  TransferRequest transfer{true, false, 3, 4, 1, {{5, 6}, {7, 8}}, 1, {10, 11}, true};
  const auto decoded = decode_from_client(encode(FromClient{transfer}));
  ASSERT_TRUE(decoded.ok());
  const auto& got = std::get<TransferRequest>(decoded.value());
  EXPECT_TRUE(got.save);
  EXPECT_EQ(got.keys, transfer.keys);
  EXPECT_EQ(got.device_blocks, transfer.device_blocks);
  const auto lookup = decode_from_client(encode(FromClient{LookupRequest{1, 2, 3, {{5, 6}}, 7, true}}));
  ASSERT_TRUE(lookup.ok());
  EXPECT_EQ(std::get<LookupRequest>(lookup.value()).engine_blocks, 7U);
  EXPECT_TRUE(std::get<LookupRequest>(lookup.value()).alone);
  const auto reply = decode_to_client(encode(ToClient{LookupReply{1, 2, Reason::kEvicted}}));
  ASSERT_TRUE(reply.ok());
  EXPECT_EQ(std::get<LookupReply>(reply.value()).reason, Reason::kEvicted);
}

TEST(Messages, ARankThatNamesNoShardHoldsThatOfItsRank) {
  AgentHello hello{"engine", 1, 2, {}, 4096, 100, "host"};
  auto decoded = decode_agent_hello(encode(hello));
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded.value().engine_id, "engine");
  EXPECT_EQ(decoded.value().shard_number(), 1U);
  hello.shard = 0;
  auto bytes = encode(hello);
  decoded = decode_agent_hello(bytes);
  ASSERT_TRUE(decoded.ok());
  EXPECT_EQ(decoded.value().shard_number(), 0U);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode_agent_hello(std::span(bytes).first(size)).ok());
  }
  bytes.push_back(std::byte{0});
  EXPECT_FALSE(decode_agent_hello(bytes).ok());
}

TEST(Messages, AChangeIsDescribedOrNot) {
  ChangesReply reply{{events::Change{}}};
  const auto without = encode(ToClient{reply});
  reply.changes[0].description = std::make_shared<const events::Description>(
      events::Description{"hash", "", {1, 2}, std::make_shared<const std::string>("detail")});
  auto described = encode(ToClient{reply});
  std::byte& flag = described[without.size() - 1];
  ASSERT_EQ(flag, std::byte{1});
  EXPECT_TRUE(decode_to_client(described).ok());
  flag = std::byte{2};
  EXPECT_FALSE(decode_to_client(described).ok());
}

TEST(Messages, EveryTruncationAndExtensionIsRefused) {
  const FromClient messages[] = {LookupRequest{1, 2, 0, {{1, 2}}},
                                 TransferRequest{true, true, 1, 2, 0, {{1, 2}}, 0, {3}}, CloseSequence{1},
                                 CancelRequest{2}, CommitRequest{3}};
  for (const auto& message : messages) {
    auto bytes = encode(message);
    for (std::size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_FALSE(decode_from_client(std::span(bytes).first(size)).ok());
    }
    bytes.push_back(std::byte{0});
    EXPECT_FALSE(decode_from_client(bytes).ok());
  }
}

TEST(Messages, RandomBytesNeverCrash) {
  Prng prng(1);
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::byte> bytes(prng.below(80));
    for (auto& byte : bytes) byte = static_cast<std::byte>(prng.next());
    if (!bytes.empty()) bytes[0] = static_cast<std::byte>(prng.below(12));
    (void)decode_to_agent(bytes);
    (void)decode_from_client(bytes);
    (void)decode_to_client(bytes);
    (void)decode_job_report(bytes);
    (void)decode_agent_hello(bytes);
    (void)decode_client_hello(bytes);
    (void)decode_welcome(bytes);
  }
}

}  // namespace
}  // namespace flexkv::proto
