#include "flexkv/agent/rank_jobs.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <set>

namespace flexkv::agent {
namespace {

using device::Direction;

proto::CopyCommand copy(JobId job, Direction direction = Direction::kToDevice, bool armed = false) {
  proto::CopyCommand command{job, direction, armed, 4096, {{1, 1, 0}}};
  if (direction == Direction::kToDevice) {
    command.job_blocks = 1;
    command.spans = {{0, 1}};
  }
  return command;
}

// One of three blocks.
proto::CopyCommand piece_of(JobId job, std::uint32_t number, bool last) {
  proto::CopyCommand command = copy(job);
  command.piece = number;
  command.last = last;
  command.job_blocks = 3;
  command.spans = {{number, 1}};
  return command;
}

// A lane ends its work: all blocks of the piece are copied if it is done, else none.
void end(RankJobs& jobs, const RankJobs::Work& work, JobStatus status = JobStatus::kDone) {
  jobs.finished(work, status, status == JobStatus::kDone ? work.command->block_count() : 0);
}

class RankJobsTest : public ::testing::Test {
 protected:
  RankJobsTest() { jobs.node_found(); }
  void arm_load(JobId job, Nanos deadline = 100) { jobs.arm(job, true, nullptr, deadline); }
  // The only report for the node, then none.
  void expect_report(JobId job, JobStatus status) {
    const auto reports = jobs.take_reports();
    ASSERT_EQ(reports.size(), 1U);
    EXPECT_EQ(reports[0].job, job);
    EXPECT_EQ(reports[0].status, status);
  }
  void expect_load(JobId job, bool ok) {
    const auto loads = jobs.take_loads();
    ASSERT_EQ(loads.size(), 1U);
    EXPECT_EQ(loads[0].job, job);
    EXPECT_EQ(loads[0].ok, ok);
  }
  void expect_silence() {
    EXPECT_TRUE(jobs.take_reports().empty());
    EXPECT_TRUE(jobs.take_loads().empty());
  }
  RankJobs jobs;
};

TEST_F(RankJobsTest, RunsOnceCommandedAndArmedInEitherOrder) {
  jobs.command(copy(1), 100);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  arm_load(1);
  arm_load(2);
  EXPECT_TRUE(jobs.pending(2));
  jobs.command(copy(2), 100);
  EXPECT_FALSE(jobs.next(Direction::kToHost));
  for (const JobId job : {1U, 2U}) {  // oldest first
    const auto work = jobs.next(Direction::kToDevice);
    ASSERT_TRUE(work);
    EXPECT_EQ(work->job, job);
    EXPECT_TRUE(jobs.running(job));
    expect_silence();
    end(jobs, *work);
    EXPECT_FALSE(jobs.pending(job));
    expect_report(job, JobStatus::kDone);
    expect_load(job, true);
  }
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  EXPECT_FALSE(jobs.next_deadline());
}

TEST_F(RankJobsTest, TellsWhomAChangeConcerns) {
  arm_load(1);
  EXPECT_FALSE(jobs.ready(Direction::kToDevice));
  jobs.command(copy(1), 100);
  EXPECT_TRUE(jobs.ready(Direction::kToDevice));
  EXPECT_FALSE(jobs.ready(Direction::kToHost));
  EXPECT_FALSE(jobs.take_ended());
  const auto work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  EXPECT_FALSE(jobs.ready(Direction::kToDevice));
  end(jobs, *work);
  EXPECT_TRUE(jobs.take_ended());
  EXPECT_FALSE(jobs.take_ended());
  arm_load(2);
  jobs.node_lost();
  EXPECT_TRUE(jobs.take_ended());
}

TEST_F(RankJobsTest, ArmedByTheNodeRunsAtOnceAndIsNoBusinessOfTheWorker) {
  jobs.command(copy(1, Direction::kToHost, true), 100);
  const auto work = jobs.next(Direction::kToHost);
  ASSERT_TRUE(work);
  end(jobs, *work);
  expect_report(1, JobStatus::kDone);
  EXPECT_TRUE(jobs.take_loads().empty());
}

TEST_F(RankJobsTest, SaidTwiceCountsOnce) {
  jobs.command(copy(1), 100);
  jobs.command(copy(1), 100);
  arm_load(1);
  arm_load(1);
  const auto work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  end(jobs, *work);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  expect_report(1, JobStatus::kDone);
  expect_load(1, true);
}

TEST_F(RankJobsTest, PiecesAreCopiedAsTheyComeAndTheJobEndsWithTheLast) {
  arm_load(1);
  jobs.command(piece_of(1, 0, false), 100);
  auto work = jobs.next(Direction::kToDevice);
  EXPECT_EQ(work->command->piece, 0U);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  jobs.command(piece_of(1, 1, false), 100);
  jobs.command(piece_of(1, 1, false), 100);       // said twice
  EXPECT_FALSE(jobs.next(Direction::kToDevice));  // one lane at a time
  end(jobs, *work);
  work = jobs.next(Direction::kToDevice);
  EXPECT_EQ(work->command->piece, 1U);
  end(jobs, *work);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  EXPECT_TRUE(jobs.pending(1));
  expect_silence();
  jobs.command(piece_of(1, 2, true), 100);
  work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  end(jobs, *work);
  expect_report(1, JobStatus::kDone);
  expect_load(1, true);
}

TEST_F(RankJobsTest, PiecesOfAJobThatEndedAreNoNewJob) {
  arm_load(1);
  jobs.command(piece_of(1, 0, false), 100);
  jobs.cancel(1);
  expect_report(1, JobStatus::kCanceled);
  expect_load(1, false);
  jobs.command(piece_of(2, 0, false), 100);  // not armed
  jobs.cancel(2);
  expect_report(2, JobStatus::kCanceled);
  jobs.command(piece_of(3, 0, false), 100);
  arm_load(3);
  const auto work = jobs.next(Direction::kToDevice);
  jobs.cancel(3);
  end(jobs, *work);  // of this piece, but another was to come
  expect_report(3, JobStatus::kCanceled);
  expect_load(3, false);
  for (const JobId job : {1U, 2U, 3U}) jobs.command(piece_of(job, 1, true), 100);
  expect_silence();
  EXPECT_EQ(jobs.job_count(), 0U);
}

TEST_F(RankJobsTest, CanceledBeforeBothHalves) {
  jobs.cancel(1);
  expect_silence();
  jobs.command(copy(1), 100);
  expect_report(1, JobStatus::kCanceled);
  arm_load(1);
  expect_load(1, false);
  EXPECT_EQ(jobs.job_count(), 0U);
}

TEST_F(RankJobsTest, CanceledBetweenCommandAndArm) {
  jobs.command(copy(1), 100);
  jobs.cancel(1);
  expect_report(1, JobStatus::kCanceled);
  arm_load(1);
  expect_load(1, false);
  EXPECT_EQ(jobs.job_count(), 0U);
}

TEST_F(RankJobsTest, CanceledBetweenArmAndCommand) {
  arm_load(1);
  jobs.cancel(1);
  expect_load(1, false);
  jobs.command(copy(1), 100);
  expect_report(1, JobStatus::kCanceled);
  EXPECT_EQ(jobs.job_count(), 0U);
}

TEST_F(RankJobsTest, CanceledWhileItWaitsForALane) {
  jobs.command(copy(1), 100);
  arm_load(1);
  jobs.cancel(1);
  expect_report(1, JobStatus::kCanceled);
  expect_load(1, false);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
}

TEST_F(RankJobsTest, CanceledWhileRunningEndsOnlyWithItsLane) {
  jobs.command(copy(1), 100);
  arm_load(1);
  const auto work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  EXPECT_FALSE(jobs.canceled(1));
  jobs.cancel(1);
  jobs.cancel(1);
  EXPECT_TRUE(jobs.canceled(1));
  EXPECT_TRUE(jobs.pending(1));
  expect_silence();
  end(jobs, *work, JobStatus::kCanceled);
  expect_report(1, JobStatus::kCanceled);
  expect_load(1, false);
  EXPECT_TRUE(jobs.canceled(1));  // unknown: nothing to go on with
  end(jobs, *work);
  expect_silence();
}

TEST_F(RankJobsTest, DeadlinesEndWhatNoLaneHasBegun) {
  arm_load(1, 10);                                // never commanded
  jobs.command(copy(2, Direction::kToHost), 20);  // never armed
  jobs.command(copy(3), 30);
  arm_load(3, 5);  // the first half's deadline counts
  const auto work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  EXPECT_EQ(jobs.next_deadline(), 10);
  jobs.on_time(9);
  expect_silence();
  jobs.on_time(10);
  expect_load(1, false);
  jobs.on_time(30);
  expect_report(2, JobStatus::kCanceled);
  EXPECT_TRUE(jobs.take_loads().empty());
  EXPECT_TRUE(jobs.canceled(3));
  EXPECT_TRUE(jobs.pending(3));
  EXPECT_FALSE(jobs.next_deadline());
  end(jobs, *work);  // just made it
  expect_report(3, JobStatus::kDone);
  expect_load(3, true);
}

TEST(RankJobs, FailsAtOnceWithoutANode) {
  RankJobs jobs;
  jobs.arm(1, true, nullptr, 100);
  jobs.arm(2, false, nullptr, 100);
  ASSERT_EQ(jobs.take_loads().size(), 1U);
  EXPECT_EQ(jobs.job_count(), 0U);
}

TEST_F(RankJobsTest, NodeLostEndsEverythingAndReportsNothingToAnotherNode) {
  arm_load(1);
  jobs.command(copy(2), 100);
  jobs.command(copy(3), 100);
  arm_load(3);
  auto work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  jobs.command(copy(4), 100);
  arm_load(4);
  jobs.node_lost();
  EXPECT_TRUE(jobs.take_reports().empty());
  auto loads = jobs.take_loads();
  ASSERT_EQ(loads.size(), 2U);  // 1 and 4
  for (const auto& load : loads) EXPECT_FALSE(load.ok);
  EXPECT_TRUE(jobs.canceled(3));
  EXPECT_EQ(jobs.job_count(), 1U);
  arm_load(5);
  expect_load(5, false);
  end(jobs, *work, JobStatus::kCanceled);
  EXPECT_TRUE(jobs.take_reports().empty());
  expect_load(3, false);

  jobs.node_found();
  jobs.command(copy(5), 100);  // a node that took us for attached before we knew
  expect_report(5, JobStatus::kCanceled);
  jobs.command(copy(6), 100);
  arm_load(6);
  work = jobs.next(Direction::kToDevice);
  ASSERT_TRUE(work);
  end(jobs, *work, JobStatus::kFailed);
  expect_report(6, JobStatus::kFailed);
  expect_load(6, false);
}

TEST_F(RankJobsTest, RemembersOnlyTheNewestThatWereGivenUp) {
  for (JobId job = 1; job <= RankJobs::kGivenUpMax + 1; ++job) jobs.cancel(job);
  jobs.command(copy(1), 100);  // forgotten: ends at its deadline
  EXPECT_TRUE(jobs.take_reports().empty());
  jobs.command(copy(2), 100);
  expect_report(2, JobStatus::kCanceled);
  jobs.on_time(100);
  expect_report(1, JobStatus::kCanceled);
}

TEST_F(RankJobsTest, TakeFailedTakesTheResultsOfTheGivenLoadsOnly) {
  for (const JobId job : {1U, 2U, 3U}) {
    jobs.command(copy(job), 100);
    arm_load(job);
    const auto work = jobs.next(Direction::kToDevice);
    ASSERT_TRUE(work);
    end(jobs, *work, job == 2 ? JobStatus::kFailed : JobStatus::kDone);
  }
  const JobId asked[] = {1, 2, 4};
  const auto failed = jobs.take_failed(asked);
  ASSERT_EQ(failed.size(), 2U);
  EXPECT_EQ(failed[0].job, 2U);
  EXPECT_EQ(failed[1].job, 4U);  // nobody knows of it
  expect_load(3, true);
}

class BeginningOfALoad : public RankJobsTest {
 protected:
  // Pieces of ten blocks, of which the given ones are copied whole.
  void piece(std::vector<proto::BlockSpan> spans, bool last, JobStatus status, std::size_t copied) {
    proto::CopyCommand command = copy(1);
    command.piece = pieces++;
    command.last = last;
    command.job_blocks = 10;
    command.spans = std::move(spans);
    jobs.command(std::move(command), 100);
    const auto work = jobs.next(Direction::kToDevice);
    ASSERT_TRUE(work);
    jobs.finished(*work, status, copied);
  }
  // What node and worker are told in the end.
  void expect_good(std::uint32_t blocks) {
    const auto reports = jobs.take_reports();
    ASSERT_EQ(reports.size(), 1U);
    EXPECT_EQ(reports[0].good_blocks, blocks);
    expect_load_good(blocks);
  }
  void expect_load_good(std::uint32_t blocks) {
    const auto loads = jobs.take_loads();
    ASSERT_EQ(loads.size(), 1U);
    EXPECT_EQ(loads[0].good_blocks, blocks);
    EXPECT_EQ(loads[0].ok, blocks == 10);
  }
  std::uint32_t pieces = 0;
};

TEST_F(BeginningOfALoad, CountsFromTheFirstBlockToTheFirstGapInWhateverOrderTheyCame) {
  arm_load(1);
  piece({{7, 2}, {2, 2}}, false, JobStatus::kDone, 4);
  piece({{0, 1}, {4, 1}}, false, JobStatus::kDone, 2);
  piece({{1, 1}}, true, JobStatus::kDone, 1);  // 5, 6 and 9 are given up
  expect_good(5);
}

TEST_F(BeginningOfALoad, IsAllOfACompleteOne) {
  arm_load(1);
  piece({{5, 5}}, false, JobStatus::kDone, 5);
  piece({{0, 5}}, true, JobStatus::kDone, 5);
  expect_good(10);
}

TEST_F(BeginningOfALoad, EndsWithinThePieceWhoseCopyStopped) {
  arm_load(1);
  piece({{1, 2}, {0, 1}, {3, 4}}, true, JobStatus::kCanceled, 5);
  expect_good(5);
}

TEST_F(BeginningOfALoad, KeepsNothingOfAPieceThatFailed) {
  arm_load(1);
  piece({{0, 3}}, false, JobStatus::kDone, 3);
  piece({{3, 7}}, true, JobStatus::kFailed, 0);
  expect_good(3);
}

TEST_F(BeginningOfALoad, IsWhatWasCopiedWhenItIsGivenUp) {
  arm_load(1);
  piece({{0, 3}}, false, JobStatus::kDone, 3);
  jobs.cancel(1);
  expect_good(3);
}

TEST_F(BeginningOfALoad, IsWhatWasCopiedWhenItsNodeIsGone) {
  arm_load(1);
  piece({{0, 2}}, false, JobStatus::kDone, 2);
  jobs.node_lost();
  EXPECT_TRUE(jobs.take_reports().empty());
  expect_load_good(2);
}

TEST_F(BeginningOfALoad, MayBeAllThatTheNodeSends) {
  arm_load(1);
  piece({{0, 4}}, false, JobStatus::kDone, 4);
  piece({}, true, JobStatus::kDone, 0);
  expect_good(4);
}

// Whatever happens in whatever order: each command is reported once and each armed load once, never while its lane is
// at it, and after all deadlines nothing is left.
RC_GTEST_PROP(RankJobs, EveryHalfIsAnsweredOnce, ()) {
  RankJobs jobs;
  jobs.node_found();
  std::map<JobId, std::uint32_t> commanded;
  std::map<JobId, int> armed;
  std::map<JobId, RankJobs::Work> running;
  std::map<JobId, int> reported;
  std::map<JobId, int> loaded;
  Nanos now = 0;
  const auto collect = [&] {
    for (const auto& report : jobs.take_reports()) {
      RC_ASSERT(!running.contains(report.job));
      ++reported[report.job];
    }
    for (const auto& load : jobs.take_loads()) {
      RC_ASSERT(!running.contains(load.job));
      ++loaded[load.job];
    }
  };
  const auto steps = *rc::gen::inRange(1, 120);
  for (int step = 0; step < steps; ++step) {
    const auto job = static_cast<JobId>(*rc::gen::inRange(1, 9));
    switch (*rc::gen::inRange(0, 6)) {
      case 0:  // three pieces
        if (commanded[job] < 3) {
          jobs.command(piece_of(job, commanded[job], commanded[job] == 2), now + 20);
          ++commanded[job];
        }
        break;
      case 1:
        if (armed[job]++ == 0) jobs.arm(job, true, nullptr, now + 20);
        break;
      case 2:
        jobs.cancel(job);
        break;
      case 3:
        if (const auto work = jobs.next(Direction::kToDevice)) RC_ASSERT(running.emplace(work->job, *work).second);
        break;
      case 4:
        if (!running.empty()) {
          const auto ended = running.extract(running.begin()).mapped();
          end(jobs, ended, jobs.canceled(ended.job) ? JobStatus::kCanceled : JobStatus::kDone);
        }
        break;
      default:
        jobs.on_time(now += *rc::gen::inRange(0, 10));
        break;
    }
    for (const auto& [runs, work] : running) RC_ASSERT(jobs.pending(runs));
    collect();
  }
  while (!running.empty()) {
    end(jobs, running.extract(running.begin()).mapped());
  }
  jobs.on_time(now + 1000);
  collect();
  RC_ASSERT(jobs.job_count() == 0);
  for (const auto& [job, count] : commanded) RC_ASSERT(reported[job] == (count > 0 ? 1 : 0));
  for (const auto& [job, count] : armed) RC_ASSERT(loaded[job] == (count > 0 ? 1 : 0));
}

}  // namespace
}  // namespace flexkv::agent
