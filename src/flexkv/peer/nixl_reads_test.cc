// The real NIXL between lanes and between processes; where it is not installed, these tests say so.
// FLEXKV_TEST_NIXL: path of libnixl_capi.so.
#include "flexkv/peer/nixl_reads.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <future>
#include <thread>

#include "flexkv/base/fd.h"
#include "flexkv/peer/peer_lane.h"
#include "flexkv/peer/test_exchange.h"

namespace flexkv::peer {
namespace {

using testing::bytes_of;

constexpr std::uint64_t kSlots = 16;
constexpr std::uint64_t kSlotBytes = 5U << 20;  // three pieces

// Block n of every chain lies in slot n.
class PoolSource final : public BlockSource {
 public:
  PoolSource() : pool(kSlots * kSlotBytes) {
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
      std::ranges::copy(bytes_of({9, slot}, kSlotBytes), at(slot).begin());
    }
  }
  void pin(const SpaceName&, std::uint64_t, std::span<const key::BlockKey> keys, std::uint32_t first, Nanos,
           std::function<void(Pinned)> done) override {
    Pinned pinned;
    pinned.pin = ++pins;
    for (const auto& key : keys.subspan(first)) pinned.blocks.emplace_back(at(key.low));
    done(std::move(pinned));
  }
  void unpin(std::uint64_t) override { --pins; }
  void on_damaged(std::uint64_t, std::uint32_t) override { FAIL(); }
  std::span<std::byte> at(std::uint64_t slot) { return std::span(pool).subspan(slot * kSlotBytes, kSlotBytes); }

  std::vector<std::byte> pool;
  std::atomic<std::uint64_t> pins = 0;
};

class Ends final : public ReadSink {
 public:
  void on_block(RequestId, std::uint32_t) override {}
  void on_end(RequestId id, Outcome outcome) override {
    const std::lock_guard lock(mutex_);
    ends_[id].set_value(outcome);
  }
  Outcome wait(RequestId id) {
    std::unique_lock lock(mutex_);
    auto end = ends_[id].get_future();
    lock.unlock();
    return end.get();
  }

 private:
  std::mutex mutex_;
  std::map<RequestId, std::promise<Outcome>> ends_;
};

struct Node {
  explicit Node(const std::string& name) {
    reads = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), name, source.pool).value();
    lane = PeerLane::start({name, "127.0.0.1:0", 1U << 30, 16}, testing::context(), source, ends, reads.get()).value();
  }
  PoolSource source;
  Ends ends;
  std::unique_ptr<NixlReads> reads;
  std::unique_ptr<PeerLane> lane;
};

struct Wanted {
  Wanted(RequestId number, const std::string& address, Nanos timeout = 60 * kSecond) : id(number) {
    request.id = id;
    request.node = "owner";
    request.address = address;
    request.slot_bytes = kSlotBytes;
    for (std::uint64_t i = 0; i < kBlocks; ++i) {
      request.keys.push_back({9, (id + i) % kSlots});
      buffers.emplace_back(kSlotBytes);
    }
    for (auto& buffer : buffers) request.buffers.emplace_back(buffer);
    request.deadline = monotonic_now() + timeout;
  }
  void expect_right() const {
    for (std::uint64_t i = 0; i < kBlocks; ++i) {
      EXPECT_TRUE(buffers[i] == bytes_of({9, (id + i) % kSlots}, kSlotBytes)) << id << ", block " << i;
    }
  }
  static constexpr std::uint64_t kBlocks = 4;
  const RequestId id;
  ReadRequest request;
  std::vector<std::vector<std::byte>> buffers;
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
  Node owner("owner");
  Node reader("reader");
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
  PoolSource none;
  const auto reader = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "reader", none.pool).value();
  std::vector<std::byte> slot(kPieceBytesMax);
  const auto owner = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "owner", slot).value();
  std::uint64_t held = 0;
  std::uint64_t over = 0;
  for (int round = 0; round < 400; ++round) {
    const auto fill = static_cast<std::byte>(round);
    std::ranges::fill(slot, fill);
    const std::uint32_t word = owner->words().take().value();
    const std::uint64_t generation = owner->words().generation(word);
    std::promise<Fetched> fetched;
    Piece piece;
    piece.address = owner->window().pool;
    piece.bytes = kPieceBytesMax;
    piece.word_address = owner->window().words + word * sizeof(std::uint64_t);
    ASSERT_TRUE(
        reader->fetch("owner", owner->window(), piece, [&](Fetched one) { fetched.set_value(std::move(one)); }));
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
  const auto reader = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "reader", none.pool).value();
  PoolSource source;
  const auto owner = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "owner", source.pool).value();
  const auto read_from = [&](const std::string& name) {
    std::promise<bool> ok;
    const Piece piece{owner->window().pool, 4096, owner->window().words};
    EXPECT_TRUE(reader->fetch(name, owner->window(), piece, [&](Fetched one) { ok.set_value(one.ok); }));
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
  auto reader = NixlReads::start(library, "reader", reads_to.pool).value();
  const auto owner = NixlReads::start(std::getenv("FLEXKV_TEST_NIXL"), "owner", source.pool).value();
  const Piece piece{owner->window().pool, 4096, owner->window().words};
  ASSERT_TRUE(reader->fetch("owner", owner->window(), piece, [](Fetched) { ++called_back; }));
  while (hanging == 0) std::this_thread::yield();
  EXPECT_FALSE(reader->end());
  reader.reset();
  gate().set_value();
  while (hanging > 0) std::this_thread::yield();
  EXPECT_TRUE(owner->end());
  EXPECT_EQ(called_back, 0);
  ::unsetenv("UCX_TLS");
}

// A node in a process of its own, until its standard input ends.
TEST(OwnerProcess, DISABLED_Serves) {
  Node owner("owner");
  const std::string line = owner.lane->address() + '\n';
  ASSERT_EQ(::write(STDOUT_FILENO, line.data(), line.size()), static_cast<ssize_t>(line.size()));
  char byte = 0;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
}

class ProcessOfAnOwner {
 public:
  ProcessOfAnOwner() {
    int in[2];
    int out[2];
    FLEXKV_ASSERT(::pipe2(in, O_CLOEXEC) == 0 && ::pipe2(out, O_CLOEXEC) == 0);
    process_ = ::fork();
    if (process_ == 0) {
      ::dup2(in[0], STDIN_FILENO);
      ::dup2(out[1], STDOUT_FILENO);
      ::execl("/proc/self/exe", "peer_test", "--gtest_filter=OwnerProcess.DISABLED_Serves",
              "--gtest_also_run_disabled_tests", "--gtest_brief=1", nullptr);
      ::_exit(127);
    }
    ::close(in[0]);
    ::close(out[1]);
    input_ = Fd(in[1]);
    output_ = Fd(out[0]);
    std::string line;
    for (char byte = 0; ::read(output_.get(), &byte, 1) == 1;) {
      if (byte != '\n') {
        line += byte;
      } else if (line.starts_with("127.0.0.1:")) {
        address = line;
        return;
      } else {
        line.clear();
      }
    }
    ADD_FAILURE() << "the owner's process did not start";
  }
  ~ProcessOfAnOwner() {
    kill(SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }
  void kill(int signal) const { ::kill(process_, signal); }

  std::string address;

 private:
  pid_t process_ = -1;
  Fd input_;
  Fd output_;
};

TEST_P(NixlReadsTest, EndReadsOfAnOwnerThatIsKilled) {
  for (int round = 0; round < 3; ++round) {
    ProcessOfAnOwner owner;
    Node reader("reader");
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
  ProcessOfAnOwner owner;
  Node reader("reader");
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
