#include <gtest/gtest.h>

#include <string>

#include "flexkv/client/client.h"

namespace flexkv::client {
namespace {

using proto::Reason;

// A host's end of the line, by script.
struct Host {
  std::uint64_t generation = 1;
  bool full = false;              // posts are refused
  bool deaf = false;              // lookups are not answered
  std::vector<bool> kept;         // blocks of the only prompt there is
  Reason reason = Reason::kNone;  // of every answer
  std::uint32_t disk_blocks = 0;
  std::vector<proto::FromClient> posted;
  std::vector<proto::LookupRequest> asked;
  std::vector<proto::JobResult> ended;
  int hang_ups = 0;

  template <typename T>
  std::size_t count() const {
    return static_cast<std::size_t>(
        std::ranges::count_if(posted, [](const auto& m) { return std::holds_alternative<T>(m); }));
  }
};

class ScriptedHost final : public HostPort {
 public:
  explicit ScriptedHost(Host& host) : host_(host) {}
  std::uint64_t generation() override { return host_.generation; }
  const std::array<std::uint8_t, 32>& key_secret() override { return secret_; }
  bool ask(proto::LookupRequest request) override {
    keys_ += request.alone ? 0 : request.keys.size();
    if (request.alone) keys_ = request.keys.size();
    host_.asked.push_back(std::move(request));
    return host_.generation != 0;
  }
  proto::LookupReply answer(Nanos) override {
    if (host_.deaf) return kNoAnswer;
    const std::size_t end = std::min(keys_, host_.kept.size());
    std::uint32_t matched = 0;
    if (host_.asked.back().alone) {
      for (std::uint32_t i = 0; i < end; ++i) matched = host_.kept[i] ? i + 1 : matched;
    } else {
      while (matched < end && host_.kept[matched]) ++matched;
    }
    return {0, matched, host_.reason, host_.disk_blocks, matched - std::min(matched, host_.disk_blocks), 0};
  }
  proto::LookupReply lookup(proto::LookupRequest request) override {
    return ask(std::move(request)) ? answer(0) : kNoAnswer;
  }
  bool post(const proto::FromClient& message) override {
    if (host_.generation == 0 || host_.full) return false;
    host_.posted.push_back(message);
    return true;
  }
  // As a connection that is made anew at once.
  void hang_up() override {
    ++host_.hang_ups;
    ++host_.generation;
  }
  std::vector<proto::JobResult> take_ended_jobs() override { return std::exchange(host_.ended, {}); }
  bool wait_ended_jobs(Nanos) override { return !host_.ended.empty(); }
  bool served(Nanos) override { return host_.generation != 0; }
  Nanos reuse_time() const override { return 0; }

 private:
  Host& host_;
  std::size_t keys_ = 0;
  std::array<std::uint8_t, 32> secret_{};
};

class HostsPortTest : public ::testing::Test {
 protected:
  HostsPortTest() {
    std::vector<std::unique_ptr<HostPort>> ports;
    for (Host& host : hosts) ports.push_back(std::make_unique<ScriptedHost>(host));
    client.emplace(join_ports(std::move(ports)), proto::ClientHello{});
    for (int i = 0; i < 8; ++i) texts.push_back("block " + std::to_string(i));
    for (const auto& text : texts) all.push_back(std::as_bytes(std::span(text)));
  }
  std::uint32_t found() { return client->lookup(client->open_sequence(), 0, all).matched_blocks; }
  JobId save() { return client->save(client->open_sequence(), 0, all, 0, blocks); }
  // The only job that has ended.
  proto::JobResult ended() {
    const auto results = client->take_ended_jobs();
    EXPECT_EQ(results.size(), 1U);
    return results.empty() ? proto::JobResult{} : results.front();
  }

  std::array<Host, 3> hosts;
  std::optional<Client> client;
  std::vector<std::string> texts;
  std::vector<std::span<const std::byte>> all;
  const std::vector<std::uint32_t> blocks{0, 1, 2, 3, 4, 5, 6, 7};
};

TEST_F(HostsPortTest, FindsWhatAllHave) {
  hosts[0].kept.assign(8, true);
  hosts[1].kept.assign(5, true);
  hosts[2].kept.assign(6, true);
  EXPECT_EQ(found(), 5U);
  hosts[2].kept.clear();
  hosts[2].reason = Reason::kEvicted;
  const auto reply = client->lookup(client->open_sequence(), 0, all);
  EXPECT_EQ(reply.matched_blocks, 0U);
  EXPECT_EQ(reply.reason, Reason::kEvicted) << "the reason is of the one that lacks it";
}

TEST_F(HostsPortTest, CountsBlocksOnDrivesOnlyOfWhatAllHave) {
  for (Host& host : hosts) host.kept.assign(8, true);
  hosts[1].disk_blocks = 3;
  auto reply = client->lookup(client->open_sequence(), 0, all);
  EXPECT_EQ(reply.host_blocks, 5U);
  EXPECT_EQ(reply.disk_blocks, 3U);
  hosts[2].kept.resize(5);
  reply = client->lookup(client->open_sequence(), 0, all);
  EXPECT_EQ(reply.matched_blocks, 5U);
  EXPECT_EQ(reply.host_blocks, 5U);
  EXPECT_EQ(reply.disk_blocks, 0U);
}

TEST_F(HostsPortTest, OfBlocksThatStandAloneFindsTheLastThatAllHave) {
  hosts[0].kept = {true, false, true, true, false, true};
  hosts[1].kept = {true, true, false, true, true, false};
  hosts[2].kept = {true, false, true, false, true, true};
  const auto sequence = client->open_sequence();
  EXPECT_EQ(client->lookup_last(sequence, all).matched_blocks, 1U);
  for (const Host& host : hosts) EXPECT_EQ(host.asked.back().keys.size(), 1U) << "the sequence is that block at all";
  hosts[1].kept[0] = false;
  EXPECT_EQ(client->lookup_last(client->open_sequence(), all).matched_blocks, 0U);
}

TEST_F(HostsPortTest, OneThatDoesNotAnswerOrKnowMeansAMiss) {
  for (Host& host : hosts) host.kept.assign(8, true);
  hosts[1].deaf = true;
  EXPECT_EQ(found(), 0U);
  hosts[1].deaf = false;
  hosts[2].reason = Reason::kUnknownSequence;
  const auto sequence = client->open_sequence();
  EXPECT_EQ(client->lookup(sequence, 0, all).matched_blocks, 0U);
  EXPECT_EQ(client->known_hashes(sequence), 0U) << "the others are told the keys once more";
  hosts[2].reason = Reason::kNone;
  EXPECT_EQ(found(), 8U);
}

TEST_F(HostsPortTest, AJobHasEndedWhenAllPartsHave) {
  const JobId job = save();
  ASSERT_NE(job, 0U);
  hosts[0].ended = {{job, proto::JobStatus::kDone, Reason::kNone, 8}};
  hosts[2].ended = {{job, proto::JobStatus::kDone, Reason::kPoolFull, 7}};
  EXPECT_TRUE(client->take_ended_jobs().empty());
  hosts[0].ended = hosts[2].ended = {{job, proto::JobStatus::kDone, Reason::kNone, 8}};  // said twice
  EXPECT_TRUE(client->take_ended_jobs().empty());
  hosts[1].ended = {{job, proto::JobStatus::kDone, Reason::kNone, 6}};
  auto result = ended();
  EXPECT_EQ(result.status, proto::JobStatus::kDone);
  EXPECT_EQ(result.reason, Reason::kPoolFull);
  EXPECT_EQ(result.good_blocks, 6U);

  const JobId failing = client->load(client->open_sequence(), 0, blocks);
  for (Host& host : hosts) host.ended = {{failing, proto::JobStatus::kDone, Reason::kNone, 8}};
  hosts[1].ended = {{failing, proto::JobStatus::kFailed, Reason::kRankFailed, 2}};
  EXPECT_TRUE(client->wait_ended_jobs(0));
  result = ended();
  EXPECT_EQ(result.status, proto::JobStatus::kFailed);
  EXPECT_EQ(result.reason, Reason::kRankFailed);
  EXPECT_EQ(result.good_blocks, 2U);
  EXPECT_FALSE(client->wait_ended_jobs(kSecond)) << "nothing runs";
}

TEST_F(HostsPortTest, WhenOneGoesTheOthersForgetToo) {
  ASSERT_NE(save(), 0U);
  const auto before = client->generation();
  hosts[1].generation = 0;
  EXPECT_EQ(client->generation(), 0U);
  EXPECT_EQ(hosts[0].hang_ups, 1);
  EXPECT_EQ(hosts[2].hang_ups, 1);
  EXPECT_EQ(found(), 0U);
  EXPECT_EQ(save(), 0U);
  hosts[1].generation = 2;
  for (Host& host : hosts) host.kept.assign(8, true);
  EXPECT_GT(client->generation(), before);
  EXPECT_EQ(found(), 8U);
  EXPECT_EQ(hosts[0].hang_ups, 1) << "once";
  hosts[2].ended = {{1, proto::JobStatus::kDone, Reason::kNone, 8}};  // of before
  EXPECT_TRUE(client->take_ended_jobs().empty());
}

TEST_F(HostsPortTest, WhatNotAllCouldBeToldIsTakenBack) {
  hosts[2].full = true;
  EXPECT_EQ(save(), 0U);
  EXPECT_EQ(hosts[0].count<proto::CancelRequest>(), 1U);
  EXPECT_EQ(hosts[1].count<proto::CancelRequest>(), 1U);
  hosts[2].full = false;
  client->reset();
  for (const Host& host : hosts) EXPECT_EQ(host.count<proto::ResetRequest>(), 1U);
  const JobId job = save();
  hosts[1].full = true;
  client->cancel(job);
  for (const Host& host : hosts) EXPECT_EQ(host.hang_ups, 1) << "or one of them would go on";
}

TEST_F(HostsPortTest, RefusesTransfersThatNobodyArms) {
  EXPECT_EQ(client->load(client->open_sequence(), 0, blocks, Client::Start::kAtOnce), 0U);
  for (const Host& host : hosts) EXPECT_EQ(host.count<proto::TransferRequest>(), 0U);
}

}  // namespace
}  // namespace flexkv::client
