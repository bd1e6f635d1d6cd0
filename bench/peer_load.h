// What the benchmarks of reading from a peer share: two lanes of peers, and what a turn costs.
#pragma once

#include <benchmark/benchmark.h>
#include <sys/resource.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "flexkv/peer/peer_lane.h"

namespace flexkv::bench {

constexpr std::size_t kBytes = 128U << 20;  // of a turn
constexpr std::size_t kRequests = 8;        // at once
constexpr int kTurns = 15;
constexpr char kAnywhere[] = "127.0.0.1:0";

using Blocks = std::vector<std::span<std::byte>>;

inline net::TlsContext tls_context() {
  return net::TlsContext::create(net::Secret::from_text("a secret of the benchmark's own, long enough").value(),
                                 "bench")
      .value();
}

inline std::vector<std::byte> random_bytes() {
  std::vector<std::byte> bytes(kBytes);
  Prng random(1);
  for (std::size_t i = 0; i < kBytes; i += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(&bytes[i], &word, 8);
  }
  return bytes;
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
  // Null: blocks come as bytes.
  explicit Peers(const Blocks& blocks, peer::OneSided* at_owner = nullptr, peer::OneSided* at_reader = nullptr)
      : source_(blocks),
        owner_(
            peer::PeerLane::start({"owner", kAnywhere, 2 * kBytes}, tls_context(), source_, nobody_, at_owner).value()),
        reader_(peer::PeerLane::start({"reader", ""}, tls_context(), source_, sink_, at_reader).value()) {}

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
  peer::PeerStats read_stats() const { return reader_->stats(); }

 private:
  Source source_;
  Sink nobody_;
  Sink sink_;
  std::unique_ptr<peer::PeerLane> owner_;
  std::unique_ptr<peer::PeerLane> reader_;
  peer::RequestId last_ = 0;
};

inline Blocks blocks_of(std::vector<std::byte>& memory, std::size_t block_bytes) {
  Blocks blocks;
  for (std::size_t at = 0; at < memory.size(); at += block_bytes) {
    blocks.push_back(std::span(memory).subspan(at, block_bytes));
  }
  return blocks;
}

inline double cpu_seconds() {
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

inline double median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2));
  return values[values.size() / 2];
}

// Bytes per second of `one` as a part of those of `other`, turn by turn.
inline double ratio(const Costs& one, const Costs& other) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < one.seconds.size(); ++i) ratios.push_back(other.seconds[i] / one.seconds[i]);
  return median(std::move(ratios));
}

inline void show(benchmark::State& state, const std::string& name, const Costs& costs) {
  state.counters[name + "_GB/s"] = kBytes / 1e9 / median(costs.seconds);
  state.counters[name + "_cpu_s/GB"] = costs.cpu / static_cast<double>(costs.seconds.size()) / (kBytes / 1e9);
}

// Of blocks of these sizes, both ways of a read by turns.
inline void in_turns(benchmark::internal::Benchmark* read) {
  read->ArgName("KiB")->Arg(64)->Arg(256)->Arg(1024)->Arg(4096);
  read->UseManualTime()->Iterations(kTurns)->Unit(benchmark::kMillisecond);
}

}  // namespace flexkv::bench
