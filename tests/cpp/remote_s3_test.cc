// The remote tier over a real S3-compatible server: what one node writes another reads, and what happens when the
// server fails, lies, hangs, dies, comes back or does not let us in.
#include <gtest/gtest.h>

#include "flexkv/remote/test_tier.h"
#include "s3_server.h"

namespace flexkv::remote {
namespace {

using flexkv::testing::S3Server;
using testing::User;

constexpr std::size_t kSlotBytes = 64 << 10;

TierOptions options() {
  TierOptions options;
  options.engine.object_bytes = 4 * (kSlotBytes + kHeadBytes);
  options.engine.scan_every = 50 * kMillisecond;
  options.engine.dispatch.breaker.probe_after = 20 * kMillisecond;
  options.engine.dispatch.breaker.probe_after_max = 200 * kMillisecond;
  return options;
}

// Nothing but what a test asks for reaches the server once the first scan has ended.
TierOptions scanning_once() {
  TierOptions once = options();
  once.engine.scan_every = 3600 * kSecond;
  return once;
}

std::unique_ptr<Store> open(const S3Options& s3) {
  auto store = open_store(S3Server::kUrl, s3);
  EXPECT_TRUE(store.ok()) << (store.ok() ? "" : store.error().message);
  return std::move(store).value();
}

TEST(RemoteS3, WhatOneWritesAnotherReads) {
  const S3Server server;
  User writer(open(server.user()), kSlotBytes, options());
  EXPECT_EQ(writer.write(0, 10), Outcome::kDone);
  EXPECT_EQ(writer.tier().stats().objects_written, 3U);
  User reader(open(server.role()), kSlotBytes, options());  // with a session token
  reader.wait_for_scan();
  EXPECT_EQ(reader.contains(0, 12), 10U);
  EXPECT_EQ(reader.read(0, 10), Outcome::kDone);
  EXPECT_EQ(reader.read(3, 6), Outcome::kDone);
  EXPECT_EQ(reader.write(10, 2), Outcome::kDone);
}

TEST(RemoteS3, AScanGoesOnOverManyPages) {
  const S3Server server;
  TierOptions small = options();
  small.engine.object_bytes = 1;  // one block each
  User writer(open(server.user()), 64, small);
  EXPECT_EQ(writer.write(0, 1010), Outcome::kDone);
  User reader(open(server.user()), 64, small);
  reader.wait_for_scan();
  EXPECT_EQ(reader.contains(0, 1010), 1010U);
  EXPECT_GE(reader.tier().stats().lists, 2U);
}

TEST(RemoteS3, BusyServersAreAskedAgain) {
  const S3Server server;
  User user(open(server.user()), kSlotBytes, scanning_once());
  user.wait_for_scan();
  server.fault("status503", 2);
  EXPECT_EQ(user.write(0, 4), Outcome::kDone);
  server.fault("status503", 2);
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
  EXPECT_EQ(user.tier().stats().tried_again, 4U);
  EXPECT_NE(user.tier().stats().last_error.find("503 SlowDown"), std::string::npos);
}

TEST(RemoteS3, WhatIsCutOffFlippedOrNotARangeIsNoBlock) {
  const S3Server server;
  User user(open(server.user()), kSlotBytes, scanning_once());
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  server.fault("cut", 1);
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);  // asked again
  EXPECT_EQ(user.tier().stats().tried_again, 1U);
  server.fault("whole", 1);
  EXPECT_EQ(user.read(1, 2), Outcome::kFailed);
  server.fault("flip", 1);
  EXPECT_EQ(user.read(0, 4), Outcome::kDamaged);
  EXPECT_EQ(user.faults(Fault::kPayload), 1U);
  EXPECT_EQ(user.write(0, 4), Outcome::kDone);
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
}

TEST(RemoteS3, AHangEndsByTheDeadlineOrByTheBreaker) {
  const S3Server server;
  TierOptions quick = scanning_once();
  quick.engine.dispatch.breaker.stall_after = 2 * kSecond;
  User user(open(server.user()), kSlotBytes, quick);
  user.wait_for_scan();
  ASSERT_EQ(user.write(0, 4), Outcome::kDone);
  server.fault("hang", 3);
  const RequestId impatient = user.begin_read(0, 4, 100 * kMillisecond);
  EXPECT_EQ(user.end_read(impatient, 0), Outcome::kDeadline);
  const RequestId canceled = user.begin_read(0, 4);
  User::wait_until([&] { return user.tier().stats().gets == 2; });
  user.tier().cancel(canceled);
  EXPECT_EQ(user.end_read(canceled, 0), Outcome::kCanceled);
  EXPECT_EQ(user.read(0, 4), Outcome::kUnavailable);
  User::wait_until([&] { return user.tier().stats().reads_off.empty(); });
  EXPECT_EQ(user.read(0, 4), Outcome::kDone);
}

TEST(RemoteS3, AServerThatDiesIsLeftAloneAndComesBackEmpty) {
  S3Server server;
  User user(open(server.user()), kSlotBytes, options());
  ASSERT_EQ(user.write(0, 8), Outcome::kDone);
  server.kill();
  User::wait_until([&] { return user.read(0, 8) == Outcome::kUnavailable; });
  EXPECT_EQ(user.contains(0, 8), 0U);
  User::wait_until([&] { return user.write(8, 4) == Outcome::kUnavailable; });
  server.start();
  // The credentials of before are not known to it: it answers, and refuses.
  EXPECT_NE(user.read(0, 8), Outcome::kDone);
  User back(open(server.user()), kSlotBytes, options());
  back.wait_for_scan();
  EXPECT_EQ(back.contains(0, 8), 0U);
  EXPECT_EQ(back.write(0, 8), Outcome::kDone);
  EXPECT_EQ(back.read(0, 8), Outcome::kDone);
}

TEST(RemoteS3, WrongCredentialsAreNamedWithoutTheSecret) {
  const S3Server server;
  S3Options wrong = server.user();
  wrong.secret_key = "wrong-secret-key";
  User user(open(wrong), kSlotBytes, options());
  EXPECT_EQ(user.write(0, 4), Outcome::kFailed);
  User::wait_until([&] { return user.tier().stats().scans_failed > 0; });
  const std::string why = user.tier().stats().last_error;
  EXPECT_NE(why.find("HTTP 403 SignatureDoesNotMatch"), std::string::npos) << why;
  EXPECT_EQ(why.find(wrong.secret_key), std::string::npos);
  wrong.access_key = "AKIAUNKNOWN";
  User stranger(open(wrong), kSlotBytes, options());
  EXPECT_EQ(stranger.write(0, 4), Outcome::kFailed);
  EXPECT_NE(stranger.tier().stats().last_error.find("HTTP 403"), std::string::npos);
}

TEST(RemoteS3, ABucketThatIsNotThereIsNotTakenForMissingObjects) {
  const S3Server server;
  auto store = open_store("s3://another-bucket/p", server.user());
  ASSERT_TRUE(store.ok());
  User user(std::move(store).value(), kSlotBytes, options());
  EXPECT_EQ(user.write(0, 4), Outcome::kFailed);
  EXPECT_NE(user.tier().stats().last_error.find("404 NoSuchBucket"), std::string::npos)
      << user.tier().stats().last_error;
}

}  // namespace
}  // namespace flexkv::remote
