// What a node reads from another one over 127.0.0.1, beside the same bytes over connections without FlexKV: TLS with
// the same cipher, and TCP. The three take turns, so that what else the machine does hits them alike; each is two
// threads.
#include <benchmark/benchmark.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "bench/peer_load.h"
#include "bench/suites.h"
#include "flexkv/net/tcp.h"

namespace flexkv::bench {
namespace {

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

void bm_read(benchmark::State& state) {
  const auto block_bytes = static_cast<std::size_t>(state.range(0)) << 10;
  std::vector<std::byte> source = random_bytes();
  std::vector<std::byte> target(kBytes);
  const Blocks from = blocks_of(source, block_bytes);
  const Blocks to = blocks_of(target, block_bytes);
  const auto context = tls_context();
  Ends plain = connect();
  TcpEnd tcp_sender(std::move(plain.sender));
  TcpEnd tcp_receiver(std::move(plain.receiver));
  Ends secured = connect();
  TlsEnd tls_sender(context, std::move(secured.sender), net::TlsStream::Role::kClient);
  TlsEnd tls_receiver(context, std::move(secured.receiver), net::TlsStream::Role::kServer);
  std::thread shaking([&] { tls_sender.handshake(); });
  tls_receiver.handshake();
  shaking.join();
  Peers peers(from);
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
  show(state, "peer", peer);
  show(state, "tls", tls);
  show(state, "tcp", tcp);
  state.counters["peer/tls"] = ratio(peer, tls);
  state.counters["peer/tcp"] = ratio(peer, tcp);
}

}  // namespace

Status register_peers(const Options& options) {
  benchmark::RegisterBenchmark("read", bm_read)->Apply(in_turns);
  return options.has("nixl") ? register_peers_through_nixl(options.text("nixl", "")) : Status{};
}

}  // namespace flexkv::bench
