// What a node reads from another one over 127.0.0.1, beside the same bytes over connections without FlexKV: TLS with
// the same cipher, and TCP. The three take turns, so that what else the machine does hits them alike; each is two
// threads.
#include <benchmark/benchmark.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "bench/suites.h"
#include "flexkv/net/tcp.h"
#include "flexkv/peer/peer_lane.h"

namespace flexkv::bench {
namespace {

constexpr std::size_t kBytes = 128U << 20;  // of a turn
constexpr std::size_t kRequests = 8;        // at once
constexpr int kTurns = 15;
constexpr char kAnywhere[] = "127.0.0.1:0";

using Blocks = std::vector<std::span<std::byte>>;

void wait_for(int fd, short events) {
  pollfd one{fd, events, 0};
  FLEXKV_ASSERT(::poll(&one, 1, -1) == 1);
}

struct Ends {
  Fd sender;
  Fd receiver;
};

Ends connect() {
  const Fd listener = net::listen_tcp(kAnywhere).value();
  Ends ends;
  ends.sender = net::connect_tcp(net::local_address(listener).value()).value();
  wait_for(listener.get(), POLLIN);
  ends.receiver = net::accept_tcp(listener).value();
  wait_for(ends.sender.get(), POLLOUT);
  return ends;
}

class TcpEnd {
 public:
  explicit TcpEnd(Fd fd) : fd_(std::move(fd)) {}
  std::size_t write(std::span<const std::byte> bytes) const {
    return moved(::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), POLLOUT);
  }
  std::size_t read(std::span<std::byte> bytes) const {
    return moved(::recv(fd_.get(), bytes.data(), bytes.size(), 0), POLLIN);
  }

 private:
  std::size_t moved(ssize_t bytes, short events) const {
    if (bytes > 0) return static_cast<std::size_t>(bytes);
    FLEXKV_ASSERT(bytes < 0 && errno == EAGAIN);
    wait_for(fd_.get(), events);
    return 0;
  }
  Fd fd_;
};

class TlsEnd {
 public:
  TlsEnd(const net::TlsContext& context, Fd fd, net::TlsStream::Role role)
      : stream_(net::TlsStream::create(context, std::move(fd), role, "the other end").value()) {}
  void handshake() {
    using Step = net::TlsStream::Step;
    for (Step step = stream_.handshake(); step != Step::kDone; step = stream_.handshake()) wait(step);
  }
  std::size_t write(std::span<const std::byte> bytes) { return moved(stream_.write(bytes)); }
  std::size_t read(std::span<std::byte> bytes) { return moved(stream_.read(bytes)); }

 private:
  std::size_t moved(net::TlsStream::Progress progress) {
    if (progress.step == net::TlsStream::Step::kDone) return progress.bytes;
    wait(progress.step);
    return 0;
  }
  void wait(net::TlsStream::Step step) {
    const bool read = step == net::TlsStream::Step::kWantRead;
    FLEXKV_ASSERT(read || step == net::TlsStream::Step::kWantWrite);
    wait_for(stream_.fd(), read ? POLLIN : POLLOUT);
  }
  net::TlsStream stream_;
};

template <typename End>
void copy_blocks(End& sender, End& receiver, const Blocks& from, const Blocks& to) {
  std::thread sending([&] {
    for (std::span<const std::byte> left : from) {
      while (!left.empty()) left = left.subspan(sender.write(left));
    }
  });
  for (std::span<std::byte> left : to) {
    while (!left.empty()) left = left.subspan(receiver.read(left));
  }
  sending.join();
}

// Block n has the key with n as its `low`, and one sum over all of it, as a block that a device has saved.
class Source final : public peer::BlockSource {
 public:
  explicit Source(const Blocks& blocks) : blocks_(blocks) {
    for (const auto block : blocks) sums_.push_back({{0, block.size(), block_sum(block)}});
  }
  void pin(const peer::SpaceName&, std::uint64_t, std::span<const key::BlockKey> keys, std::uint32_t first, Nanos,
           std::function<void(peer::Pinned)> done) override {
    peer::Pinned pinned;
    pinned.pin = 1;
    for (const key::BlockKey& key : keys.subspan(first)) {
      pinned.blocks.emplace_back(blocks_[key.low]);
      pinned.sums.push_back(sums_[key.low]);
    }
    done(std::move(pinned));
  }
  void unpin(std::uint64_t) override {}
  void on_damaged(std::uint64_t, std::uint32_t) override { FLEXKV_ASSERT(false); }

 private:
  const Blocks& blocks_;
  std::vector<std::vector<SummedExtent>> sums_;
};

class Sink final : public peer::ReadSink {
 public:
  void on_block(peer::RequestId, std::uint32_t) override {}
  void on_end(peer::RequestId, peer::Outcome outcome) override {
    FLEXKV_ASSERT(outcome == peer::Outcome::kDone);
    const std::lock_guard lock(mutex_);
    ++ended_;
    changed_.notify_all();
  }
  void wait(std::size_t ends) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_ == ends; });
    ended_ = 0;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t ended_ = 0;
};

class Peers {
 public:
  Peers(const net::TlsContext& tls, const Blocks& blocks)
      : source_(blocks),
        owner_(peer::PeerLane::start({"owner", kAnywhere, 2 * kBytes}, tls, source_, nobody_).value()),
        reader_(peer::PeerLane::start({"reader", ""}, tls, source_, sink_).value()) {}

  void read(const Blocks& to) {
    const std::size_t each = to.size() / kRequests;
    for (std::size_t r = 0; r < kRequests; ++r) {
      peer::ReadRequest request;
      request.id = ++last_;
      request.node = "owner";
      request.address = owner_->address();
      request.slot_bytes = to[0].size();
      for (std::size_t i = r * each; i < (r + 1) * each; ++i) {
        request.keys.push_back({1, i});
        request.buffers.push_back(to[i]);
      }
      request.deadline = monotonic_now() + 600 * kSecond;
      reader_->read(std::move(request));
    }
    sink_.wait(kRequests);
  }

 private:
  Source source_;
  Sink nobody_;
  Sink sink_;
  std::unique_ptr<peer::PeerLane> owner_;
  std::unique_ptr<peer::PeerLane> reader_;
  peer::RequestId last_ = 0;
};

Blocks blocks_of(std::vector<std::byte>& memory, std::size_t block_bytes) {
  Blocks blocks;
  for (std::size_t at = 0; at < memory.size(); at += block_bytes) {
    blocks.push_back(std::span(memory).subspan(at, block_bytes));
  }
  return blocks;
}

double cpu_seconds() {
  rusage used{};
  ::getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

struct Costs {
  std::vector<double> seconds;  // of each turn
  double cpu = 0;

  template <typename Body>
  void take(Body body) {
    const double cpu_before = cpu_seconds();
    const Nanos begun = monotonic_now();
    body();
    seconds.push_back(static_cast<double>(monotonic_now() - begun) / kSecond);
    cpu += cpu_seconds() - cpu_before;
  }
};

double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

// Bytes per second of `one` as a part of those of `other`, turn by turn.
double ratio(const Costs& one, const Costs& other) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < one.seconds.size(); ++i) ratios.push_back(other.seconds[i] / one.seconds[i]);
  return median(std::move(ratios));
}

void bm_read(benchmark::State& state) {
  const auto block_bytes = static_cast<std::size_t>(state.range(0)) << 10;
  std::vector<std::byte> source(kBytes);
  std::vector<std::byte> target(kBytes);
  Prng random(1);
  for (std::size_t i = 0; i < kBytes; i += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(&source[i], &word, 8);
  }
  const Blocks from = blocks_of(source, block_bytes);
  const Blocks to = blocks_of(target, block_bytes);
  const auto context =
      net::TlsContext::create(net::Secret::from_text("a secret of the benchmark's own, long enough").value(), "bench")
          .value();
  Ends plain = connect();
  TcpEnd tcp_sender(std::move(plain.sender));
  TcpEnd tcp_receiver(std::move(plain.receiver));
  Ends secured = connect();
  TlsEnd tls_sender(context, std::move(secured.sender), net::TlsStream::Role::kClient);
  TlsEnd tls_receiver(context, std::move(secured.receiver), net::TlsStream::Role::kServer);
  std::thread shaking([&] { tls_sender.handshake(); });
  tls_receiver.handshake();
  shaking.join();
  Peers peers(context, from);
  peers.read(to);
  const auto check = [&] {
    if (std::memcmp(source.data(), target.data(), kBytes) != 0) state.SkipWithError("wrong bytes");
    std::ranges::fill(target, std::byte{0});
  };

  Costs peer;
  Costs tls;
  Costs tcp;
  for (auto _ : state) {
    peer.take([&] { peers.read(to); });
    check();
    tls.take([&] { copy_blocks(tls_sender, tls_receiver, from, to); });
    check();
    tcp.take([&] { copy_blocks(tcp_sender, tcp_receiver, from, to); });
    check();
    state.SetIterationTime(peer.seconds.back());
  }
  const auto show = [&](const std::string& name, const Costs& costs) {
    state.counters[name + "_GB/s"] = kBytes / 1e9 / median(costs.seconds);
    state.counters[name + "_cpu_s/GB"] = costs.cpu / static_cast<double>(costs.seconds.size()) / (kBytes / 1e9);
  };
  show("peer", peer);
  show("tls", tls);
  show("tcp", tcp);
  state.counters["peer/tls"] = ratio(peer, tls);
  state.counters["peer/tcp"] = ratio(peer, tcp);
}

}  // namespace

void register_peers() {
  benchmark::RegisterBenchmark("read", bm_read)
      ->ArgName("KiB")
      ->Arg(64)
      ->Arg(256)
      ->Arg(1024)
      ->Arg(4096)
      ->UseManualTime()
      ->Iterations(kTurns)
      ->Unit(benchmark::kMillisecond);
}

}  // namespace flexkv::bench
