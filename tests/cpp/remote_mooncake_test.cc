// The remote tier over a real Mooncake Store: what one node writes another reads, and what happens when it forgets,
// when what it has is damaged, and when its master or the process that is its client dies, hangs or comes back.
#include <gtest/gtest.h>
#include <signal.h>

#include <cerrno>

#include "flexkv/remote/mooncake_store.h"
#include "flexkv/remote/test_tier.h"
#include "mooncake_server.h"

namespace flexkv::remote {
namespace {

using flexkv::testing::MooncakeServer;
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

TierOptions scanning_once() {
  TierOptions once = options();
  once.engine.scan_every = 3600 * kSecond;
  return once;
}

struct Node {
  explicit Node(const MooncakeServer& server, const TierOptions& with = options(), std::size_t slot_bytes = kSlotBytes)
      : Node(open_store(server.url(), {}, server.options()).value(), with, slot_bytes) {}
  Node(std::unique_ptr<Store> store, const TierOptions& with, std::size_t slot_bytes)
      : mooncake(static_cast<const MooncakeStore&>(*store)), user(std::move(store), slot_bytes, with) {}

  pid_t client() const { return mooncake.process().pid(); }
  void wait_for_another_client(pid_t than) const {
    User::wait_until([&] { return client() != 0 && client() != than; });
  }
  void wait_until_looked_through() {
    User::wait_until([&] { return user.tier().stats().scans > 0; });
  }
  // Until it is asked again, after it failed.
  void wait_until_on() {
    User::wait_until([&] { return user.tier().stats().reads_off.empty() && user.tier().stats().writes_off.empty(); });
  }

  const MooncakeStore& mooncake;
  User user;
};

class RemoteMooncake : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!MooncakeServer::possible()) GTEST_SKIP() << "FLEXKV_TEST_MOONCAKE does not say which Python has Mooncake";
    ::signal(SIGPIPE, SIG_IGN);
  }
};

TEST_F(RemoteMooncake, WhatOneWritesAnotherReads) {
  const MooncakeServer server;
  Node writer(server);
  EXPECT_EQ(writer.user.write(0, 10), Outcome::kDone);
  EXPECT_EQ(writer.user.tier().stats().objects_written, 3U);
  Node reader(server);
  User::wait_until([&] { return reader.user.contains(0, 12) == 10; });
  EXPECT_EQ(reader.user.read(0, 10), Outcome::kDone);
  EXPECT_EQ(reader.user.read(3, 6), Outcome::kDone);
  EXPECT_EQ(reader.user.write(10, 2), Outcome::kDone);
  User::wait_until([&] { return writer.user.contains(0, 12) == 12; });
  EXPECT_EQ(writer.user.read(0, 12), Outcome::kDone);
  EXPECT_EQ(reader.user.contains(1000, 1), 0U);
}

TEST_F(RemoteMooncake, TwoThatWriteTheSameDoNoHarm) {
  const MooncakeServer server;
  Node one(server, scanning_once());
  Node other(server, scanning_once());
  one.wait_until_looked_through();
  other.wait_until_looked_through();
  const RequestId first = one.user.begin_write(0, 8);
  const RequestId second = other.user.begin_write(0, 8);
  EXPECT_EQ(one.user.sink().wait(first), Outcome::kDone);
  EXPECT_EQ(other.user.sink().wait(second), Outcome::kDone);
  EXPECT_EQ(one.user.read(0, 8), Outcome::kDone);
  EXPECT_EQ(other.user.read(0, 8), Outcome::kDone);
}

TEST_F(RemoteMooncake, AScanGoesOnOverManyPages) {
  const MooncakeServer server;
  TierOptions small = scanning_once();
  small.engine.object_bytes = 1;  // one block each
  Node writer(server, small, 64);
  constexpr std::size_t kBlocks = 5000;
  ASSERT_EQ(writer.user.write(0, kBlocks), Outcome::kDone);
  Node reader(server, small, 64);
  reader.wait_until_looked_through();
  EXPECT_EQ(reader.user.contains(0, kBlocks), kBlocks);
  EXPECT_EQ(reader.user.tier().stats().lists, 2U);
}

TEST_F(RemoteMooncake, BlocksLargerThanAnObjectAreCarriedAlone) {
  const MooncakeServer server;
  constexpr std::size_t kLarge = 20 << 20;
  Node writer(server, options(), kLarge);
  EXPECT_EQ(writer.user.write(0, 3), Outcome::kDone);
  EXPECT_EQ(writer.user.read(0, 3), Outcome::kDone);
  Node reader(server, options(), kLarge);
  User::wait_until([&] { return reader.user.contains(0, 3) == 3; });
  EXPECT_EQ(reader.user.read(0, 3), Outcome::kDone);
}

TEST_F(RemoteMooncake, WhatWasForgottenIsAMissAndTheStoreStaysOn) {
  const MooncakeServer server;
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  for (std::uint64_t chain = 0; chain < 20; ++chain) ASSERT_EQ(node.user.write(chain * 1000, 4), Outcome::kDone);
  server.remove();
  for (std::uint64_t chain = 0; chain < 20; ++chain) {
    EXPECT_EQ(node.user.read(chain * 1000, 4), Outcome::kMissing);
    EXPECT_EQ(node.user.contains(chain * 1000, 4), 0U);
  }
  EXPECT_TRUE(node.user.tier().stats().reads_off.empty());
  EXPECT_EQ(node.user.write(0, 4), Outcome::kDone);
  EXPECT_EQ(node.user.read(0, 4), Outcome::kDone);
}

TEST_F(RemoteMooncake, WhatIsWrittenWhenItIsFullMakesOlderObjectsGo) {
  const MooncakeServer server(32 << 20);
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  std::vector<std::uint64_t> written;  // three times what it has room for
  for (std::uint64_t first = 0; written.size() < 400; first += 1000) {
    // It has no room for a moment, until it has evicted.
    if (node.user.write(first, 4) == Outcome::kDone) written.push_back(first);
  }
  std::size_t gone = 0;
  for (const std::uint64_t first : written) {
    const Outcome outcome = node.user.read(first, 4);
    ASSERT_TRUE(outcome == Outcome::kDone || outcome == Outcome::kMissing) << outcome_name(outcome);
    EXPECT_EQ(node.user.contains(first, 4), outcome == Outcome::kDone ? 4U : 0U);
    gone += outcome == Outcome::kMissing;
  }
  EXPECT_GT(gone, 200U);
  EXPECT_LT(gone, 400U);
}

TEST_F(RemoteMooncake, DamagedObjectsAreMissesUntilTheyAreWrittenAnew) {
  const MooncakeServer server;
  Node node(server);
  ASSERT_EQ(node.user.write(0, 4), Outcome::kDone);
  server.spoil();
  User::wait_until([&] { return node.user.contains(0, 4) == 4; });
  const RequestId id = node.user.begin_read(0, 4);
  EXPECT_EQ(node.user.end_read(id, 0), Outcome::kDamaged);
  EXPECT_LT(node.user.sink().blocks(id), 4U);
  node.user.wait_for_scan();
  EXPECT_EQ(node.user.contains(0, 4), 0U);  // a scan does not bring it back
  EXPECT_EQ(node.user.write(0, 4), Outcome::kDone);
  EXPECT_EQ(node.user.read(0, 4), Outcome::kDone);
}

TEST_F(RemoteMooncake, ItsClientIsKilledAndAnotherOneGoesOn) {
  const MooncakeServer server;
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  ASSERT_EQ(node.user.write(0, 40), Outcome::kDone);
  const pid_t before = node.client();
  std::vector<RequestId> reads;
  for (int i = 0; i < 40; ++i) reads.push_back(node.user.begin_read(0, 40));
  ::kill(before, SIGKILL);
  for (const RequestId id : reads) (void)node.user.end_read(id, 0);  // compares what came
  node.wait_for_another_client(before);
  node.wait_until_on();
  EXPECT_EQ(node.user.read(0, 40), Outcome::kDone);
  EXPECT_EQ(node.user.write(1000, 4), Outcome::kDone);
}

TEST_F(RemoteMooncake, ItsClientHangsAndAnotherOneGoesOn) {
  const MooncakeServer server;
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  ASSERT_EQ(node.user.write(0, 8), Outcome::kDone);
  const pid_t before = node.client();
  ::kill(before, SIGSTOP);
  EXPECT_EQ(node.user.end_read(node.user.begin_read(0, 8, 50 * kMillisecond), 0), Outcome::kDeadline);
  std::vector<RequestId> more;
  for (int i = 0; i < 20; ++i) more.push_back(node.user.begin_read(0, 8));
  for (const RequestId id : more) EXPECT_NE(node.user.end_read(id, 0), Outcome::kDeadline);
  node.wait_for_another_client(before);
  EXPECT_NE(::kill(before, 0), 0) << "it is killed and waited for";
  EXPECT_EQ(errno, ESRCH);
  node.wait_until_on();
  EXPECT_EQ(node.user.read(0, 8), Outcome::kDone);
}

TEST_F(RemoteMooncake, WhoseClientHangsCanBeEndedAndLeavesTheCallersMemoryAlone) {
  const MooncakeServer server;
  auto node = std::make_unique<Node>(server, scanning_once());
  node->wait_until_looked_through();
  ASSERT_EQ(node->user.write(0, 8), Outcome::kDone);
  ::kill(node->client(), SIGSTOP);
  node->user.begin_read(0, 8);
  node->user.begin_write(1000, 8);
  node.reset();  // the buffers are freed
}

TEST_F(RemoteMooncake, ItsMasterDiesAndComesBack) {
  MooncakeServer server;
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  ASSERT_EQ(node.user.write(0, 8), Outcome::kDone);
  server.kill_master();
  User::wait_until([&] { return node.user.read(0, 8) != Outcome::kDone; });
  EXPECT_NE(node.user.write(1000, 8), Outcome::kDone);
  server.start_master();
  // It has forgotten what there was, and the process that lends memory has to find it again.
  User::wait_until([&] { return node.user.write(2000, 8) == Outcome::kDone; });
  node.wait_until_on();
  EXPECT_EQ(node.user.read(2000, 8), Outcome::kDone);
  EXPECT_NE(node.user.read(0, 8), Outcome::kDone);
}

TEST_F(RemoteMooncake, WhoLendsMemoryDiesAndAnotherOneComes) {
  MooncakeServer server;
  Node node(server, scanning_once());
  node.wait_until_looked_through();
  ASSERT_EQ(node.user.write(0, 8), Outcome::kDone);
  server.kill_holder();
  EXPECT_NE(node.user.read(0, 8), Outcome::kDone);
  server.start_holder();
  User::wait_until([&] { return node.user.write(1000, 8) == Outcome::kDone; });
  User::wait_until([&] { return node.user.read(1000, 8) == Outcome::kDone; });
}

TEST_F(RemoteMooncake, WithoutAMasterItSaysSoAndFindsTheOneThatComes) {
  MooncakeServer server;
  server.kill_master();
  Node node(server);
  EXPECT_NE(node.user.write(0, 4), Outcome::kDone);
  User::wait_until([&] { return node.user.tier().stats().last_error.find("no Mooncake master") != std::string::npos; });
  server.start_master();
  User::wait_until([&] { return node.user.write(0, 4) == Outcome::kDone; });
}

TEST(RemoteMooncakeWithoutIt, SaysWhatIsMissing) {
  ::signal(SIGPIPE, SIG_IGN);
  Node node(open_store("mooncake://127.0.0.1:1", {}, {{"/nowhere/python"}, ""}).value(), options(), kSlotBytes);
  EXPECT_NE(node.user.write(0, 4), Outcome::kDone);
  User::wait_until([&] { return node.user.tier().stats().last_error.find("/nowhere/python") != std::string::npos; });
  const auto without_command = open_store("mooncake://127.0.0.1:1", {}, {});
  ASSERT_FALSE(without_command.ok());
}

// A process that says what it likes: nothing of it is believed, and it is killed.
TEST(RemoteMooncakeWithoutIt, AProcessThatBreaksTheProtocolIsReplaced) {
  ::signal(SIGPIPE, SIG_IGN);
  Node node(open_store("mooncake://127.0.0.1:1", {}, {{"sh", "-c", "echo nonsense >&3; cat <&3"}, ""}).value(),
            options(), kSlotBytes);
  EXPECT_NE(node.user.write(0, 4), Outcome::kDone);
  User::wait_until([&] { return node.user.tier().stats().last_error.find("protocol") != std::string::npos; });
}

}  // namespace
}  // namespace flexkv::remote
