// For tests of the remote tier: blocks with known bytes, and a sink that waits for what is told.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>

#include "flexkv/base/prng.h"
#include "flexkv/remote/remote_tier.h"

namespace flexkv::remote::testing {

constexpr SpaceName kSpace{7};

inline key::BlockKey key_of(std::uint64_t block) { return {Prng::mix(block), Prng::mix(block + (1ULL << 40))}; }

// A block's bytes follow from its number and size alone.
inline std::vector<std::byte> bytes_of(std::uint64_t block, std::size_t size) {
  std::vector<std::byte> bytes(size);
  Prng random(block);
  for (std::size_t at = 0; at < size; at += sizeof(std::uint64_t)) {
    const std::uint64_t word = random.next();
    std::memcpy(bytes.data() + at, &word, std::min(size - at, sizeof(word)));
  }
  return bytes;
}

// Blocks first, first + 1, ... of a chain.
inline std::vector<key::BlockKey> keys_of(std::uint64_t first, std::size_t count) {
  std::vector<key::BlockKey> keys;
  for (std::size_t i = 0; i < count; ++i) keys.push_back(key_of(first + i));
  return keys;
}

class WaitingSink final : public RemoteSink {
 public:
  void on_block(RequestId id, std::uint32_t index) override {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(blocks_[id]++, index);
  }
  void on_end(RequestId id, Outcome outcome) override { end(id, outcome); }
  void on_written(RequestId id, Outcome outcome) override { end(id, outcome); }

  Outcome wait(RequestId id) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_.contains(id); });
    return ended_.at(id);
  }
  bool ended(RequestId id) {
    const std::lock_guard lock(mutex_);
    return ended_.contains(id);
  }
  std::uint32_t blocks(RequestId id) {
    const std::lock_guard lock(mutex_);
    return blocks_[id];
  }

 private:
  void end(RequestId id, Outcome outcome) {
    const std::lock_guard lock(mutex_);
    EXPECT_TRUE(ended_.emplace(id, outcome).second) << "request " << id << " ended twice";
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<RequestId, std::uint32_t> blocks_;
  std::map<RequestId, Outcome> ended_;
};

// A node's use of a tier: writes and reads blocks of one space and compares what comes.
class User {
 public:
  User(std::unique_ptr<Store> store, std::size_t slot_bytes, TierOptions options = {})
      : slot_bytes_(slot_bytes), tier_(std::make_unique<RemoteTier>(options, std::move(store), sink_)) {
    tier_->open_space(kSpace, slot_bytes);
  }

  RequestId begin_write(std::uint64_t first, std::size_t count, Nanos within = 60 * kSecond) {
    WriteRequest request{++last_id_, kSpace, slot_bytes_, {}, {}, monotonic_now() + within};
    auto& payloads = sources_[last_id_];
    for (std::uint64_t block = first; block < first + count; ++block) {
      request.blocks.push_back({key_of(block), block == first && first % 1000 == 0 ? kNoParent : key_of(block - 1)});
      payloads.push_back(bytes_of(block, slot_bytes_));
    }
    request.buffers.assign(payloads.begin(), payloads.end());
    EXPECT_TRUE(tier_->write(std::move(request)));
    return last_id_;
  }
  Outcome write(std::uint64_t first, std::size_t count) { return sink_.wait(begin_write(first, count)); }

  RequestId begin_read(std::uint64_t first, std::size_t count, Nanos within = 60 * kSecond) {
    ReadRequest request{++last_id_, kSpace, slot_bytes_, keys_of(first, count), {}, monotonic_now() + within};
    auto& targets = targets_[last_id_];
    targets.assign(count, std::vector<std::byte>(slot_bytes_));
    request.buffers.assign(targets.begin(), targets.end());
    EXPECT_TRUE(tier_->read(std::move(request)));
    return last_id_;
  }
  // Checks all blocks that it was told of.
  Outcome end_read(RequestId id, std::uint64_t first) {
    const Outcome outcome = sink_.wait(id);
    for (std::uint32_t i = 0; i < sink_.blocks(id); ++i) {
      EXPECT_EQ(targets_.at(id)[i], bytes_of(first + i, slot_bytes_)) << "block " << first + i;
    }
    EXPECT_EQ(outcome == Outcome::kDone, sink_.blocks(id) == targets_.at(id).size());
    return outcome;
  }
  Outcome read(std::uint64_t first, std::size_t count) { return end_read(begin_read(first, count), first); }

  std::size_t contains(std::uint64_t first, std::size_t count) const {
    return tier_->contains(kSpace, keys_of(first, count));
  }
  // Until another scan has ended whole.
  void wait_for_scan() const {
    const std::uint64_t before = tier_->stats().scans;
    wait_until([&] { return tier_->stats().scans > before; });
  }
  template <typename Condition>
  static void wait_until(Condition condition) {
    while (!condition()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  RemoteTier& tier() { return *tier_; }
  WaitingSink& sink() { return sink_; }
  std::uint64_t faults(Fault fault) const { return tier_->stats().faults[static_cast<std::size_t>(fault)]; }

 private:
  const std::size_t slot_bytes_;
  WaitingSink sink_;
  RequestId last_id_ = 0;
  std::map<RequestId, std::vector<std::vector<std::byte>>> sources_;
  std::map<RequestId, std::vector<std::vector<std::byte>>> targets_;
  std::unique_ptr<RemoteTier> tier_;
};

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "flexkv-remote-XXXXXX").string();
    EXPECT_NE(::mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::filesystem::path& path() const { return path_; }

  // Of the objects that are there.
  std::vector<std::filesystem::path> objects() const {
    std::vector<std::filesystem::path> found;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(path_)) {
      if (entry.path().extension() == ".kv") found.push_back(entry.path());
    }
    std::ranges::sort(found);
    return found;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace flexkv::remote::testing
