// What PrefixIndex must do, written the obvious way: a node per block, an O(n) scan per victim. For tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "flexkv/base/assert.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

class NaiveIndex {
 public:
  struct Block {
    key::BlockKey key;
    Block* parent = nullptr;
    std::vector<std::unique_ptr<Block>> children;
    std::uint32_t depth = 0;  // 1 for the first block
    unsigned pins = 0;
    bool detached = false;
    struct History {
      Slot slot = kNoSlot;
      unsigned uses = 0;
      Nanos used = 0;
      // Its place in the order: `order` falls towards the victims' end. Set aside: met there when it could not go.
      std::int64_t order = 0;
      bool set_aside = false;
    };
    std::array<History, kTierCountMax> tiers;
  };

  explicit NaiveIndex(const PrefixIndex::Options& options) : options_(options) { root_ = std::make_unique<Block>(); }

  Block* root() { return root_.get(); }

  std::uint32_t extend(Block*& at, std::span<const key::BlockKey> keys, bool touch, Nanos now) {
    const std::uint32_t known = at->depth;
    std::uint32_t matched = 0;
    for (const auto& key : keys) {
      Block* child = find(at, key);
      if (child == nullptr || bare(*child) || at->detached) break;
      at = child;
      ++matched;
    }
    if (touch && !at->detached) {
      for (Tier tier = 0; tier < options_.tier_count; ++tier) use_path(at, known, tier, now);
    }
    return matched;
  }

  void pin(Block* at) { ++at->pins; }
  void unpin(Block* at, std::vector<PrefixIndex::Evicted>& out) {
    --at->pins;
    if (at->detached) {
      free_unpinned(at, out);
    } else {
      for (Block* block = at; block != nullptr; block = block->parent) {
        for (Tier tier = 0; tier < options_.tier_count; ++tier) {
          if (block->tiers[tier].set_aside && may_go(*block, tier)) bring_back(*block, tier);
        }
      }
      trim(at);
    }
  }

  void insert(Block*& at, Tier tier, std::span<const key::BlockKey> keys, std::span<const Slot> slots, Nanos now,
              std::vector<Slot>& rejected) {
    if (at->detached) return rejected.insert(rejected.end(), slots.begin(), slots.end()), void();
    for (std::size_t i = 0; i < keys.size(); ++i) {
      Block* child = find(at, keys[i]);
      if (child == nullptr) {
        child = at->children.emplace_back(std::make_unique<Block>()).get();
        child->key = keys[i];
        child->parent = at;
        child->depth = at->depth + 1;
      }
      at = child;
      fill(at, tier, slots[i], now, rejected);
    }
    use_path(at, UINT32_MAX, tier, now);
  }

  void add_residency(Block* at, Tier tier, std::uint32_t first, std::span<const Slot> slots, Nanos now,
                     std::vector<Slot>& rejected) {
    if (slots.empty()) return;
    if (at->detached) return rejected.insert(rejected.end(), slots.begin(), slots.end()), void();
    while (at->depth > first + slots.size()) at = at->parent;
    Block* const last = at;
    std::vector<Block*> blocks(slots.size());
    for (std::size_t i = slots.size(); i-- > 0; at = at->parent) blocks[i] = at;
    for (std::size_t i = 0; i < slots.size(); ++i) fill(blocks[i], tier, slots[i], now, rejected);
    use_path(last, UINT32_MAX, tier, now);
  }

  Slot drop(Block* at, Tier tier, std::uint32_t index) {
    while (at->depth > index + 1) at = at->parent;
    const Slot slot = at->tiers[tier].slot;
    at->tiers[tier] = {};
    lay_bare(at, tier);
    return slot;
  }

  std::uint32_t evict(Tier tier, std::uint32_t count, std::vector<PrefixIndex::Evicted>& out) {
    std::uint32_t taken = 0;
    while (taken < count) {
      Block* victim = next_victim(tier);
      if (victim == nullptr) break;
      auto& history = victim->tiers[tier];
      if (!may_go(*victim, tier)) {
        history.set_aside = true;
        continue;
      }
      out.push_back({victim->key, history.slot, tier});
      history = {};
      ++taken;
      lay_bare(victim, tier);
      trim(victim);
    }
    return taken;
  }

  // Takes what another index took, asserting that each block may go.
  void take(Tier tier, std::span<const PrefixIndex::Evicted> taken) {
    for (const auto& evicted : taken) {
      Block* block = nullptr;
      for_each(*root_, [&](Block& b) { block = b.tiers[tier].slot == evicted.slot ? &b : block; });
      FLEXKV_ASSERT(block != nullptr && block->key == evicted.key && may_go(*block, tier));
      block->tiers[tier] = {};
      trim(block);
    }
  }
  bool may_still_go(Tier tier) {
    bool any = false;
    for_each(*root_, [&](Block& b) { any = any || (b.tiers[tier].slot != kNoSlot && may_go(b, tier)); });
    return any;
  }

  void clear(std::vector<PrefixIndex::Evicted>& out) {
    auto old = std::move(root_->children);
    root_->children.clear();
    for (auto& child : old) detached_.push_back(std::move(child));
    std::vector<Block*> leaves;
    for (auto& block : detached_) mark_detached(*block, leaves);
    for (Block* leaf : leaves) free_unpinned(leaf, out);
  }

  Slot slot(Block* at, Tier tier, std::uint32_t index) const {
    while (at->depth > index + 1) at = at->parent;
    return at->tiers[tier].slot;
  }

  std::uint64_t block_count(Tier tier) const {
    std::uint64_t count = 0;
    auto add = [&](const Block& block) { count += block.tiers[tier].slot != kNoSlot ? 1U : 0U; };
    for_each(*root_, add);
    for (const auto& block : detached_) for_each(*block, add);
    return count;
  }

 private:
  template <typename F>
  static void for_each(const Block& block, F f) {
    f(block);
    for (const auto& child : block.children) for_each(*child, f);
  }
  template <typename F>
  static void for_each(Block& block, F f) {
    f(block);
    for (auto& child : block.children) for_each(*child, f);
  }

  static Block* find(Block* at, const key::BlockKey& key) {
    for (auto& child : at->children) {
      if (child->key == key) return child.get();
    }
    return nullptr;
  }
  static bool bare(const Block& block) {
    return std::all_of(block.tiers.begin(), block.tiers.end(), [](auto& tier) { return tier.slot == kNoSlot; });
  }

  PolicyKind kind(Tier tier) const { return options_.policy[tier].kind; }
  bool newest_first(Tier tier) const { return kind(tier) == PolicyKind::kMru || kind(tier) == PolicyKind::kFilo; }
  bool by_arrival(Tier tier) const { return kind(tier) == PolicyKind::kFifo || kind(tier) == PolicyKind::kFilo; }
  unsigned uses_max(Tier tier) const {
    switch (kind(tier)) {
      case PolicyKind::kHitReward:
        return 15;
      case PolicyKind::kLfu:
        return 63;
      case PolicyKind::kSlru:
        return options_.policy[tier].protected_after;
      default:
        return 0;
    }
  }
  unsigned list(const Block::History& history, Tier tier) const {
    if (kind(tier) == PolicyKind::kSlru) return history.uses >= options_.policy[tier].protected_after ? 1 : 0;
    return history.uses;
  }

  std::int64_t newest(Tier tier) { return newest_first(tier) ? --lowest_ : ++highest_; }

  void fill(Block* at, Tier tier, Slot slot, Nanos now, std::vector<Slot>& rejected) {
    auto& history = at->tiers[tier];
    if (history.slot != kNoSlot) return rejected.push_back(slot);
    history = {};
    history.slot = slot;
    history.used = now;
    history.order = newest(tier);
  }

  void use_path(Block* at, std::uint32_t hits_from, Tier tier, Nanos now) {
    if (by_arrival(tier)) return;
    for (; at->parent != nullptr; at = at->parent) {
      auto& history = at->tiers[tier];
      if (history.slot == kNoSlot) continue;
      if (at->depth > hits_from) history.uses = std::min(history.uses + 1, uses_max(tier));
      history.used = now;
      history.order = newest(tier);
      history.set_aside = false;
    }
  }

  Block* next_victim(Tier tier) {
    std::map<unsigned, Block*> first;  // of each list
    for_each(*root_, [&](Block& block) {
      const auto& history = block.tiers[tier];
      if (history.slot == kNoSlot || history.set_aside) return;
      Block*& best = first[list(history, tier)];
      if (best == nullptr || history.order < best->tiers[tier].order) best = &block;
    });
    if (first.empty()) return nullptr;
    if (kind(tier) != PolicyKind::kHitReward) return first.begin()->second;
    Block* victim = nullptr;
    Nanos least = 0;
    for (auto [uses, block] : first) {
      const Nanos worth = block->tiers[tier].used + options_.policy[tier].hit_reward * uses;
      if (victim == nullptr || worth < least) victim = block, least = worth;
    }
    return victim;
  }

  static bool last_of_path(const Block& block, Tier tier) {
    bool last = true;
    for_each(block, [&](const Block& b) { last = last && (&b == &block || b.tiers[tier].slot == kNoSlot); });
    return last;
  }
  static bool may_go(const Block& block, Tier tier) {
    bool pinned = false;
    for_each(block, [&](const Block& b) { pinned = pinned || b.pins > 0; });
    return !pinned && last_of_path(block, tier);
  }

  void bring_back(Block& block, Tier tier) {
    block.tiers[tier].set_aside = false;
    block.tiers[tier].order = --lowest_;  // the victims' end
  }
  // A block has lost its slot: the next one towards the root may be the last of its path now.
  void lay_bare(Block* at, Tier tier) {
    while (at->parent != nullptr && at->tiers[tier].slot == kNoSlot) at = at->parent;
    if (at->tiers[tier].set_aside && last_of_path(*at, tier)) bring_back(*at, tier);
  }

  void trim(Block* at) {
    while (at->parent != nullptr && at->children.empty() && at->pins == 0 && bare(*at)) {
      Block* parent = at->parent;
      std::erase_if(parent->children, [&](const auto& child) { return child.get() == at; });
      at = parent;
    }
  }

  static void mark_detached(Block& block, std::vector<Block*>& leaves) {
    block.detached = true;
    for (auto& child : block.children) mark_detached(*child, leaves);
    if (block.children.empty()) leaves.push_back(&block);
  }

  void free_unpinned(Block* at, std::vector<PrefixIndex::Evicted>& out) {
    while (at != root_.get() && at->children.empty() && at->pins == 0) {
      for (Tier tier = 0; tier < options_.tier_count; ++tier) {
        if (at->tiers[tier].slot != kNoSlot) out.push_back({at->key, at->tiers[tier].slot, tier});
      }
      Block* parent = at->parent;
      auto is_it = [&](const auto& child) { return child.get() == at; };
      if (parent == root_.get()) {
        std::erase_if(detached_, is_it);
      } else {
        std::erase_if(parent->children, is_it);
      }
      at = parent;
    }
  }

  const PrefixIndex::Options options_;
  std::unique_ptr<Block> root_;
  std::vector<std::unique_ptr<Block>> detached_;
  std::int64_t highest_ = 0;
  std::int64_t lowest_ = 0;
};

}  // namespace flexkv::index
