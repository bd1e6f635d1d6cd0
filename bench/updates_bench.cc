// Changes of a node's index on their way through a real Redis into the replica of another node.
#include <benchmark/benchmark.h>

#include <atomic>
#include <random>
#include <thread>

#include "bench/suites.h"
#include "flexkv/cluster/directory_lane.h"

namespace flexkv::bench {
namespace {

constexpr cluster::SpaceId kSpace{7};
constexpr std::uint64_t kAtOnce = 4096;  // read by the lane
constexpr std::uint64_t kRound = 1'000'000;
constexpr int kRounds = 5;
constexpr std::chrono::milliseconds kLook{1};

// The index of a node that keeps `kRound` blocks: from some moment on each new one pushes an old one out.
class Index final : public cluster::ChangeSource {
 public:
  bool read(std::vector<cluster::Change>& out) override {
    const std::uint64_t wanted = wanted_;
    for (std::uint64_t i = 0; i < kAtOnce && told_ < wanted; ++i, ++told_) {
      out.push_back({cluster::Change::Kind::kAdded, 0, 0, key_of(told_)});
      if (told_ >= kRound) out.push_back({cluster::Change::Kind::kRemoved, 0, 0, key_of(told_ - kRound)});
    }
    return told_ < wanted;
  }
  void add(std::uint64_t blocks) { wanted_ += blocks; }
  key::BlockKey newest() const { return key_of(wanted_ - 1); }

 private:
  static key::BlockKey key_of(std::uint64_t number) { return {Prng::mix(number), Prng::mix(~number)}; }

  std::atomic<std::uint64_t> wanted_ = 0;
  std::uint64_t told_ = 0;  // the lane's
};

class Node {
 public:
  Node(const meta::RedisOptions& redis, const std::string& cluster, const std::string& name) {
    cluster::DirectoryLaneOptions options;
    options.redis = redis;
    options.directory.cluster = cluster;
    options.directory.name = name;
    options.directory.incarnation = std::random_device()() + 1ULL;
    lane_ = cluster::DirectoryLane::start(
                options, index_, [](cluster::Epoch) {}, [](auto) {})
                .value();
    FLEXKV_ASSERT(lane_->add_space(kSpace) == 0U);
  }
  ~Node() { lane_->stop(kSecond); }

  void add(std::uint64_t blocks) {
    index_.add(blocks);
    lane_->wake();
  }
  key::BlockKey newest() const { return index_.newest(); }
  bool finds(const key::BlockKey& key) const {
    std::vector<cluster::Replica::Holding> found;
    lane_->replica().lookup(0, {&key, 1}, monotonic_now(), found);
    return !found.empty();
  }
  cluster::DirectoryStats stats() const { return lane_->status().directory; }

 private:
  Index index_;
  std::unique_ptr<cluster::DirectoryLane> lane_;
};

void bm_updates(benchmark::State& state, const meta::RedisOptions& redis, std::uint64_t blocks) {
  const std::string cluster = "bench-" + std::to_string(std::random_device()());
  Node teller(redis, cluster, "teller");
  Node follower(redis, cluster, "follower");
  const auto until_followed = [&](std::uint64_t more) {
    teller.add(more);
    const key::BlockKey newest = teller.newest();
    while (!follower.finds(newest)) std::this_thread::sleep_for(kLook);
  };
  until_followed(kRound);
  const cluster::DirectoryStats before = teller.stats();
  for (auto _ : state) until_followed(blocks);
  const double changes = 2.0 * static_cast<double>(blocks) * static_cast<double>(state.iterations());
  const cluster::DirectoryStats after = teller.stats();
  const std::uint64_t bytes = after.stream_bytes + after.snapshot_bytes - before.stream_bytes - before.snapshot_bytes;
  state.counters["changes/s"] = benchmark::Counter(changes, benchmark::Counter::kIsRate);
  state.counters["bytes/change"] = static_cast<double>(bytes) / changes;
}

}  // namespace

Status register_updates(const std::string& redis, const Options&) {
  meta::RedisOptions options;
  options.host = redis;
  const std::size_t colon = redis.rfind(':');
  if (colon != std::string::npos) {
    options.host = redis.substr(0, colon);
    options.port = std::atoi(redis.c_str() + colon + 1);
  }
  const auto add = [&](const char* name, std::uint64_t blocks, int rounds) {
    benchmark::RegisterBenchmark(name, bm_updates, options, blocks)
        ->UseRealTime()
        ->Iterations(rounds)
        ->Unit(benchmark::kMillisecond);
  };
  add("one_block", 1, 10 * kRounds);
  add("million_blocks", kRound, kRounds);
  return {};
}

}  // namespace flexkv::bench
