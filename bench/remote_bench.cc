// The remote tier over a real store, from the request to its last block (checked), beside a plain client that moves the
// same objects in the same run: threads that read and write files, or the program curl. Objects of a bucket are left
// there.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <random>
#include <thread>

#include "bench/suites.h"
#include "flexkv/base/fd.h"
#include "flexkv/remote/location.h"
#include "flexkv/remote/object.h"
#include "flexkv/remote/remote_tier.h"

namespace flexkv::bench {
namespace {

constexpr std::size_t kSlotBytes = 1 << 20;
constexpr std::size_t kBlocks = 128;
constexpr std::size_t kObjectBlocks = 7;  // as many as the tier puts into 8 MiB
constexpr std::size_t kBytes = kBlocks * kSlotBytes;
constexpr unsigned kFileThreads = 8;  // as the tier has
constexpr int kIterations = 7;

class Sink final : public remote::RemoteSink {
 public:
  void on_block(remote::RequestId, std::uint32_t) override {}
  void on_end(remote::RequestId, remote::Outcome outcome) override { end(outcome); }
  void on_written(remote::RequestId, remote::Outcome outcome) override { end(outcome); }
  remote::Outcome wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return outcome_.has_value(); });
    return *std::exchange(outcome_, {});
  }

 private:
  void end(remote::Outcome outcome) {
    const std::lock_guard lock(mutex_);
    outcome_ = outcome;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<remote::Outcome> outcome_;
};

// One chain of blocks that exists nowhere yet.
class Bench {
 public:
  Bench(std::unique_ptr<remote::Store> store, remote::Location location, remote::S3Options s3)
      : location_(std::move(location)), s3_(std::move(s3)), memory_(kBytes, std::byte{1}) {
    std::random_device random;
    for (auto& byte : space_) byte = static_cast<std::uint8_t>(random());
    for (std::size_t i = 0; i < kBlocks; ++i) {
      keys_.push_back({i + 1, Prng::mix(i)});
      buffers_.push_back(std::span(memory_).subspan(i * kSlotBytes, kSlotBytes));
    }
    tier_ = std::make_unique<remote::RemoteTier>(remote::TierOptions{}, std::move(store), sink_);
    next_space();
  }
  ~Bench() {
    if (location_.kind != remote::Location::Kind::kFile) return;
    for (const std::string& folder : folders_) std::filesystem::remove_all(location_.path + '/' + folder);
  }

  // Of which the store has nothing.
  void next_space() {
    tier_->close_space(space_);
    ++space_[0];
    tier_->open_space(space_, kSlotBytes);
    folders_.push_back(remote::ObjectCodec(space_, kSlotBytes).folder());
  }
  bool write() {
    remote::WriteRequest request{++id_, space_, kSlotBytes, {}, {}, monotonic_now() + 600 * kSecond};
    for (std::size_t i = 0; i < kBlocks; ++i) {
      request.blocks.push_back({keys_[i], i == 0 ? remote::kNoParent : keys_[i - 1]});
    }
    request.buffers.assign(buffers_.begin(), buffers_.end());
    return tier_->write(std::move(request)) && sink_.wait() == remote::Outcome::kDone;
  }
  bool read() {
    remote::ReadRequest request{++id_, space_, kSlotBytes, keys_, buffers_, monotonic_now() + 600 * kSecond};
    return tier_->read(std::move(request)) && sink_.wait() == remote::Outcome::kDone;
  }

  // The objects of the present space, moved by others.
  bool plain(bool write) {
    const remote::ObjectCodec codec(space_, kSlotBytes);
    std::vector<std::string> paths;
    for (std::size_t i = 0; i < kBlocks; i += kObjectBlocks) {
      const std::size_t count = std::min(kObjectBlocks, kBlocks - i);
      const remote::Chain chain{i == 0 ? remote::kNoParent : keys_[i - 1], {&keys_[i], &keys_[i] + count}};
      paths.push_back(codec.path_of(codec.name_of(chain)));
    }
    return location_.kind == remote::Location::Kind::kFile ? plain_files(paths, write) : plain_curl(paths, write);
  }

 private:
  bool plain_files(const std::vector<std::string>& paths, bool write) {
    std::atomic<std::size_t> next = 0;
    std::atomic<std::size_t> bytes = 0;
    const auto move = [&] {
      for (std::size_t i = next++; i < paths.size(); i = next++) {
        const std::string path = location_.path + '/' + paths[i] + (write ? ".plain" : "");
        const Fd fd(::open(path.c_str(), write ? O_WRONLY | O_CREAT | O_TRUNC : O_RDONLY, 0666));
        const auto part = std::span(memory_).subspan(i * kObjectBlocks * kSlotBytes);
        const std::size_t size = std::min(part.size(), kObjectBlocks * kSlotBytes);
        const ssize_t moved = write ? ::write(fd.get(), part.data(), size) : ::read(fd.get(), part.data(), size);
        if (moved > 0) bytes += static_cast<std::size_t>(moved);
      }
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < kFileThreads; ++i) threads.emplace_back(move);
    for (std::thread& thread : threads) thread.join();
    return bytes == kBytes;
  }

  // Through its configuration on standard input, so that no secret is seen among the processes.
  bool plain_curl(const std::vector<std::string>& paths, bool write) {
    const std::string source = (std::filesystem::temp_directory_path() / "flexkv-bench-object").string();
    if (write) {
      const Fd fd(::open(source.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600));
      if (::write(fd.get(), memory_.data(), kObjectBlocks * kSlotBytes) < 0) return false;
    }
    std::FILE* const curl = ::popen("curl -s -S -f -Z --parallel-max 32 --parallel-immediate -K -", "w");
    if (curl == nullptr) return false;
    const std::string prefix = location_.path.empty() ? "" : location_.path + '/';
    for (const std::string& path : paths) {
      if (path != paths.front()) std::fprintf(curl, "next\n");
      std::fprintf(curl, "url = \"%s/%s/%s%s%s\"\noutput = \"/dev/null\"\n", s3_.endpoint.c_str(),
                   location_.bucket.c_str(), prefix.c_str(), path.c_str(), write ? ".plain" : "");
      if (write) std::fprintf(curl, "upload-file = \"%s\"\n", source.c_str());
      if (!s3_.access_key.empty()) {
        std::fprintf(curl, "aws-sigv4 = \"aws:amz:%s:s3\"\nuser = \"%s:%s\"\n", s3_.region.c_str(),
                     s3_.access_key.c_str(), s3_.secret_key.c_str());
        std::fprintf(curl, "header = \"x-amz-content-sha256: UNSIGNED-PAYLOAD\"\n");
      }
    }
    return ::pclose(curl) == 0;
  }

  const remote::Location location_;
  const remote::S3Options s3_;
  std::vector<std::byte> memory_;
  std::vector<key::BlockKey> keys_;
  std::vector<std::span<std::byte>> buffers_;
  std::vector<std::string> folders_;
  remote::SpaceName space_{};
  remote::RequestId id_ = 0;
  Sink sink_;
  std::unique_ptr<remote::RemoteTier> tier_;
};

// The time of both together tells little; `tier/plain` is the median of the turns'.
template <typename Tier, typename Plain>
void take_turns(benchmark::State& state, Tier tier, Plain plain) {
  const auto seconds_of = [&](auto body) {
    const Nanos begun = monotonic_now();
    if (!body()) state.SkipWithError("the store did not do it");
    return static_cast<double>(monotonic_now() - begun) / kSecond;
  };
  std::vector<double> tier_seconds;
  std::vector<double> plain_seconds;
  std::vector<double> ratios;
  for (auto _ : state) {
    tier_seconds.push_back(seconds_of(tier));
    plain_seconds.push_back(seconds_of(plain));
    ratios.push_back(plain_seconds.back() / tier_seconds.back());
    state.SetIterationTime(tier_seconds.back());
  }
  const auto median = [](std::vector<double>& values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
  };
  state.counters["tier_MB/s"] = kBytes / 1e6 / median(tier_seconds);
  state.counters["plain_MB/s"] = kBytes / 1e6 / median(plain_seconds);
  state.counters["tier/plain"] = median(ratios);
}

}  // namespace

Status register_remote(const std::string& url, const Options&) {
  const remote::S3Options s3 = remote::S3Options::from_environment();
  auto store = remote::open_store(url, s3);
  if (!store.ok()) return store.error();
  const auto location = remote::parse_location(url);
  if (location.value().kind == remote::Location::Kind::kS3 && !s3.path_style) {
    return Error{ErrorCode::kInvalidArgument, "set AWS_ENDPOINT_URL: the plain client wants a store of that kind"};
  }
  const auto bench = std::make_shared<Bench>(std::move(store).value(), location.value(), s3);
  const auto add = [](const char* name, auto tier, auto plain) {
    benchmark::RegisterBenchmark(name, [=](benchmark::State& state) { take_turns(state, tier, plain); })
        ->UseManualTime()
        ->Iterations(kIterations)
        ->Unit(benchmark::kMillisecond);
  };
  const auto write = [bench] {
    bench->next_space();
    return bench->write();
  };
  add("write", write, [bench] { return bench->plain(true); });
  add(
      "read", [bench] { return bench->read(); }, [bench] { return bench->plain(false); });
  return {};
}

}  // namespace flexkv::bench
