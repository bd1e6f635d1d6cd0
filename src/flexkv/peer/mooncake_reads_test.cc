// The real Mooncake between lanes and between processes, over TCP; where it is not installed, these tests say so.
// FLEXKV_TEST_MOONCAKE: a Python that has it, and this flexkv.
#include "flexkv/peer/mooncake_reads.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <future>

#include "flexkv/peer/test_one_sided.h"

namespace flexkv::peer {
namespace {

using testing::Node;
using testing::ProcessOfAnOwner;
using testing::Wanted;

std::unique_ptr<MooncakeReads> mooncake_reads(const memory::HostRegion& pool) {
  return MooncakeReads::start({std::getenv("FLEXKV_TEST_MOONCAKE"), "-P", "-m", "flexkv.mooncake.reader"}, "127.0.0.1",
                              pool)
      .value();
}

void wait_until_ready(const OneSided& reads) {
  while (reads.window() == nullptr) std::this_thread::yield();
}

struct MooncakeNode : Node {
  explicit MooncakeNode(const std::string& name) : Node(name, mooncake_reads) { wait_until_ready(*reads); }
  const MooncakeReads& mooncake() const { return static_cast<const MooncakeReads&>(*reads); }
};

class MooncakeReadsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("FLEXKV_TEST_MOONCAKE") == nullptr) {
      GTEST_SKIP() << "FLEXKV_TEST_MOONCAKE does not say which Python has Mooncake";
    }
    ::signal(SIGPIPE, SIG_IGN);
  }
};

TEST_F(MooncakeReadsTest, BringBlocksBetweenLanes) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  std::vector<Wanted> wanted;
  for (RequestId id = 1; id <= 6; ++id) wanted.emplace_back(id, owner.lane->address());
  for (const Wanted& one : wanted) reader.lane->read(one.request);
  for (const Wanted& one : wanted) {
    EXPECT_EQ(reader.ends.wait(one.id), Outcome::kDone);
    one.expect_right();
  }
  reader.lane.reset();
  while (owner.lane->stats().readers > 0) std::this_thread::yield();
  EXPECT_EQ(owner.source.pins, 0U);
  EXPECT_EQ(owner.lane->stats().served.placed_blocks, wanted.size() * Wanted::kBlocks);
  EXPECT_EQ(owner.lane->stats().served.bytes, 0U);
}

// The slot is recycled while it is read, again and again. No checksum helps here.
TEST_F(MooncakeReadsTest, TellWhetherTheLeaseHadEnded) {
  const auto memory = memory::HostRegion::create(kPieceBytesMax, {.huge_pages = false, .numa = {}}).value();
  const std::span slot(memory.data(), memory.bytes());
  const auto reader = mooncake_reads(memory);
  const auto owner = mooncake_reads(memory);
  wait_until_ready(*reader);
  wait_until_ready(*owner);
  const auto window = owner->window();
  std::uint64_t held = 0;
  std::uint64_t over = 0;
  for (int round = 0; round < 400; ++round) {
    const auto fill = static_cast<std::byte>(round);
    std::ranges::fill(slot, fill);
    const std::uint32_t word = owner->words().take().value();
    const std::uint64_t generation = owner->words().generation(word);
    std::promise<Fetched> fetched;
    Piece piece;
    piece.address = window->pool;
    piece.bytes = kPieceBytesMax;
    piece.word_address = window->words + word * sizeof(std::uint64_t);
    ASSERT_TRUE(reader->fetch("owner", *window, piece, [&](Fetched one) { fetched.set_value(std::move(one)); }));
    for (int i = 0; i < round % 40; ++i) std::this_thread::sleep_for(std::chrono::microseconds(20 * (round % 4)));
    owner->words().end(word);
    std::ranges::fill(slot, ~fill);
    const Fetched got = fetched.get_future().get();
    ASSERT_TRUE(got.ok);
    const bool believed = got.word == generation;
    ++(believed ? held : over);
    if (believed) {
      ASSERT_TRUE(std::ranges::all_of(got.bytes, [&](std::byte byte) { return byte == fill; })) << "round " << round;
    }
  }
  EXPECT_GT(over, 0U);
  RecordProperty("held", static_cast<int>(held));
}

// Reads that are ordered before and after `harm` is done to a process of Mooncake's. All bring right bytes.
void expect_reads_survive(MooncakeNode& owner, MooncakeNode& reader, const std::function<void()>& harm) {
  std::vector<Wanted> wanted;
  for (RequestId id = 1; id <= 30; ++id) wanted.emplace_back(id, owner.lane->address());
  for (const Wanted& one : wanted) {
    reader.lane->read(one.request);
    if (one.id == 10) harm();
  }
  for (const Wanted& one : wanted) {
    EXPECT_EQ(reader.ends.wait(one.id), Outcome::kDone) << one.id;
    one.expect_right();
  }
}

TEST_F(MooncakeReadsTest, GoOnAsBytesWhenTheReadersProcessIsKilled) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  const pid_t before = reader.mooncake().helper_pid();
  expect_reads_survive(owner, reader, [&] { ::kill(before, SIGKILL); });
  while (reader.mooncake().helper_pid() == before || reader.reads->window() == nullptr) std::this_thread::yield();
}

TEST_F(MooncakeReadsTest, GoOnAsBytesWhenTheReadersProcessHangs) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  const pid_t before = reader.mooncake().helper_pid();
  expect_reads_survive(owner, reader, [&] { ::kill(before, SIGSTOP); });
  while (reader.mooncake().helper_pid() == before || reader.reads->window() == nullptr) std::this_thread::yield();
  EXPECT_NE(::kill(before, 0), 0) << "it is killed and waited for";
}

TEST_F(MooncakeReadsTest, GoOnAsBytesWhenTheOwnersProcessIsKilled) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  const pid_t before = owner.mooncake().helper_pid();
  expect_reads_survive(owner, reader, [&] { ::kill(before, SIGKILL); });
}

TEST_F(MooncakeReadsTest, GoOnAsBytesWhenTheOwnersProcessHangs) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  expect_reads_survive(owner, reader, [&] { ::kill(owner.mooncake().helper_pid(), SIGSTOP); });
}

// Over the same connection of the two nodes.
TEST_F(MooncakeReadsTest, GoOnWithTheOwnersNextProcess) {
  MooncakeNode owner("owner");
  MooncakeNode reader("reader");
  const auto expect_read = [&](RequestId id) {
    const Wanted wanted(id, owner.lane->address());
    reader.lane->read(wanted.request);
    EXPECT_EQ(reader.ends.wait(id), Outcome::kDone);
    wanted.expect_right();
  };
  expect_read(1);
  const auto first = owner.reads->window();
  ::kill(owner.mooncake().helper_pid(), SIGKILL);
  while (owner.reads->window() == first) std::this_thread::yield();
  wait_until_ready(*owner.reads);
  expect_read(2);
  owner.lane.reset();
  while (reader.lane->stats().owners > 0) std::this_thread::yield();
  EXPECT_EQ(reader.lane->stats().read.one_sided_blocks, 2 * Wanted::kBlocks);
  EXPECT_EQ(reader.lane->stats().read.one_sided_failures, 0U);
}

TEST(MooncakeOwnerProcess, DISABLED_Serves) { testing::serve_until_closed(MooncakeNode("owner")); }

TEST_F(MooncakeReadsTest, EndReadsOfAnOwnerThatIsKilled) {
  ProcessOfAnOwner owner("MooncakeOwnerProcess.DISABLED_Serves");
  MooncakeNode reader("reader");
  std::vector<Wanted> wanted;
  for (RequestId id = 1; id <= 30; ++id) wanted.emplace_back(id, owner.address);
  for (const Wanted& one : wanted) reader.lane->read(one.request);
  EXPECT_EQ(reader.ends.wait(1), Outcome::kDone);
  owner.kill(SIGKILL);
  for (const Wanted& one : wanted) {
    const Outcome outcome = one.id == 1 ? Outcome::kDone : reader.ends.wait(one.id);
    if (outcome == Outcome::kDone) {
      one.expect_right();
    } else {
      EXPECT_EQ(outcome, Outcome::kUnreachable);
    }
  }
  EXPECT_EQ(reader.lane->stats().read.ended[static_cast<std::size_t>(Outcome::kDeadline)], 0U);
}

TEST(MooncakeNames, AreOfHostAndPort) {
  for (const char* const name : {"10.0.0.1:15000", "host-1.example:1", "[::1]:65535"}) {
    EXPECT_TRUE(is_mooncake_name(name)) << name;
  }
  for (const char* const name : {"", "host", ":1", "host:", "host:0", "host:65536", "host:1x", "a b:1", "http://a:1"}) {
    EXPECT_FALSE(is_mooncake_name(name)) << name;
  }
  EXPECT_FALSE(is_mooncake_name(std::string(255, 'a') + ":1"));
}

}  // namespace
}  // namespace flexkv::peer
