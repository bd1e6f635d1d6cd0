// Round trips through a real node, rank agent and client, as an engine makes them: from the order to the moment at
// which its worker knows the outcome. The node is embedded (threads of this process) or a daemon (a process of its
// own).
#include <benchmark/benchmark.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "bench/suites.h"
#include "flexkv/agent/rank_agent.h"
#include "flexkv/client/client.h"
#include "flexkv/device/host_device.h"
#include "flexkv/server/node_server.h"

namespace flexkv::bench {
namespace {

constexpr char kNodeName[] = "bench";
constexpr std::uint32_t kBlockTokens = 16;
constexpr std::size_t kHashBytes = 32;

// A device whose copies are done at once: what is left is the cost of the orders.
class NoDevice final : public device::Device {
 public:
  std::string_view name() const override { return "no device"; }
  std::uint32_t efficient_copy_bytes() const override { return 1; }
  std::uint32_t saves_per_sum() const override { return 1; }
  Status register_pool(std::byte*, std::size_t) override { return {}; }
  void unregister_pool() override {}
  Result<std::unique_ptr<device::CopyStream>> open_stream(device::Direction, const layout::BlockLayout&,
                                                          std::span<std::byte>) override {
    return std::unique_ptr<device::CopyStream>(std::make_unique<Stream>());
  }
  Result<std::unique_ptr<device::EngineEvent>> record(std::uintptr_t) override {
    return std::make_unique<device::EngineEvent>();
  }
  Status order_engine_after(std::uintptr_t, device::CopyStream&) override { return {}; }
  Result<std::shared_ptr<device::Gate>> make_gate() override {
    return Error{ErrorCode::kUnsupported, "no device has no gates"};
  }
  Status read(std::uint64_t, std::span<std::byte>) override { return {}; }
  Status write(std::uint64_t, std::span<const std::byte>) override { return {}; }

 private:
  struct Stream final : device::CopyStream {
    Status order_after(const device::EngineEvent&) override { return {}; }
    Status submit(std::span<const device::BlockCopy>, std::size_t) override { return {}; }
    Status sum(std::span<const device::BlockCopy>, std::span<std::uint64_t>) override { return {}; }
    Status synchronize() override { return {}; }
  };
};

class TemporaryDirectory {
 public:
  TemporaryDirectory() : path_((std::filesystem::temp_directory_path() / "flexkv-bench-XXXXXX").string()) {
    FLEXKV_ASSERT(::mkdtemp(path_.data()) != nullptr);
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

server::NodeServerOptions node_options(const std::string& directory, std::uint64_t pool_bytes, const char* mode) {
  server::NodeServerOptions options;
  options.node.pool_bytes = pool_bytes;
  options.huge_pages = false;
  options.runtime_dir = directory;
  options.name = kNodeName;
  options.mode = mode;
  return options;
}

// A node in a child process. It ends with this object, and with this process however that ends.
class NodeProcess {
 public:
  NodeProcess(const std::string& directory, std::uint64_t pool_bytes) {
    FLEXKV_ASSERT(::pipe(life_) == 0);
    child_ = ::fork();
    FLEXKV_ASSERT(child_ >= 0);
    if (child_ == 0) {
      ::close(life_[1]);
      auto node = server::NodeServer::start(node_options(directory, pool_bytes, "daemon"));
      char nothing;
      while (node.ok() && ::read(life_[0], &nothing, 1) < 0) {
      }
      if (node.ok()) node.value().reset();
      ::_exit(0);
    }
    ::close(life_[0]);
  }
  ~NodeProcess() {
    ::close(life_[1]);
    ::waitpid(child_, nullptr, 0);
  }
  NodeProcess(const NodeProcess&) = delete;
  NodeProcess& operator=(const NodeProcess&) = delete;

 private:
  int life_[2];
  pid_t child_ = -1;
};

// An engine of one rank with its node. Device blocks [0, blocks) are what it saves, the next `blocks` what it loads to.
class Engine {
 public:
  Engine(bool daemon, std::uint32_t blocks, std::uint32_t block_bytes, std::shared_ptr<device::Device> device,
         std::uint64_t memory_bytes)
      : process_(daemon ? std::make_unique<NodeProcess>(directory_.path(), pool_bytes_for(blocks, block_bytes))
                        : nullptr),
        memory_(memory_bytes, std::byte{1}),
        from_(blocks),
        to_(blocks) {
    if (!daemon) {
      const std::uint64_t pool_bytes = pool_bytes_for(blocks, block_bytes);
      auto started = server::NodeServer::start(node_options(directory_.path(), pool_bytes, "embedded"));
      if (!started) return;
      node_ = std::move(started).value();
    }
    layout::TensorDesc tensor;
    tensor.name = "kv";
    tensor.address = reinterpret_cast<std::uint64_t>(memory_.data());
    tensor.shape = {2 * blocks, block_bytes};
    tensor.stride = {block_bytes, 1};
    agent::RankAgentOptions options;
    options.runtime_dir = directory_.path();
    options.node_name = kNodeName;
    options.engine_id = "engine";
    agent_ = agent::RankAgent::start(options, std::move(device),
                                     layout::BlockLayout::derive({&tensor, 1}, 2 * blocks).value())
                 .value();
    proto::ClientHello hello;
    hello.engine_id = "engine";
    hello.rank_count = 1;
    hello.model = "bench";
    auto port = daemon ? client::open_remote_port(directory_.path(), kNodeName, hello)
                       : client::open_embedded_port(*node_, hello);
    if (!port) return;
    client_ = std::make_unique<client::Client>(std::move(port).value(), hello);
    for (std::uint32_t i = 0; i < blocks; ++i) from_[i] = i, to_[i] = blocks + i;
  }
  ~Engine() { client_.reset(); }

  bool ready() {
    for (int i = 0; i < 10'000 && client_; ++i) {
      if (client_->ready() && agent_->counters().attached) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  // A prompt that nobody has seen before.
  void new_prompt() {
    if (sequence_ != 0) client_->close_sequence(sequence_);
    hashes_.resize(from_.size() * kHashBytes);
    for (std::size_t at = 0; at < hashes_.size(); at += 8) {
      const std::uint64_t word = prng_.next();
      std::memcpy(hashes_.data() + at, &word, 8);
    }
    views_.clear();
    for (std::size_t at = 0; at < hashes_.size(); at += kHashBytes) {
      views_.push_back(std::span(hashes_).subspan(at, kHashBytes));
    }
    sequence_ = client_->open_sequence();
  }
  // The same prompt in a request of its own.
  void again() {
    client_->close_sequence(sequence_);
    sequence_ = client_->open_sequence();
  }

  void scatter() {
    for (std::size_t i = to_.size(); i > 1; --i) std::swap(to_[i - 1], to_[prng_.below(i)]);
  }

  void save() {
    const auto job = client_->save(sequence_, 0, views_, 0, from_);
    agent_->arm_saves({&job, 1}, 0);
    agent_->fence({&job, 1}, 10 * kSecond);
  }
  bool saved() {
    for (int i = 0; i < 10'000; ++i) {
      const auto probe = client_->open_sequence();
      const std::uint32_t kept = client_->lookup(probe, 0, views_).matched_blocks;
      client_->close_sequence(probe);
      if (kept == from_.size()) return true;
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    return false;
  }
  bool load() {
    const std::uint32_t known = client_->known_hashes(sequence_);
    const auto fresh = client::Client::Hashes(views_).subspan(known);
    if (client_->lookup(sequence_, known, fresh).matched_blocks != from_.size()) return false;
    const auto job = client_->load(sequence_, 0, to_);
    agent_->arm_loads({&job, 1}, 0);
    return agent_->wait_loads({&job, 1}).empty();
  }

 private:
  static std::uint64_t pool_bytes_for(std::uint32_t blocks, std::uint32_t block_bytes) {
    return 4ULL * blocks * std::max(block_bytes, 4096U);
  }

  const TemporaryDirectory directory_;
  // Before there is memory: a child that shared it would make the first write to each of its pages a copy.
  const std::unique_ptr<NodeProcess> process_;
  std::vector<std::byte> memory_;
  std::vector<std::uint32_t> from_;
  std::vector<std::uint32_t> to_;
  std::unique_ptr<server::NodeServer> node_;
  std::unique_ptr<agent::RankAgent> agent_;
  std::unique_ptr<client::Client> client_;
  client::SequenceId sequence_ = 0;
  Prng prng_{1};
  std::vector<std::byte> hashes_;
  std::vector<std::span<const std::byte>> views_;
};

void report(benchmark::State& state, std::vector<Nanos>& times, std::uint64_t bytes) {
  Nanos sum = 0;
  for (const Nanos time : times) sum += time;
  state.counters["p50_us"] = percentile_us(times, 0.5);
  state.counters["p99_us"] = percentile_us(times, 0.99);
  if (bytes > 0) state.counters["GB/s"] = static_cast<double>(bytes * times.size()) / static_cast<double>(sum);
}

// Blocks of 128 KiB: 16 tokens of one rank with 8 layers and 2 KV heads of 128 in bfloat16.
void bm_transfer(benchmark::State& state, bool daemon, device::Direction direction) {
  constexpr std::uint32_t kBlockBytes = 128U << 10;
  const auto blocks = static_cast<std::uint32_t>(state.range(0));
  const std::uint64_t bytes = std::uint64_t{blocks} * kBlockBytes;
  Engine engine(daemon, blocks, kBlockBytes, device::open_host_device().value(), 2 * bytes);
  if (!engine.ready()) return state.SkipWithError("the node did not start");
  // Once through the pool and the device memory, to have their pages.
  for (int i = 0; i < 6; ++i) engine.new_prompt(), engine.save();
  if (!engine.saved() || !engine.load()) return state.SkipWithError("not loaded");
  std::vector<Nanos> times;
  for (auto _ : state) {
    engine.new_prompt();
    Nanos begin = monotonic_now();
    engine.save();
    if (direction == device::Direction::kToDevice) {
      if (!engine.saved()) return state.SkipWithError("not saved");
      engine.again();
      begin = monotonic_now();
      if (!engine.load()) return state.SkipWithError("not loaded");
    }
    times.push_back(monotonic_now() - begin);
    state.SetIterationTime(static_cast<double>(times.back()) / kSecond);
  }
  report(state, times, bytes);
}

enum class Order { kFirst, kAgain, kScattered };

// No data moved: what it costs to order a load and to learn that it is done. Again: of a prompt looked up before, into
// device blocks that lie in a row; or scattered, the worst case: no two of them do.
void bm_order(benchmark::State& state, bool daemon, Order order) {
  const auto blocks = static_cast<std::uint32_t>(state.range(0) / kBlockTokens);
  Engine engine(daemon, blocks, 1, std::make_shared<NoDevice>(), 2ULL * blocks);
  if (!engine.ready()) return state.SkipWithError("the node did not start");
  engine.new_prompt();
  engine.save();
  if (!engine.saved()) return state.SkipWithError("not saved");
  if (order == Order::kScattered) engine.scatter();
  std::vector<Nanos> times;
  for (auto _ : state) {
    if (order == Order::kFirst) engine.again();
    const Nanos begin = monotonic_now();
    if (!engine.load()) return state.SkipWithError("not loaded");
    times.push_back(monotonic_now() - begin);
    state.SetIterationTime(static_cast<double>(times.back()) / kSecond);
  }
  report(state, times, 0);
}

}  // namespace

void register_round_trips() {
  for (const bool daemon : {false, true}) {
    const std::string node = daemon ? "/daemon" : "/embedded";
    for (const auto direction : {device::Direction::kToHost, device::Direction::kToDevice}) {
      const std::string name = (direction == device::Direction::kToHost ? "save" : "load") + node;
      benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) { bm_transfer(state, daemon, direction); })
          ->ArgName("blocks")
          ->Arg(1)
          ->Arg(32)
          ->Arg(1000)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->MinTime(0.2);
    }
    for (const Order order : {Order::kFirst, Order::kAgain, Order::kScattered}) {
      constexpr const char* kNames[] = {"order", "order_again", "order_scattered"};
      const std::string name = kNames[static_cast<int>(order)] + node;
      benchmark::RegisterBenchmark(name.c_str(), [=](auto& state) { bm_order(state, daemon, order); })
          ->ArgName("tokens")
          ->Arg(1'024)
          ->Arg(21'504)
          ->Arg(131'072)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->MinTime(0.2);
    }
  }
}

}  // namespace flexkv::bench
