// An engine's device blocks, as vLLM's block pool: counted references, and freed blocks keep their contents (found by
// tag) until they are given to someone else, the longest free one first. Thread-compatible.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "flexkv/testing/sim_loop.h"

namespace flexkv::testing {

class SimBlocks {
 public:
  explicit SimBlocks(std::uint32_t count) : blocks_(count) {
    for (std::uint32_t id = 0; id < count; ++id) free_.emplace(0, id);
  }

  std::size_t free_count() const { return free_.size(); }
  bool all_free() const { return free_.size() == blocks_.size(); }

  // REQUIRES: free_count() > 0
  std::uint32_t allocate() {
    const std::uint32_t id = free_.begin()->second;
    free_.erase(free_.begin());
    Block& block = blocks_[id];
    SIM_CHECK(block.references == 0);
    if (block.tag) by_tag_.erase(*block.tag);
    block = {1, 0, std::nullopt};
    return id;
  }
  std::optional<std::uint32_t> find(std::uint64_t tag) const {
    const auto found = by_tag_.find(tag);
    return found == by_tag_.end() ? std::nullopt : std::optional(found->second);
  }
  void take_reference(std::uint32_t id) {
    Block& block = blocks_[id];
    if (block.references++ == 0) free_.erase({block.freed, id});
  }
  void drop_reference(std::uint32_t id) {
    Block& block = blocks_[id];
    SIM_CHECK(block.references > 0);
    if (--block.references > 0) return;
    block.freed = ++clock_;
    free_.emplace(block.freed, id);
  }
  // The block's contents are complete and right: others may use them.
  void remember(std::uint32_t id, std::uint64_t tag) {
    if (!blocks_[id].tag && by_tag_.emplace(tag, id).second) blocks_[id].tag = tag;
  }
  void forget_all() {
    by_tag_.clear();
    for (Block& block : blocks_) block.tag.reset();
  }

 private:
  struct Block {
    std::uint32_t references = 0;
    std::uint64_t freed = 0;
    std::optional<std::uint64_t> tag;
  };
  std::vector<Block> blocks_;
  std::set<std::pair<std::uint64_t, std::uint32_t>> free_;
  std::unordered_map<std::uint64_t, std::uint32_t> by_tag_;
  std::uint64_t clock_ = 0;
};

}  // namespace flexkv::testing
