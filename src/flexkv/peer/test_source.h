// For tests: an owner whose blocks' bytes follow from their keys, and which counts what is pinned.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "flexkv/base/mutex.h"
#include "flexkv/base/prng.h"
#include "flexkv/peer/types.h"

namespace flexkv::peer::testing {

inline std::vector<std::byte> bytes_of(const key::BlockKey& key, std::uint64_t slot_bytes) {
  std::vector<std::byte> bytes(slot_bytes);
  Prng random(key.high * 31 + key.low);
  for (std::size_t i = 0; i < bytes.size(); i += 8) {
    const std::uint64_t word = random.next();
    std::memcpy(bytes.data() + i, &word, std::min<std::size_t>(8, bytes.size() - i));
  }
  return bytes;
}

class TestSource final : public BlockSource {
 public:
  // Has blocks whose `low` is below this, and in a chain those before the first one that it has not.
  explicit TestSource(std::uint64_t end) : end_(end) {}

  void pin(const SpaceName&, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys, std::uint32_t first, Nanos,
           std::function<void(Pinned)> done) override {
    Pinned pinned;
    {
      const MutexLock lock(mutex_);
      auto& blocks = pins_[++last_];
      const auto here = std::ranges::find_if(keys, [&](const key::BlockKey& key) { return key.low >= end_; });
      for (auto key = keys.begin() + first; key < here; ++key) {
        blocks.push_back(bytes_of(*key, slot_bytes));
        const std::span<const std::byte> payload = std::span(blocks.back()).first(slot_bytes - 1);
        pinned.sums.push_back({{0, payload.size(), block_sum(payload) + (damaged_ == key->low)}});
      }
      if (blocks.size() < keys.size() - first) pinned.outcome = Outcome::kMissing;
      for (const auto& block : blocks) pinned.blocks.emplace_back(block);
      pinned.pin = last_;
      if (blocks.empty()) pins_.erase(last_);
      if (late_) {
        waiting_.push_back([done = std::move(done), pinned] { done(pinned); });
        return;
      }
    }
    done(std::move(pinned));
  }
  // Of the blocks that are pinned from now on, the one with this `low` is not what its sum says.
  void damage(std::uint64_t low) {
    const MutexLock lock(mutex_);
    damaged_ = low;
  }
  // Something else gets into the slots of what is pinned now.
  void overwrite_pinned(std::size_t at) {
    const MutexLock lock(mutex_);
    for (auto& [pin, blocks] : pins_) {
      for (auto& block : blocks) block.at(at) ^= std::byte{1};
    }
  }
  std::vector<std::uint32_t> found_damaged() const {
    const MutexLock lock(mutex_);
    return found_damaged_;
  }
  void on_damaged(std::uint64_t pin, std::uint32_t block) override {
    const MutexLock lock(mutex_);
    FLEXKV_ASSERT(pins_.contains(pin));
    found_damaged_.push_back(block);
  }
  void unpin(std::uint64_t pin) override {
    const MutexLock lock(mutex_);
    FLEXKV_ASSERT(pins_.erase(pin) == 1);
  }

  std::size_t pins() const {
    const MutexLock lock(mutex_);
    return pins_.size();
  }
  // From now on answers wait for answer_all().
  void set_late(bool late) {
    const MutexLock lock(mutex_);
    late_ = late;
  }
  std::size_t waiting() const {
    const MutexLock lock(mutex_);
    return waiting_.size();
  }
  void answer_all() {
    std::vector<std::function<void()>> answers;
    {
      const MutexLock lock(mutex_);
      answers.swap(waiting_);
    }
    for (const auto& answer : answers) answer();
  }

 private:
  const std::uint64_t end_;
  mutable Mutex mutex_;
  std::uint64_t last_ FLEXKV_GUARDED_BY(mutex_) = 0;
  std::map<std::uint64_t, std::vector<std::vector<std::byte>>> pins_ FLEXKV_GUARDED_BY(mutex_);
  bool late_ FLEXKV_GUARDED_BY(mutex_) = false;
  std::optional<std::uint64_t> damaged_ FLEXKV_GUARDED_BY(mutex_);
  std::vector<std::uint32_t> found_damaged_ FLEXKV_GUARDED_BY(mutex_);
  std::vector<std::function<void()>> waiting_ FLEXKV_GUARDED_BY(mutex_);
};

}  // namespace flexkv::peer::testing
