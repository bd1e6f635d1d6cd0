// The real NIXL between lanes and between processes; where it is not installed, these tests say so.
// FLEXKV_TEST_NIXL: path of libnixl_capi.so.
#include "flexkv/peer/nixl_reads.h"

#include <gtest/gtest.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <future>
#include <thread>

#include "flexkv/peer/test_one_sided.h"

namespace flexkv::peer {
namespace {

using testing::Node;
using testing::PoolSource;
using testing::ProcessOfAnOwner;
using testing::Wanted;

std::unique_ptr<NixlReads> nixl_reads(const std::string& name, std::span<std::byte> pool) {
  return NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), name, pool).value();
}

std::span<std::byte> bytes_of(PoolSource& source) { return {source.pool.data(), source.pool.bytes()}; }

struct NixlNode : Node {
  explicit NixlNode(const std::string& name)
      : Node(name, [&](auto& pool) {
          return nixl_reads(name, {pool.data(), pool.bytes()});
        }) {}
};

class NixlReadsTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (std::getenv("FLEXKV_TEST_NIXL") == nullptr) {
      GTEST_SKIP() << "FLEXKV_TEST_NIXL does not say where libnixl_capi.so is";
    }
    ::signal(SIGPIPE, SIG_IGN);
    ::setenv("UCX_TLS", GetParam(), 1);
  }
  void TearDown() override { ::unsetenv("UCX_TLS"); }
};

TEST_P(NixlReadsTest, BringBlocksBetweenLanes) {
  NixlNode owner("owner");
  NixlNode reader("reader");
  std::vector<Wanted> wanted;
  for (RequestId id = 1; id <= 6; ++id) wanted.emplace_back(id, owner.lane->address());
  for (const Wanted& one : wanted) reader.lane->read(one.request);
  for (const Wanted& one : wanted) {
    EXPECT_EQ(reader.ends.wait(one.id), Outcome::kDone);
    one.expect_right();
  }
  reader.lane.reset();  // its leases end with its connection, if not before
  while (owner.lane->stats().readers > 0) std::this_thread::yield();
  EXPECT_EQ(owner.source.pins, 0U);
  EXPECT_EQ(owner.lane->stats().served.placed_blocks, wanted.size() * Wanted::kBlocks);
  EXPECT_EQ(owner.lane->stats().served.bytes, 0U);
}

// The slot is recycled while it is read, again and again. No checksum helps here.
TEST_P(NixlReadsTest, TellWhetherTheLeaseHadEnded) {
  std::vector<std::byte> none(4096);
  const auto reader = nixl_reads("reader", none);
  std::vector<std::byte> slot(kPieceBytesMax);
  const auto owner = nixl_reads("owner", slot);
  std::uint64_t held = 0;
  std::uint64_t over = 0;
  for (int round = 0; round < 400; ++round) {
    const auto fill = static_cast<std::byte>(round);
    std::ranges::fill(slot, fill);
    const std::uint32_t word = owner->words().take().value();
    const std::uint64_t generation = owner->words().generation(word);
    std::promise<Fetched> fetched;
    Piece piece;
    piece.address = owner->window()->pool;
    piece.bytes = kPieceBytesMax;
    piece.word_address = owner->window()->words + word * sizeof(std::uint64_t);
    ASSERT_TRUE(
        reader->fetch("owner", *owner->window(), piece, [&](Fetched one) { fetched.set_value(std::move(one)); }));
    for (int i = 0; i < round % 40; ++i) std::this_thread::sleep_for(std::chrono::microseconds(20));
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

TEST_P(NixlReadsTest, DoNotMixUpNodesWhenOneGivesTheMemoryOfAnother) {
  PoolSource none;
  const auto reader = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "reader", bytes_of(none)).value();
  PoolSource source;
  const auto owner = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "owner", bytes_of(source)).value();
  const auto read_from = [&](const std::string& name) {
    std::promise<bool> ok;
    const Piece piece{owner->window()->pool, 4096, owner->window()->words};
    EXPECT_TRUE(reader->fetch(name, *owner->window(), piece, [&](Fetched one) { ok.set_value(one.ok); }));
    return ok.get_future().get();
  };
  EXPECT_TRUE(read_from("owner"));
  EXPECT_FALSE(read_from("liar"));
  EXPECT_TRUE(read_from("owner"));
  EXPECT_TRUE(reader->end());
}

// What a call of NIXL's waits for that does not return.
std::promise<void>& gate() {
  static std::promise<void> opened;
  return opened;
}
std::atomic<int> hanging = 0;
std::atomic<int> called_back = 0;

TEST(NixlReads, EndThoughACallOfNixlHangs) {
  if (std::getenv("FLEXKV_TEST_NIXL") == nullptr) GTEST_SKIP() << "FLEXKV_TEST_NIXL is not set";
  ::setenv("UCX_TLS", "tcp", 1);
  auto library = net::NixlLibrary::load(std::getenv("FLEXKV_TEST_NIXL")).value();
  library.post_xfer_req = [](void*, void*, void*) {
    static const std::shared_future<void> opened = gate().get_future().share();
    ++hanging;
    opened.wait();
    --hanging;
    return -1;
  };
  static PoolSource reads_to;  // stays mapped, as end() demands
  static PoolSource source;
  auto reader = NixlReads::start(library, "reader", bytes_of(reads_to)).value();
  const auto owner = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "owner", bytes_of(source)).value();
  const Piece piece{owner->window()->pool, 4096, owner->window()->words};
  ASSERT_TRUE(reader->fetch("owner", *owner->window(), piece, [](Fetched) { ++called_back; }));
  while (hanging == 0) std::this_thread::yield();
  EXPECT_FALSE(reader->end());
  reader.reset();
  gate().set_value();
  while (hanging > 0) std::this_thread::yield();
  EXPECT_TRUE(owner->end());
  EXPECT_EQ(called_back, 0);
  ::unsetenv("UCX_TLS");
}

TEST(NixlOwnerProcess, DISABLED_Serves) { testing::serve_until_closed(NixlNode("owner")); }
constexpr const char* kOwnerProcess = "NixlOwnerProcess.DISABLED_Serves";

TEST_P(NixlReadsTest, EndReadsOfAnOwnerThatIsKilled) {
  for (int round = 0; round < 3; ++round) {
    ProcessOfAnOwner owner(kOwnerProcess);
    NixlNode reader("reader");
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
}

TEST_P(NixlReadsTest, EndReadsOfAnOwnerThatHangs) {
  ProcessOfAnOwner owner(kOwnerProcess);
  NixlNode reader("reader");
  Wanted before(1, owner.address);
  reader.lane->read(before.request);
  EXPECT_EQ(reader.ends.wait(1), Outcome::kDone);
  before.expect_right();
  EXPECT_EQ(reader.lane->stats().read.one_sided_blocks, Wanted::kBlocks);
  std::vector<Wanted> wanted;
  for (RequestId id = 2; id <= 10; ++id) wanted.emplace_back(id, owner.address, kSecond);
  for (const Wanted& one : wanted) reader.lane->read(one.request);
  owner.kill(SIGSTOP);
  for (const Wanted& one : wanted) {
    if (reader.ends.wait(one.id) == Outcome::kDone) one.expect_right();
  }
  owner.kill(SIGCONT);
  Wanted after(11, owner.address);
  reader.lane->read(after.request);
  EXPECT_EQ(reader.ends.wait(11), Outcome::kDone);
  after.expect_right();
}

INSTANTIATE_TEST_SUITE_P(Over, NixlReadsTest, ::testing::Values("tcp", "all"),
                         [](const auto& param) { return std::string(param.param); });

}  // namespace
}  // namespace flexkv::peer
