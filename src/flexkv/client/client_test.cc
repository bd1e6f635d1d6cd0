#include "flexkv/client/client.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace flexkv::client {
namespace {

// A node's end of the line, by script.
struct Line {
  std::uint64_t generation = 1;
  bool full = false;  // posts are refused
  int hang_ups = 0;
  proto::LookupReply reply;
  Nanos reuse_time = 0;
  std::vector<proto::FromClient> posted;
  std::vector<proto::LookupRequest> lookups;

  template <typename T>
  std::size_t count() const {
    return static_cast<std::size_t>(
        std::count_if(posted.begin(), posted.end(), [](const auto& m) { return std::holds_alternative<T>(m); }));
  }
};

class ScriptedPort final : public NodePort {
 public:
  explicit ScriptedPort(Line& line) : line_(line) {}
  std::uint64_t generation() override { return line_.generation; }
  const std::array<std::uint8_t, 32>& key_secret() override { return secret_; }
  proto::LookupReply lookup(proto::LookupRequest request) override {
    line_.lookups.push_back(request);
    return line_.reply;
  }
  bool post(const proto::FromClient& message) override {
    if (line_.generation == 0 || line_.full) return false;
    line_.posted.push_back(message);
    return true;
  }
  void hang_up() override { ++line_.hang_ups; }
  std::vector<proto::JobResult> take_ended_jobs() override { return {}; }
  bool wait_ended_jobs(Nanos) override { return false; }
  bool served(Nanos) override { return line_.generation != 0; }
  Nanos reuse_time() const override { return line_.reuse_time; }

 private:
  Line& line_;
  std::array<std::uint8_t, 32> secret_{};
};

class ClientTest : public ::testing::Test {
 protected:
  ClientTest() : client(std::make_unique<ScriptedPort>(line), hello()) {
    for (int i = 0; i < 8; ++i) texts.push_back("block " + std::to_string(i));
    for (const auto& text : texts) all.push_back(std::as_bytes(std::span(text)));
  }
  static proto::ClientHello hello() {
    proto::ClientHello hello;
    hello.engine_id = "e";
    return hello;
  }
  Client::Hashes hashes(std::size_t first, std::size_t end) const {
    return Client::Hashes(all).subspan(first, end - first);
  }

  Line line;
  Client client;
  std::vector<std::string> texts;
  std::vector<std::span<const std::byte>> all;
  const std::vector<std::uint32_t> blocks{3, 4};
};

TEST_F(ClientTest, SendsEachHashOnce) {
  const auto sequence = client.open_sequence();
  line.reply.matched_blocks = 2;
  EXPECT_EQ(client.lookup(sequence, 0, hashes(0, 4)).matched_blocks, 2U);
  EXPECT_EQ(client.known_hashes(sequence), 4U);
  (void)client.lookup(sequence, 4, hashes(4, 6));
  (void)client.lookup(sequence, 0, hashes(0, 6));  // all of them again: nothing new
  ASSERT_EQ(line.lookups.size(), 3U);
  EXPECT_EQ(line.lookups[0].keys.size(), 4U);
  EXPECT_EQ(line.lookups[1].base, 4U);
  EXPECT_EQ(line.lookups[1].keys.size(), 2U);
  EXPECT_TRUE(line.lookups[2].keys.empty());
  EXPECT_NE(client.save(sequence, 6, hashes(6, 8), 6, blocks), 0U);
  EXPECT_EQ(client.known_hashes(sequence), 8U);
}

TEST_F(ClientTest, ReusesAnAnswerForAShortWhileUntilAReset) {
  line.reuse_time = 3600 * kSecond;
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 2));
  (void)client.lookup(sequence, 2, {});
  EXPECT_EQ(line.lookups.size(), 1U);
  (void)client.lookup(sequence, 2, {}, 1);  // of another question
  (void)client.lookup(sequence, 2, {}, 1);
  ASSERT_EQ(line.lookups.size(), 2U);
  EXPECT_EQ(line.lookups[1].engine_blocks, 1U);
  client.reset();
  (void)client.lookup(sequence, 0, hashes(0, 2), 1);
  EXPECT_EQ(line.lookups.size(), 3U);
}

// Which block the sequence is must be the one that the caller was told.
TEST_F(ClientTest, AnAnswerAboutBlocksThatStandAloneIsReusedOnlyForTheSameBlocks) {
  line.reuse_time = 3600 * kSecond;
  const auto sequence = client.open_sequence();
  line.reply.matched_blocks = 3;
  EXPECT_EQ(client.lookup_last(sequence, hashes(0, 4)).matched_blocks, 3U);
  EXPECT_EQ(client.lookup_last(sequence, hashes(0, 4)).matched_blocks, 3U);
  ASSERT_EQ(line.lookups.size(), 1U);
  EXPECT_TRUE(line.lookups[0].alone);
  EXPECT_EQ(line.lookups[0].keys.size(), 4U);
  (void)client.load(sequence, 0, {blocks.data(), 1});
  EXPECT_EQ(std::get<proto::TransferRequest>(line.posted.back()).base, 1U) << "the node knows the block";

  line.reply = {0, 0, Reason::kNoNode, 0, 0};  // the answer was late: the node may have changed the sequence
  EXPECT_EQ(client.lookup_last(sequence, hashes(1, 5)).matched_blocks, 0U);
  (void)client.load(sequence, 0, {blocks.data(), 1});
  EXPECT_EQ(std::get<proto::TransferRequest>(line.posted.back()).base, 0U);
  line.reply = {0, 2, Reason::kNone, 0, 0};
  EXPECT_EQ(client.lookup_last(sequence, hashes(0, 4)).matched_blocks, 2U);
  EXPECT_EQ(client.lookup_last(sequence, hashes(1, 5)).matched_blocks, 2U);
  EXPECT_EQ(line.lookups.size(), 4U);
}

TEST_F(ClientTest, SendsKeysAgainThatTheNodeDidNotTake) {
  const auto sequence = client.open_sequence();
  for (const Reason reason : {Reason::kNoNode, Reason::kNotReady, Reason::kTooManySequences}) {
    line.reply.reason = reason;
    (void)client.lookup(sequence, 0, hashes(0, 4));
    EXPECT_EQ(client.known_hashes(sequence), 0U);
  }
}

TEST_F(ClientTest, NumbersJobsFromWhereItIsTold) {
  Client other(std::make_unique<ScriptedPort>(line), hello(), 1000);
  const auto sequence = other.open_sequence();
  EXPECT_EQ(other.save(sequence, 0, hashes(0, 2), 0, blocks), 1000U);
  EXPECT_EQ(other.load(sequence, 0, blocks), 1001U);
  EXPECT_NE(random_first_job(), 0U);
  EXPECT_NE(random_first_job(), random_first_job());
}

TEST_F(ClientTest, StartsAfreshOnAnotherConnection) {
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 4));
  line.generation = 2;
  EXPECT_EQ(client.known_hashes(sequence), 0U);
  // The caller left out what it believed to be known: not this time.
  EXPECT_EQ(client.lookup(sequence, 4, hashes(4, 6)).reason, Reason::kNoNode);
  EXPECT_EQ(client.save(sequence, 4, hashes(4, 6), 4, blocks), 0U);
  (void)client.lookup(sequence, 0, hashes(0, 6));
  EXPECT_EQ(line.lookups.back().base, 0U);
}

TEST_F(ClientTest, WithoutANodeNothingIsFoundOrSavedAndLoadsGetAnId) {
  line.generation = 0;
  const auto sequence = client.open_sequence();
  EXPECT_FALSE(client.ready());
  EXPECT_EQ(client.lookup(sequence, 0, hashes(0, 4)).reason, Reason::kNoNode);
  EXPECT_EQ(client.save(sequence, 0, hashes(0, 4), 0, blocks), 0U);
  EXPECT_NE(client.load(sequence, 0, blocks), 0U);
  EXPECT_TRUE(line.posted.empty());
}

TEST_F(ClientTest, WhatStartsAtOnceSaysSoAndHasNoIdWithoutANode) {
  using Start = Client::Start;
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 4));
  EXPECT_NE(client.save(sequence, 0, hashes(0, 4), 0, blocks, Start::kAtOnce), 0U);
  EXPECT_TRUE(std::get<proto::TransferRequest>(line.posted.back()).armed);
  EXPECT_NE(client.load(sequence, 0, blocks, Start::kAtOnce), 0U);
  EXPECT_TRUE(std::get<proto::TransferRequest>(line.posted.back()).armed);
  EXPECT_NE(client.load(sequence, 0, blocks), 0U);
  EXPECT_FALSE(std::get<proto::TransferRequest>(line.posted.back()).armed);
  line.full = true;  // nobody would ever report on it
  EXPECT_EQ(client.load(sequence, 0, blocks, Start::kAtOnce), 0U);
  line.generation = 0;
  EXPECT_EQ(client.load(sequence, 0, blocks, Start::kAtOnce), 0U);
}

TEST_F(ClientTest, ClosesAtTheNodeWhateverHasHappenedSince) {
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 4));
  line.generation = 2;  // the node did not know another sequence; it may well know this one
  client.close_sequence(sequence);
  EXPECT_EQ(line.count<proto::CloseSequence>(), 1U);
}

TEST_F(ClientTest, ClosesLaterIfTheQueueIsFull) {
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 4));
  line.full = true;
  client.close_sequence(sequence);
  EXPECT_EQ(line.count<proto::CloseSequence>(), 0U);
  line.full = false;
  (void)client.take_ended_jobs();
  EXPECT_EQ(line.count<proto::CloseSequence>(), 1U);
  (void)client.take_ended_jobs();
  EXPECT_EQ(line.count<proto::CloseSequence>(), 1U);
}

TEST_F(ClientTest, AsksForNothingWhileAResetIsOwed) {
  const auto sequence = client.open_sequence();
  line.full = true;
  client.reset();
  EXPECT_EQ(client.lookup(sequence, 0, hashes(0, 4)).reason, Reason::kNoNode);
  EXPECT_EQ(client.save(sequence, 0, hashes(0, 4), 0, blocks), 0U);
  EXPECT_TRUE(line.lookups.empty());
  line.full = false;
  EXPECT_EQ(client.lookup(sequence, 0, hashes(0, 4)).reason, Reason::kNone);
  EXPECT_EQ(line.count<proto::ResetRequest>(), 1U);
}

TEST_F(ClientTest, AResetWithoutANodeIsMadeUpForOnTheNextConnection) {
  line.generation = 0;
  client.reset();
  line.generation = 1;
  (void)client.lookup(client.open_sequence(), 0, hashes(0, 4));
  EXPECT_EQ(line.count<proto::ResetRequest>(), 1U);
}

TEST_F(ClientTest, RepeatsAResetThatMayHaveBeenLostWithItsConnection) {
  client.reset();
  line.generation = 2;
  line.reply.reason = Reason::kNoNode;  // no answer
  (void)client.lookup(client.open_sequence(), 0, hashes(0, 4));
  EXPECT_EQ(line.count<proto::ResetRequest>(), 2U);
  line.reply.reason = Reason::kNone;
  (void)client.lookup(client.open_sequence(), 0, hashes(0, 4));  // an answer: the reset was read before
  line.generation = 3;
  (void)client.lookup(client.open_sequence(), 0, hashes(0, 4));
  EXPECT_EQ(line.count<proto::ResetRequest>(), 2U);
}

TEST_F(ClientTest, AResetBeginsAnEpochWhoseKeysNobodyElseHas) {
  const auto key_of = [&](Client& of, std::uint64_t generation) {
    line.generation = generation;
    const auto sequence = of.open_sequence();
    (void)of.lookup(sequence, 0, hashes(0, 1));
    of.close_sequence(sequence);
    return line.lookups.back().keys.at(0);
  };
  Client other(std::make_unique<ScriptedPort>(line), hello(), 1000);
  const auto before = key_of(client, 1);
  EXPECT_EQ(key_of(other, 1), before);
  client.reset();
  const auto after = key_of(client, 1);
  EXPECT_NE(after, before);
  EXPECT_EQ(key_of(client, 2), after);  // over another connection, too
  EXPECT_EQ(key_of(other, 2), before);
  other.reset();
  EXPECT_NE(key_of(other, 2), after);  // its weights need not be the same
  client.reset();
  EXPECT_NE(key_of(client, 2), after);
}

TEST_F(ClientTest, AnOpenSequenceGoesOnAfterAResetUnderAnotherName) {
  const auto sequence = client.open_sequence();
  (void)client.lookup(sequence, 0, hashes(0, 4));
  client.reset();
  EXPECT_EQ(client.known_hashes(sequence), 0U);
  (void)client.lookup(sequence, 0, hashes(0, 4));
  ASSERT_EQ(line.lookups.size(), 2U);
  EXPECT_EQ(line.lookups[1].keys.size(), 4U);
  EXPECT_NE(line.lookups[1].sequence, line.lookups[0].sequence);
  client.close_sequence(sequence);
  EXPECT_EQ(line.count<proto::CloseSequence>(), 2U);  // both
}

// Whoever cancels goes on as if it had been heard.
TEST_F(ClientTest, ACancelThatCannotBeSaidEndsTheConnection) {
  client.cancel(7);
  EXPECT_EQ(line.count<proto::CancelRequest>(), 1U);
  EXPECT_EQ(line.hang_ups, 0);
  line.full = true;
  client.cancel(8);
  EXPECT_EQ(line.hang_ups, 1);
}

}  // namespace
}  // namespace flexkv::client
