// For tests of transports that read a peer's memory: nodes with one, in this process and in others.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/memory/host_region.h"
#include "flexkv/peer/one_sided.h"
#include "flexkv/peer/peer_lane.h"
#include "flexkv/peer/test_exchange.h"

namespace flexkv::peer::testing {

constexpr std::uint64_t kSlots = 16;
constexpr std::uint64_t kSlotBytes = 5U << 20;  // three pieces

// Block n of every chain lies in slot n.
class PoolSource final : public BlockSource {
 public:
  PoolSource() : pool(memory::HostRegion::create(kSlots * kSlotBytes, {.huge_pages = false, .numa = {}}).value()) {
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
  std::span<std::byte> at(std::uint64_t slot) { return {pool.data() + slot * kSlotBytes, kSlotBytes}; }

  memory::HostRegion pool;
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
  // `make` takes a pool.
  template <typename Make>
  Node(const std::string& name, Make make) : reads(make(source.pool)) {
    lane = PeerLane::start({name, "127.0.0.1:0", 1U << 30, 16}, context(), source, ends, reads.get()).value();
  }
  PoolSource source;
  Ends ends;
  std::unique_ptr<OneSided> reads;
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

// The body of such a test: serves until its standard input ends.
inline void serve_until_closed(const Node& owner) {
  const std::string line = owner.lane->address() + '\n';
  ASSERT_EQ(::write(STDOUT_FILENO, line.data(), line.size()), static_cast<ssize_t>(line.size()));
  char byte = 0;
  while (::read(STDIN_FILENO, &byte, 1) > 0) {
  }
}

// A test of this program's in a process of its own, which says where its node listens.
class ProcessOfAnOwner {
 public:
  explicit ProcessOfAnOwner(const std::string& test) {
    const std::string filter = "--gtest_filter=" + test;
    int in[2];
    int out[2];
    FLEXKV_ASSERT(::pipe2(in, O_CLOEXEC) == 0 && ::pipe2(out, O_CLOEXEC) == 0);
    process_ = ::fork();
    if (process_ == 0) {
      ::dup2(in[0], STDIN_FILENO);
      ::dup2(out[1], STDOUT_FILENO);
      ::execl("/proc/self/exe", "peer_test", filter.c_str(), "--gtest_also_run_disabled_tests", "--gtest_brief=1",
              nullptr);
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

}  // namespace flexkv::peer::testing
