#include "flexkv/node/node_fixture.h"

namespace flexkv::node {
namespace {

TEST_F(NodeTest, ServesOnceClientAndAllRanksAreThereInAnyOrder) {
  start(8, 2);
  const auto a1 = node->attach_agent(agent_hello("e", 1, 2)).value();
  const auto client = node->attach_client(client_hello("e", 2)).value();
  EXPECT_FALSE(node->ready(client));
  EXPECT_EQ(lookup(client, 1, keys_of(1, 2)).reason, Reason::kNotReady);
  EXPECT_EQ(load(client, 1, 1, keys_of(1, 2)), Reason::kNotReady);
  EXPECT_EQ(sent<proto::CancelCommand>(a1, 1).size(), 1U);  // whoever waits for it hears that it is off
  EXPECT_EQ(failure(1), Reason::kNotReady);
  const auto a0 = node->attach_agent(agent_hello("e", 0, 2)).value();
  EXPECT_TRUE(node->ready(client));
  node->detach_agent(a0, now);
  EXPECT_FALSE(node->ready(client));
  node->detach_client(client);
  EXPECT_EQ(node->engines().size(), 1U);
  node->detach_agent(a1, now);
  EXPECT_TRUE(node->engines().empty());
}

// What is told of a job does not grow with its blocks, as far as these lie in a row on both sides.
TEST_F(NodeTest, BlocksInARowTravelAsOneRun) {
  start(64);  // ranges of 4 slots
  const auto handle = engine("a");
  const Keys keys = keys_of(1, 10);
  keep(handle, 1, 1, keys);
  const auto saved = sent<proto::CopyCommand>(agents[0], 1)[0];
  ASSERT_EQ(saved.runs.size(), 3U);
  EXPECT_EQ(saved.runs[0].count, 4U);
  EXPECT_EQ(saved.runs[2].count, 2U);
  const auto places = saved.blocks();

  proto::TransferRequest request{false, true, 1, 2, 0, keys, 1, {7, 8, 9, 20, 21, 22, 23, 24, 24}};
  ASSERT_EQ(node->load(handle, request, now), Reason::kNone);
  const auto loaded = sent<proto::CopyCommand>(agents[0], 2)[0];
  EXPECT_EQ(loaded.runs.size(), 4U);  // 1-3, 4-7, 8, and 9 into the same device block
  const auto blocks = loaded.blocks();
  ASSERT_EQ(blocks.size(), 9U);
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    EXPECT_EQ(blocks[i].device_block, request.device_blocks[i]);
    EXPECT_EQ(blocks[i].host_offset, places[i + 1].host_offset);
  }
}

TEST_F(NodeTest, RefusesWhatCannotBe) {
  start(8);
  EXPECT_FALSE(node->attach_client(client_hello("")).ok());
  EXPECT_FALSE(node->attach_client(client_hello("e", 0)).ok());
  EXPECT_FALSE(node->attach_agent(agent_hello("e", 2, 2)).ok());
  auto huge = agent_hello("e");
  huge.shard_bytes = 1ULL << 40;
  EXPECT_FALSE(node->attach_agent(huge).ok());
  EXPECT_TRUE(node->engines().empty());  // refused ones leave nothing behind
  engine("e");
  EXPECT_FALSE(node->attach_client(client_hello("e")).ok());
  EXPECT_FALSE(node->attach_agent(agent_hello("e")).ok());
  EXPECT_FALSE(node->attach_agent(agent_hello("e", 0, 3)).ok());
}

TEST_F(NodeTest, SavesThenFindsThenLoads) {
  start(8);
  const auto e = engine("e");
  const auto keys = keys_of(1, 3);
  EXPECT_EQ(lookup(e, 1, keys).reason, Reason::kNeverSeen);
  EXPECT_EQ(save(e, 1, 1, keys), Reason::kNone);
  const auto commands = sent<proto::CopyCommand>(agents[0], 1);
  ASSERT_EQ(commands.size(), 1U);
  EXPECT_EQ(commands[0].blocks().size(), 3U);
  EXPECT_EQ(lookup(e, 2, keys).reason, Reason::kInFlight);
  report(agents[0], 1);
  EXPECT_TRUE(done(1));
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 3U);
  EXPECT_EQ(load(e, 2, 2, keys, 1), Reason::kNone);
  const auto loads = sent<proto::CopyCommand>(agents[0], 2);
  ASSERT_EQ(loads.size(), 1U);
  EXPECT_EQ(loads[0].blocks()[0].host_offset, commands[0].blocks()[1].host_offset);
  report(agents[0], 2);
  report(agents[0], 2);  // repeated: nothing happens
  EXPECT_TRUE(done(2));
  EXPECT_EQ(results.size(), 2U);
  EXPECT_EQ(node->jobs_in_flight(), 0U);
  EXPECT_FALSE(node->next_deadline());
}

TEST_F(NodeTest, OfBlocksThatStandAloneTheLastOneIsFoundAndLoaded) {
  start(8);
  const auto e = engine("e");
  const auto keys = keys_of(1, 5);
  keep(e, 1, 1, {keys[1]});
  keep(e, 2, 2, {keys[3]});
  const auto before = node->stats();
  const auto last = node->lookup_last(e, 3, keys, now);
  EXPECT_EQ(last.matched_blocks, 4U);
  EXPECT_EQ(last.host_blocks, 1U);
  EXPECT_EQ(load(e, 3, 3, {keys[3]}), Reason::kNone);
  const auto commands = sent<proto::CopyCommand>(agents[0], 3);
  ASSERT_EQ(commands.size(), 1U);
  EXPECT_EQ(commands[0].blocks()[0].host_offset, sent<proto::CopyCommand>(agents[0], 2)[0].blocks()[0].host_offset);
  report(agents[0], 3);

  // The same sequence, of fewer of them.
  EXPECT_EQ(node->lookup(e, {0, 3, 0, {keys[0], keys[1], keys[2]}, 0, true}, now).matched_blocks, 2U);
  EXPECT_EQ(load(e, 3, 4, {keys[1]}), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 4)[0].blocks()[0].host_offset,
            sent<proto::CopyCommand>(agents[0], 1)[0].blocks()[0].host_offset);
  report(agents[0], 4);
  EXPECT_EQ(node->stats().lookups, before.lookups + 1) << "of one request";
  EXPECT_EQ(node->stats().blocks_queried, before.blocks_queried + 1);
  EXPECT_EQ(node->stats().blocks_hit, before.blocks_hit + 1);

  const auto none = node->lookup_last(e, 4, {&keys[4], 1}, now);
  EXPECT_EQ(none.matched_blocks, 0U);
  EXPECT_EQ(none.reason, Reason::kNeverSeen);
  EXPECT_EQ(node->lookup_last(e, 5, {}, now).matched_blocks, 0U);
  EXPECT_EQ(lookup(e, 6, keys).matched_blocks, 0U) << "they are no chain";
}

TEST_F(NodeTest, AKeyIsVisibleOnlyWhenEveryRankHasReported) {
  start(8, 2);
  const auto e = engine("e", 2);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  report(agents[1], 1);
  report(agents[1], 1);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 0U);
  report(agents[0], 1);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 2U);
}

TEST_F(NodeTest, OneRankFailingFailsTheSaveOnceTheOtherIsQuiet) {
  start(8, 2);
  const auto e = engine("e", 2);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  report(agents[0], 1, JobStatus::kFailed);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[1], 1).size(), 1U);
  EXPECT_FALSE(result(1));
  EXPECT_EQ(node->blocks_in_use(), 2U);  // the other may still write
  report(agents[1], 1);
  EXPECT_EQ(failure(1), Reason::kRankFailed);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 0U);
}

// The engine has overwritten what they read, so nothing of it is kept, though the ranks say that all went well.
TEST_F(NodeTest, KeepsNothingOfACanceledSave) {
  start(8, 2);
  const auto e = engine("e", 2);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 4), 2), Reason::kNone);
  report(agents[0], 1);
  report(agents[0], 2);
  report(agents[1], 2);  // complete, but for its beginning
  node->cancel(e, 1);
  EXPECT_EQ(node->blocks_in_use(), 4U);
  report(agents[1], 1);
  EXPECT_EQ(failure(1), Reason::kCanceled);
  EXPECT_EQ(failure(2), Reason::kParentMissing);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 0U);
  // One that has ended is kept.
  ASSERT_EQ(save(e, 1, 3, keys_of(1, 2)), Reason::kNone);
  report(agents[0], 3);
  report(agents[1], 3);
  node->cancel(e, 3);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 2U);
}

// A client on another machine: its cancel may come after the ranks' reports, its word to keep the save never does.
TEST_F(NodeTest, KeepsASaveThatIsToBeCommittedOnlyThen) {
  start(8, 2);
  const auto e = engine("e", 2);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2), 0, true), Reason::kNone);
  report(agents[0], 1);
  node->commit(e, 1, now);  // it was told nothing yet: a confused client
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 4), 2, true), Reason::kNone);
  report(agents[0], 2);
  report(agents[1], 2);
  EXPECT_FALSE(result(2)) << "its beginning may still be canceled";
  report(agents[1], 1);
  EXPECT_TRUE(done(1));
  EXPECT_EQ(lookup(e, 2, keys_of(1, 4)).matched_blocks, 0U);
  node->commit(e, 1, now);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 4)).matched_blocks, 2U);
  EXPECT_TRUE(done(2));
  now += 3600 * kSecond;  // an engine with nothing to do
  node->on_time(now);
  EXPECT_EQ(node->blocks_in_use(), 4U);
  node->cancel(e, 2);
  EXPECT_EQ(node->blocks_in_use(), 2U);
  node->commit(e, 2, now);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 4)).matched_blocks, 2U);
  EXPECT_EQ(results.size(), 2U) << "each is told once";
}

TEST_F(NodeTest, WhatNobodyCanCommitAnyMoreIsDropped) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2), 0, true), Reason::kNone);
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 4), 2, true), Reason::kNone);
  report(agents[0], 2);
  report(agents[0], 1);
  EXPECT_EQ(node->blocks_in_use(), 4U);
  node->detach_client(e);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  node->check_invariants();
  const auto again = node->attach_client(client_hello("e")).value();
  node->commit(again, 1, now);
  EXPECT_EQ(lookup(again, 1, keys_of(1, 4)).matched_blocks, 0U);
  // Nor does a reset leave anything that could be committed.
  ASSERT_EQ(save(again, 2, 3, keys_of(1, 2), 0, true), Reason::kNone);
  report(agents[0], 3);
  node->reset(again, now);
  node->commit(again, 3, now);
  EXPECT_EQ(lookup(again, 3, keys_of(1, 2)).matched_blocks, 0U);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

TEST_F(NodeTest, WhatACanceledSaveWasCarryingIsSavedAnew) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  node->cancel(e, 1);  // its rank still copies
  ASSERT_EQ(save(e, 2, 2, keys_of(1, 2)), Reason::kNone);
  EXPECT_FALSE(done(2));
  ASSERT_EQ(sent<proto::CopyCommand>(agents[0], 2).size(), 1U);
  ASSERT_EQ(save(e, 3, 3, keys_of(1, 2)), Reason::kNone);  // carried by the second, also when the first has ended
  EXPECT_TRUE(done(3));
  report(agents[0], 1, JobStatus::kCanceled);
  ASSERT_EQ(save(e, 3, 4, keys_of(1, 3)), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 4)[0].blocks().size(), 1U);
  report(agents[0], 2);
  report(agents[0], 4);
  EXPECT_EQ(lookup(e, 4, keys_of(1, 3)).matched_blocks, 3U);
}

TEST_F(NodeTest, WhatASaveFromBeforeAResetIsCarryingIsSavedAnew) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  node->reset(e, now);
  ASSERT_EQ(save(e, 2, 2, keys_of(1, 2)), Reason::kNone);
  report(agents[0], 1);
  report(agents[0], 2);
  EXPECT_EQ(lookup(e, 3, keys_of(1, 2)).matched_blocks, 2U);
}

TEST_F(NodeTest, KeepsNothingOfTheSavesOfAClientThatIsGone) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  node->detach_client(e);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 1).size(), 1U);
  report(agents[0], 1);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

TEST_F(NodeTest, ARankThatCannotBeToldFailsTheJob) {
  start(8, 2);
  const auto e = engine("e", 2);
  deaf = agents[1];
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 1).size(), 1U);
  EXPECT_FALSE(result(1));
  report(agents[0], 1, JobStatus::kCanceled);
  EXPECT_EQ(failure(1), Reason::kQueueFull);
}

TEST_F(NodeTest, SavesNoBlockTwice) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  EXPECT_EQ(save(e, 2, 2, keys_of(1, 2)), Reason::kNone);  // carried by job 1
  EXPECT_TRUE(done(2));
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 2).size(), 1U);  // nobody waits for it
  report(agents[0], 1);
  EXPECT_EQ(save(e, 3, 3, keys_of(1, 2)), Reason::kNone);  // kept
  EXPECT_TRUE(done(3));
  EXPECT_EQ(node->blocks_in_use(), 2U);
}

TEST_F(NodeTest, AContinuationWaitsForTheSaveItFollows) {
  start(8, 1);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2, 2)), Reason::kNone);
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 4, 2)), Reason::kNone);  // another request, same beginning
  ASSERT_EQ(save(e, 3, 3, keys_of(3, 3, 2)), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 2)[0].blocks().size(), 2U);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 2)[0].blocks()[0].device_block, 102U);
  report(agents[0], 2);
  report(agents[0], 3);
  EXPECT_FALSE(result(2));
  EXPECT_EQ(lookup(e, 9, keys_of(2, 4, 2)).matched_blocks, 0U);
  report(agents[0], 1);
  EXPECT_TRUE(done(1) && done(2) && done(3));
  EXPECT_EQ(lookup(e, 9, keys_of(2, 4, 2)).matched_blocks, 4U);
  EXPECT_EQ(lookup(e, 10, keys_of(3, 3, 2)).matched_blocks, 3U);
}

TEST_F(NodeTest, AContinuationOfWhatFailedIsDropped) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 4), 2), Reason::kNone);
  ASSERT_EQ(save(e, 1, 3, keys_of(1, 5), 4), Reason::kNone);
  report(agents[0], 2);
  report(agents[0], 1, JobStatus::kFailed);
  EXPECT_EQ(failure(1), Reason::kRankFailed);
  EXPECT_EQ(failure(2), Reason::kParentMissing);
  EXPECT_FALSE(result(3));
  report(agents[0], 3);
  EXPECT_EQ(failure(3), Reason::kParentMissing);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

TEST_F(NodeTest, AContinuationOfNothingIsRefused) {
  start(8);
  const auto e = engine("e");
  EXPECT_EQ(save(e, 1, 1, keys_of(1, 4), 2), Reason::kParentMissing);
  EXPECT_EQ(failure(1), Reason::kParentMissing);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 1).size(), 1U);
}

TEST_F(NodeTest, CancelingAFilledSaveThatWaitsForAnotherLeavesTheOtherAlone) {
  start(8);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  ASSERT_EQ(save(e, 1, 2, keys_of(1, 4), 2), Reason::kNone);
  report(agents[0], 2);
  node->cancel(e, 2);
  report(agents[0], 1);
  EXPECT_TRUE(done(1));
  EXPECT_EQ(failure(2), Reason::kCanceled);
  EXPECT_EQ(node->blocks_in_use(), 2U);
}

TEST_F(NodeTest, GrantsWhatThereIsRoomFor) {
  start(4);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 6)), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 1)[0].blocks().size(), 4U);
  EXPECT_EQ(save(e, 2, 2, keys_of(2, 1)), Reason::kPoolFull);  // all of it is being written
  EXPECT_EQ(failure(2), Reason::kPoolFull);
  report(agents[0], 1);
  ASSERT_TRUE(done(1));
  EXPECT_EQ(result(1)->reason, Reason::kPoolFull);  // for the rest
  EXPECT_EQ(lookup(e, 3, keys_of(1, 6)).matched_blocks, 4U);
}

TEST_F(NodeTest, MakesRoomFromTheLeavesAndSaysSo) {
  start(4);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 4));
  node->close_sequence(e, 1);
  keep(e, 2, 2, keys_of(2, 2));
  const auto found = lookup(e, 3, keys_of(1, 4));
  EXPECT_EQ(found.matched_blocks, 2U);
  EXPECT_EQ(found.reason, Reason::kEvicted);
  EXPECT_EQ(node->stats().blocks_evicted, 2U);
}

TEST_F(NodeTest, WhatWasFoundIsSafeForTheLeaseAndWhatIsLoadingLonger) {
  start(4);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 4));
  node->close_sequence(e, 1);
  ASSERT_EQ(lookup(e, 2, keys_of(1, 4)).matched_blocks, 4U);
  EXPECT_EQ(save(e, 3, 2, keys_of(2, 1)), Reason::kPoolFull);
  ASSERT_EQ(load(e, 2, 3, keys_of(1, 4)), Reason::kNone);
  now += 10 * kSecond;
  EXPECT_EQ(save(e, 3, 4, keys_of(2, 1)), Reason::kPoolFull);  // the load reads all of it
  report(agents[0], 3);
  now += 10 * kSecond;
  EXPECT_EQ(save(e, 3, 5, keys_of(2, 1)), Reason::kNone);
  ASSERT_EQ(load(e, 2, 6, keys_of(1, 4)), Reason::kNone);  // its last block is gone
  report(agents[0], 6);
  EXPECT_EQ(failure(6), Reason::kGone);
  EXPECT_EQ(result(6)->good_blocks, 3U);
  EXPECT_EQ(save(e, 4, 7, keys_of(3, 3)), Reason::kNone);
  EXPECT_EQ(load(e, 2, 8, keys_of(1, 4)), Reason::kGone);  // nothing of it is left
  EXPECT_EQ(failure(8), Reason::kGone);
}

TEST_F(NodeTest, OfALoadThatFailsItsClientIsToldWhatAllRanksHave) {
  start(8, 2);
  const auto e = engine("e", 2);
  keep(e, 1, 1, keys_of(1, 4));
  ASSERT_EQ(load(e, 1, 2, keys_of(1, 4)), Reason::kNone);
  node->cancel(e, 2);
  report(agents[0], 2, JobStatus::kCanceled, 3);
  report(agents[1], 2, JobStatus::kCanceled, 1);
  EXPECT_EQ(failure(2), Reason::kCanceled);
  EXPECT_EQ(result(2)->good_blocks, 1U);
  EXPECT_EQ(node->stats().blocks_of_failed_loads, 1U);

  ASSERT_EQ(load(e, 1, 3, keys_of(1, 4)), Reason::kNone);
  node->cancel(e, 3);  // too late
  for (const AgentHandle agent : agents) report(agent, 3, JobStatus::kCanceled, 4);
  EXPECT_TRUE(done(3));

  ASSERT_EQ(load(e, 1, 4, keys_of(1, 4)), Reason::kNone);
  report(agents[0], 4, JobStatus::kDone, 2);  // but all was there: it is confused
  report(agents[1], 4);
  EXPECT_EQ(failure(4), Reason::kRankFailed);
  EXPECT_EQ(result(4)->good_blocks, 2U);

  ASSERT_EQ(load(e, 1, 5, keys_of(1, 4)), Reason::kNone);
  report(agents[0], 5);
  node->detach_agent(agents[1], now);
  EXPECT_EQ(failure(5), Reason::kRankFailed);
  EXPECT_EQ(result(5)->good_blocks, 0U);
}

TEST_F(NodeTest, DeadlinesCancelButSlotsStayUntilTheRankIsQuiet) {
  start(4);
  const auto e = engine("e");
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  const Nanos deadline = node->next_deadline().value();
  EXPECT_EQ(deadline, now + 30 * kSecond);
  node->on_time(deadline - 1);
  EXPECT_TRUE(sent<proto::CancelCommand>(agents[0], 1).empty());
  node->on_time(deadline);
  EXPECT_EQ(sent<proto::CancelCommand>(agents[0], 1).size(), 1U);
  EXPECT_FALSE(node->next_deadline());
  EXPECT_EQ(node->blocks_in_use(), 2U);
  report(agents[0], 1);  // it was done after all, but too late to count
  EXPECT_EQ(failure(1), Reason::kDeadline);
  EXPECT_EQ(node->blocks_in_use(), 0U);
}

TEST_F(NodeTest, ARankThatLeavesEndsItsPart) {
  start(8, 2);
  const auto e = engine("e", 2);
  keep(e, 1, 1, keys_of(1, 2));
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 2)), Reason::kNone);
  ASSERT_EQ(load(e, 1, 3, keys_of(1, 2)), Reason::kNone);
  report(agents[0], 2);
  node->detach_agent(agents[1], now);
  EXPECT_EQ(failure(2), Reason::kRankFailed);
  EXPECT_FALSE(result(3));
  report(agents[0], 3);
  EXPECT_EQ(failure(3), Reason::kRankFailed);
  EXPECT_EQ(lookup(e, 1, keys_of(1, 2)).reason, Reason::kNotReady);
  agents[1] = node->attach_agent(agent_hello("e", 1, 2)).value();
  // The sequences are forgotten, the blocks are not.
  EXPECT_EQ(node->lookup(e, 1, 2, {}, now).reason, Reason::kUnknownSequence);
  EXPECT_EQ(lookup(e, 1, keys_of(1, 2)).matched_blocks, 2U);
}

TEST_F(NodeTest, AFollowerOutlivesItsEngineUntilTheSaveItFollowsEnds) {
  start(8);
  const auto a = engine("a");
  const auto b = engine("b");
  ASSERT_EQ(save(a, 1, 1, keys_of(1, 2, 2)), Reason::kNone);
  ASSERT_EQ(save(b, 1, 1, keys_of(2, 3, 2)), Reason::kNone);
  report(agents[1], 1);
  node->detach_client(b);
  node->detach_agent(agents[1], now);
  node->check_invariants();
  EXPECT_EQ(node->jobs_in_flight(), 2U);
  report(agents[0], 1);
  EXPECT_EQ(node->jobs_in_flight(), 0U);
  EXPECT_EQ(lookup(a, 9, keys_of(2, 3, 2)).matched_blocks, 3U);
}

TEST_F(NodeTest, ResetForgetsAndWhatWasBegunBeforePublishesNothing) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 2));
  ASSERT_EQ(load(e, 1, 2, keys_of(1, 2)), Reason::kNone);
  ASSERT_EQ(save(e, 2, 3, keys_of(2, 2)), Reason::kNone);
  node->reset(e, now);
  EXPECT_EQ(lookup(e, 3, keys_of(1, 2)).reason, Reason::kReset);
  EXPECT_EQ(lookup(e, 1, keys_of(1, 2)).matched_blocks, 0U);  // also through an old sequence
  EXPECT_EQ(node->blocks_in_use(), 4U);                       // the load still reads, the save still writes
  report(agents[0], 2);
  EXPECT_TRUE(done(2));
  report(agents[0], 3);
  EXPECT_EQ(failure(3), Reason::kReset);
  EXPECT_EQ(node->blocks_in_use(), 0U);
  keep(e, 4, 4, keys_of(1, 2));
  EXPECT_EQ(lookup(e, 5, keys_of(1, 2)).matched_blocks, 2U);
}

// A request that runs over a reset offers its blocks again, as they were not kept; its beginning is of before.
TEST_F(NodeTest, WhatWasOpenAtAResetSavesNothingAnyMore) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 2));
  node->reset(e, now);
  EXPECT_EQ(save(e, 1, 2, keys_of(1, 2)), Reason::kReset);
  EXPECT_EQ(failure(2), Reason::kReset);
  EXPECT_EQ(lookup(e, 2, keys_of(1, 2)).matched_blocks, 0U);
  node->close_sequence(e, 1);
  keep(e, 1, 3, keys_of(1, 2));
  EXPECT_EQ(lookup(e, 3, keys_of(1, 2)).matched_blocks, 2U);
}

TEST_F(NodeTest, ResetCountsWhileARankIsAway) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 2));
  node->detach_agent(agents[0], now);
  node->reset(e, now);
  node->attach_agent(agent_hello("e")).value();
  EXPECT_EQ(lookup(e, 1, keys_of(1, 2)).reason, Reason::kReset);
}

TEST_F(NodeTest, ResetAllReachesSpacesThatNobodyUsesAndTheirRunningSaves) {
  start(8);
  const auto e = engine("e");
  keep(e, 1, 1, keys_of(1, 2));
  ASSERT_EQ(save(e, 2, 2, keys_of(2, 2)), Reason::kNone);
  node->detach_client(e);
  node->reset_all(now);
  report(agents[0], 2);
  node->attach_client(client_hello("e")).value();
  EXPECT_EQ(lookup(e, 3, keys_of(1, 2)).matched_blocks, 0U);
  EXPECT_EQ(lookup(e, 4, keys_of(2, 2)).matched_blocks, 0U);
  node->detach_client(e);
  node->reset_all(now);
  EXPECT_TRUE(node->spaces().empty());
}

TEST_F(NodeTest, EnginesOfOneModelShareAndOthersDoNot) {
  start(12);
  const auto a = engine("a");
  keep(a, 1, 1, keys_of(1, 2));
  const auto b = engine("b");
  const auto c = engine("c", 1, 2);
  EXPECT_EQ(lookup(b, 1, keys_of(1, 2)).matched_blocks, 2U);
  EXPECT_EQ(lookup(c, 1, keys_of(1, 2)).matched_blocks, 0U);
  EXPECT_EQ(node->spaces().size(), 2U);
  node->reset(c, now);
  EXPECT_EQ(lookup(b, 2, keys_of(1, 2)).matched_blocks, 2U);
}

TEST_F(NodeTest, ASpaceOutlivesItsEnginesUntilAnotherNeedsTheRoom) {
  start(4);
  const auto a = engine("a");
  keep(a, 1, 1, keys_of(1, 4));
  node->detach_client(a);
  node->detach_agent(agents[0], now);
  agents.clear();
  const auto again = engine("a2");
  EXPECT_EQ(lookup(again, 1, keys_of(1, 4)).matched_blocks, 4U);
  node->detach_client(again);
  node->detach_agent(agents[0], now);
  agents.clear();
  const auto b = engine("b", 1, 2);
  keep(b, 1, 2, keys_of(5, 3));
  EXPECT_EQ(lookup(b, 2, keys_of(5, 3)).matched_blocks, 3U);
  EXPECT_EQ(node->spaces().size(), 1U);
}

TEST_F(NodeTest, BoundsSequencesAndJobs) {
  NodeOptions options;
  options.pool_bytes = 8 * kPage;
  options.sequence_keys_max = 5;
  options.jobs_max = 1;
  start(options);
  const auto e = engine("e");
  EXPECT_EQ(lookup(e, 1, keys_of(1, 4)).reason, Reason::kNeverSeen);
  EXPECT_EQ(lookup(e, 2, keys_of(2, 2)).reason, Reason::kTooManySequences);
  EXPECT_EQ(node->engines()[0].sequences, 1U);
  ASSERT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kNone);
  EXPECT_EQ(save(e, 1, 2, keys_of(1, 4), 2), Reason::kQueueFull);
  EXPECT_EQ(load(e, 1, 3, keys_of(1, 2)), Reason::kQueueFull);
  EXPECT_EQ(save(e, 1, 1, keys_of(1, 2)), Reason::kQueueFull);  // the same job again:
  EXPECT_FALSE(result(1));                                      // the first one goes on
  EXPECT_TRUE(sent<proto::CancelCommand>(agents[0], 1).empty());
  report(agents[0], 1);
  EXPECT_TRUE(done(1));
  node->close_sequence(e, 1);
  EXPECT_EQ(lookup(e, 2, keys_of(2, 2)).reason, Reason::kNeverSeen);
}

TEST_F(NodeTest, ASaveAfterOnesInFlightSkipsThemAllAlsoWhenTheirChainWasBroken) {
  start(16);
  const auto e = engine("e");
  const auto keys = keys_of(1, 8);
  const auto save_to = [&](JobId job, std::size_t end, std::uint32_t first) {
    return save(e, 1, job, Keys(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(end)), first);
  };
  ASSERT_EQ(save_to(1, 2, 0), Reason::kNone);
  ASSERT_EQ(save_to(2, 4, 2), Reason::kNone);
  ASSERT_EQ(save_to(3, 6, 0), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 3)[0].blocks().size(), 2U);
  report(agents[0], 2, JobStatus::kFailed);  // and so 3 has failed too, though its copy still runs
  EXPECT_EQ(failure(2), Reason::kRankFailed);
  ASSERT_EQ(save_to(4, 8, 0), Reason::kNone);
  EXPECT_EQ(sent<proto::CopyCommand>(agents[0], 4)[0].blocks().size(), 6U);  // all but what 1 carries
  for (const JobId job : {JobId{1}, JobId{3}, JobId{4}}) report(agents[0], job);
  EXPECT_EQ(failure(3), Reason::kParentMissing);
  EXPECT_TRUE(done(4));
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, 8U);
}

TEST_F(NodeTest, AChainOfSavesInFlightIsNotWalkedByEachOfThem) {
  // Walking it would cost this test minutes instead of a fraction of a second.
  constexpr std::uint32_t kLength = 50'000;
  start(kLength);
  const auto e = engine("e");
  const auto keys = keys_of(1, kLength);
  const auto began = monotonic_now();
  for (std::uint32_t i = 0; i < kLength; ++i) {
    const bool first = i == 0;
    proto::TransferRequest request{true, false, 1, i + 1, first ? 0 : kLength, first ? keys : Keys{}, i, {i}};
    ASSERT_EQ(node->save(e, request, now), Reason::kNone);
    ASSERT_LT(monotonic_now() - began, 10 * kSecond) << "after " << i << " saves";
  }
}

TEST_F(NodeTest, ALongChainOfSavesEndsAtOnce) {
  constexpr std::uint32_t kLength = 1500;
  start(kLength);
  const auto e = engine("e");
  const auto keys = keys_of(1, kLength);
  for (std::uint32_t i = 0; i < kLength; ++i) {
    const bool first = i == 0;
    proto::TransferRequest request{true, false, 1, i + 1, first ? 0 : kLength, first ? keys : Keys{}, i, {i}};
    ASSERT_EQ(node->save(e, request, now), Reason::kNone);
  }
  for (std::uint32_t i = kLength; i > 0; --i) node->on_report(agents[0], {i, JobStatus::kDone}, now);
  EXPECT_EQ(node->jobs_in_flight(), 0U);
  EXPECT_EQ(lookup(e, 2, keys).matched_blocks, kLength);
}

TEST_F(NodeTest, ARankThatKnowsNotHowManyThereAreTakesTheSchedulersNumber) {
  start(4, 2);
  const auto refused = node->attach_agent(agent_hello("e", 0, 0));
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().message, "rank 0 waits for the scheduler of engine 'e', which says how many ranks it has");
  const auto e = node->attach_client(client_hello("e", 2)).value();
  for (std::uint32_t rank = 0; rank < 2; ++rank) {
    EXPECT_FALSE(node->ready(e));
    agents.push_back(node->attach_agent(agent_hello("e", rank, 0)).value());
  }
  EXPECT_TRUE(node->ready(e));
  EXPECT_FALSE(node->attach_agent(agent_hello("e", 2, 0)).ok());
}

}  // namespace
}  // namespace flexkv::node
