// Real lanes and TCP over loopback.
#include "flexkv/peer/peer_lane.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "flexkv/net/tcp.h"
#include "flexkv/peer/test_source.h"

namespace flexkv::peer {
namespace {

using testing::bytes_of;
using testing::TestSource;

net::TlsContext context(char letter = 's') {
  return net::TlsContext::create(net::Secret::from_text(std::string(net::Secret::kMinBytes, letter)).value(), "test")
      .value();
}

// Collects what becomes of reads. Thread-safe.
class Sink final : public ReadSink {
 public:
  void on_block(RequestId id, std::uint32_t) override {
    const std::lock_guard lock(mutex_);
    ++blocks_[id];
  }
  void on_end(RequestId id, Outcome outcome) override {
    const std::lock_guard lock(mutex_);
    EXPECT_TRUE(ends_.emplace(id, outcome).second);
    changed_.notify_all();
  }
  Outcome wait(RequestId id) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ends_.contains(id); });
    return ends_.at(id);
  }
  std::uint32_t blocks(RequestId id) {
    const std::lock_guard lock(mutex_);
    return blocks_[id];
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<RequestId, Outcome> ends_;
  std::map<RequestId, std::uint32_t> blocks_;
};

struct Node {
  Node(const std::string& name, char letter = 's', const std::string& listen = "127.0.0.1:0") {
    lane = PeerLane::start({name, listen, 64U << 20, 16}, context(letter), source, sink).value();
  }
  TestSource source{1000};
  Sink sink;
  std::unique_ptr<PeerLane> lane;
};

// This process gets so many more, as long as this lives.
class NoMoreDescriptors {
 public:
  explicit NoMoreDescriptors(rlim_t more) {
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &before_), 0);
    const Fd next(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    rlimit fewer = before_;
    fewer.rlim_cur = static_cast<rlim_t>(next.get()) + more;
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &fewer), 0);
  }
  ~NoMoreDescriptors() { EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before_), 0); }

 private:
  rlimit before_{};
};

struct Buffers {
  Buffers(std::size_t blocks, std::uint64_t slot_bytes) : bytes(blocks, std::vector<std::byte>(slot_bytes)) {}
  std::vector<std::vector<std::byte>> bytes;
};

ReadRequest request_of(RequestId id, const std::string& node, const std::string& address, Buffers& buffers,
                       Nanos timeout = 60 * kSecond) {
  ReadRequest request;
  request.id = id;
  request.node = node;
  request.address = address;
  request.slot_bytes = buffers.bytes.front().size();
  for (std::size_t i = 0; i < buffers.bytes.size(); ++i) request.keys.push_back({id, i});
  for (auto& buffer : buffers.bytes) request.buffers.emplace_back(buffer);
  request.deadline = monotonic_now() + timeout;
  return request;
}

void expect_right(const Buffers& buffers, RequestId id) {
  for (std::size_t i = 0; i < buffers.bytes.size(); ++i) {
    EXPECT_EQ(buffers.bytes[i], bytes_of({id, i}, buffers.bytes[i].size())) << i;
  }
}

TEST(PeerLane, ReadsFromPeersAndServesThemAtTheSameTime) {
  Node a("a");
  Node b("b");
  constexpr RequestId kReads = 20;
  std::vector<Buffers> from_a(kReads, Buffers(3, 700'001));
  std::vector<Buffers> from_b(kReads, Buffers(2, 4096));
  for (RequestId i = 0; i < kReads; ++i) {
    b.lane->read(request_of(i + 1, "a", a.lane->address(), from_a[i]));
    a.lane->read(request_of(i + 1, "b", b.lane->address(), from_b[i]));
  }
  for (RequestId i = 0; i < kReads; ++i) {
    EXPECT_EQ(b.sink.wait(i + 1), Outcome::kDone);
    EXPECT_EQ(a.sink.wait(i + 1), Outcome::kDone);
    expect_right(from_a[i], i + 1);
    expect_right(from_b[i], i + 1);
  }
  EXPECT_EQ(a.source.pins(), 0U);
}

// What belongs to the first request of a number must not meet a second one.
TEST(PeerLane, GivesNothingForANumberThatIsNotAboveThoseBefore) {
  Node owner("owner");
  Node reader("reader");
  Buffers buffers(1, 100);
  reader.lane->read(request_of(7, "owner", owner.lane->address(), buffers));
  EXPECT_EQ(reader.sink.wait(7), Outcome::kDone);
  reader.lane->read(request_of(6, "owner", owner.lane->address(), buffers));
  EXPECT_EQ(reader.sink.wait(6), Outcome::kUnreachable);
}

TEST(PeerLane, WithoutDescriptorsTriesToAcceptPeersNowAndThenOnly) {
  Node owner("owner");
  Node reader("reader");
  const Nanos begun = monotonic_now();
  {
    const NoMoreDescriptors none(1);
    const Fd waiting = net::connect_tcp(owner.lane->address()).value();
    while (owner.lane->stats().accepts_failed < 2) std::this_thread::yield();
  }
  // A loop would have tried some thousand times.
  const auto pauses = static_cast<std::uint64_t>((monotonic_now() - begun) / kAcceptPause);
  EXPECT_LE(owner.lane->stats().accepts_failed, pauses + 1);
  Buffers buffers(2, 4096);
  reader.lane->read(request_of(1, "owner", owner.lane->address(), buffers));
  EXPECT_EQ(reader.sink.wait(1), Outcome::kDone);
}

TEST(PeerLane, EndsReadsOfWhomItCannotReachOrTrust) {
  Node reader("reader");
  Node stranger("stranger", 'x');
  std::string nobody;
  {
    const Fd listener = net::listen_tcp("127.0.0.1:0").value();
    nobody = net::local_address(listener).value();
  }
  Buffers buffers(1, 100);
  reader.lane->read(request_of(1, "nobody", nobody, buffers));
  EXPECT_EQ(reader.sink.wait(1), Outcome::kUnreachable);
  reader.lane->read(request_of(2, "stranger", stranger.lane->address(), buffers));
  EXPECT_EQ(reader.sink.wait(2), Outcome::kUnreachable);
  Node other("other");
  reader.lane->read(request_of(3, "expected", other.lane->address(), buffers));
  EXPECT_EQ(reader.sink.wait(3), Outcome::kUnreachable);
  reader.lane->read(request_of(4, "named", "not-a-number:1", buffers));
  EXPECT_EQ(reader.sink.wait(4), Outcome::kUnreachable);
  // Told a moment after the reads themselves.
  while (reader.lane->stats().read.ended[static_cast<std::size_t>(Outcome::kUnreachable)] < 4)
    std::this_thread::yield();
}

// Somebody listens and never says a word.
TEST(PeerLane, EndsReadsAtTheirDeadline) {
  Node reader("reader");
  const Fd listener = net::listen_tcp("127.0.0.1:0").value();
  Buffers buffers(1, 100);
  reader.lane->read(request_of(1, "silent", net::local_address(listener).value(), buffers, 50 * kMillisecond));
  EXPECT_EQ(reader.sink.wait(1), Outcome::kDeadline);
}

TEST(PeerLane, CancelsAndGivesPinsBack) {
  Node owner("owner");
  Node reader("reader");
  owner.source.set_late(true);
  Buffers buffers(4, 1U << 20);
  reader.lane->read(request_of(1, "owner", owner.lane->address(), buffers));
  while (owner.source.waiting() == 0) std::this_thread::yield();
  reader.lane->cancel(1);
  EXPECT_EQ(reader.sink.wait(1), Outcome::kCanceled);
  reader.lane->cancel(1);  // once more, and of one that never was
  reader.lane->cancel(99);
  owner.source.answer_all();
  while (owner.source.pins() > 0) std::this_thread::yield();
}

TEST(PeerLane, EndsItsReadsAndPinsWithItself) {
  TestSource source(1000);
  Buffers buffers(4, 1U << 20);
  Node reader("reader");
  {
    Node owner("owner");
    owner.source.set_late(true);
    reader.lane->read(request_of(1, "owner", owner.lane->address(), buffers));
    reader.lane->read(request_of(2, "owner", owner.lane->address(), buffers));
    while (owner.source.waiting() < 2) std::this_thread::yield();
    owner.lane.reset();  // its source answers only now
    owner.source.answer_all();
    EXPECT_EQ(owner.source.pins(), 0U);
  }
  EXPECT_EQ(reader.sink.wait(1), Outcome::kUnreachable);
  EXPECT_EQ(reader.sink.wait(2), Outcome::kUnreachable);
  Node owner("owner");
  owner.source.set_late(true);
  reader.lane->read(request_of(3, "owner", owner.lane->address(), buffers));
  while (owner.source.waiting() == 0) std::this_thread::yield();
  reader.lane.reset();
  EXPECT_EQ(reader.sink.wait(3), Outcome::kUnreachable);
  owner.source.answer_all();
  while (owner.source.pins() > 0) std::this_thread::yield();
}

TEST(PeerLane, ComesBackToAnOwnerThatRestarts) {
  Node reader("reader");
  Buffers buffers(1, 100);
  auto owner = std::make_unique<Node>("owner");
  const std::string address = owner->lane->address();
  reader.lane->read(request_of(1, "owner", address, buffers));
  EXPECT_EQ(reader.sink.wait(1), Outcome::kDone);
  owner.reset();
  owner = std::make_unique<Node>("owner", 's', address);
  RequestId id = 2;
  for (Outcome outcome = Outcome::kUnreachable; outcome != Outcome::kDone; ++id) {
    reader.lane->read(request_of(id, "owner", address, buffers));
    outcome = reader.sink.wait(id);
  }
  expect_right(buffers, id - 1);
}

}  // namespace
}  // namespace flexkv::peer
