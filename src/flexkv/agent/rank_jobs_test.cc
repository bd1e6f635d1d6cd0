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
  return {job, direction, armed, 4096, {{1, 1, 0}}};
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
    jobs.finished(job, JobStatus::kDone);
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
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  EXPECT_FALSE(jobs.ready(Direction::kToDevice));
  jobs.finished(1, JobStatus::kDone);
  EXPECT_TRUE(jobs.take_ended());
  EXPECT_FALSE(jobs.take_ended());
  arm_load(2);
  jobs.node_lost();
  EXPECT_TRUE(jobs.take_ended());
}

TEST_F(RankJobsTest, ArmedByTheNodeRunsAtOnceAndIsNoBusinessOfTheWorker) {
  jobs.command(copy(1, Direction::kToHost, true), 100);
  ASSERT_TRUE(jobs.next(Direction::kToHost));
  jobs.finished(1, JobStatus::kDone);
  expect_report(1, JobStatus::kDone);
  EXPECT_TRUE(jobs.take_loads().empty());
}

TEST_F(RankJobsTest, SaidTwiceCountsOnce) {
  jobs.command(copy(1), 100);
  jobs.command(copy(1), 100);
  arm_load(1);
  arm_load(1);
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  jobs.finished(1, JobStatus::kDone);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  expect_report(1, JobStatus::kDone);
  expect_load(1, true);
}

proto::CopyCommand piece_of(JobId job, std::uint32_t number, bool last) {
  proto::CopyCommand command = copy(job);
  command.piece = number;
  command.last = last;
  return command;
}

TEST_F(RankJobsTest, PiecesAreCopiedAsTheyComeAndTheJobEndsWithTheLast) {
  arm_load(1);
  jobs.command(piece_of(1, 0, false), 100);
  EXPECT_EQ(jobs.next(Direction::kToDevice)->command->piece, 0U);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  jobs.command(piece_of(1, 1, false), 100);
  jobs.command(piece_of(1, 1, false), 100);       // said twice
  EXPECT_FALSE(jobs.next(Direction::kToDevice));  // one lane at a time
  jobs.finished(1, JobStatus::kDone);
  EXPECT_EQ(jobs.next(Direction::kToDevice)->command->piece, 1U);
  jobs.finished(1, JobStatus::kDone);
  EXPECT_FALSE(jobs.next(Direction::kToDevice));
  EXPECT_TRUE(jobs.pending(1));
  expect_silence();
  jobs.command(piece_of(1, 2, true), 100);
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  jobs.finished(1, JobStatus::kDone);
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
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  jobs.cancel(3);
  jobs.finished(3, JobStatus::kDone);  // of this piece, but another was to come
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
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  EXPECT_FALSE(jobs.canceled(1));
  jobs.cancel(1);
  jobs.cancel(1);
  EXPECT_TRUE(jobs.canceled(1));
  EXPECT_TRUE(jobs.pending(1));
  expect_silence();
  jobs.finished(1, JobStatus::kCanceled);
  expect_report(1, JobStatus::kCanceled);
  expect_load(1, false);
  EXPECT_TRUE(jobs.canceled(1));  // unknown: nothing to go on with
  jobs.finished(1, JobStatus::kDone);
  expect_silence();
}

TEST_F(RankJobsTest, DeadlinesEndWhatNoLaneHasBegun) {
  arm_load(1, 10);                                // never commanded
  jobs.command(copy(2, Direction::kToHost), 20);  // never armed
  jobs.command(copy(3), 30);
  arm_load(3, 5);  // the first half's deadline counts
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
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
  jobs.finished(3, JobStatus::kDone);  // just made it
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
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
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
  jobs.finished(3, JobStatus::kCanceled);
  EXPECT_TRUE(jobs.take_reports().empty());
  expect_load(3, false);

  jobs.node_found();
  jobs.command(copy(5), 100);  // a node that took us for attached before we knew
  expect_report(5, JobStatus::kCanceled);
  jobs.command(copy(6), 100);
  arm_load(6);
  ASSERT_TRUE(jobs.next(Direction::kToDevice));
  jobs.finished(6, JobStatus::kFailed);
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
    ASSERT_TRUE(jobs.next(Direction::kToDevice));
    jobs.finished(job, job == 2 ? JobStatus::kFailed : JobStatus::kDone);
  }
  const JobId asked[] = {1, 2, 4};
  EXPECT_EQ(jobs.take_failed(asked), (std::vector<JobId>{2, 4}));  // nobody knows of the last one
  expect_load(3, true);
}

// Whatever happens in whatever order: each command is reported once and each armed load once, never while its lane is
// at it, and after all deadlines nothing is left.
RC_GTEST_PROP(RankJobs, EveryHalfIsAnsweredOnce, ()) {
  RankJobs jobs;
  jobs.node_found();
  std::map<JobId, std::uint32_t> commanded;
  std::map<JobId, int> armed;
  std::set<JobId> running;
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
        if (const auto work = jobs.next(Direction::kToDevice)) RC_ASSERT(running.insert(work->job).second);
        break;
      case 4:
        if (!running.empty()) {
          const JobId ended = *running.begin();
          running.erase(ended);
          jobs.finished(ended, jobs.canceled(ended) ? JobStatus::kCanceled : JobStatus::kDone);
        }
        break;
      default:
        jobs.on_time(now += *rc::gen::inRange(0, 10));
        break;
    }
    for (const JobId runs : running) RC_ASSERT(jobs.pending(runs));
    collect();
  }
  while (!running.empty()) {
    jobs.finished(*running.begin(), JobStatus::kDone);
    running.erase(running.begin());
  }
  jobs.on_time(now + 1000);
  collect();
  RC_ASSERT(jobs.job_count() == 0);
  for (const auto& [job, count] : commanded) RC_ASSERT(reported[job] == (count > 0 ? 1 : 0));
  for (const auto& [job, count] : armed) RC_ASSERT(loaded[job] == (count > 0 ? 1 : 0));
}

}  // namespace
}  // namespace flexkv::agent
