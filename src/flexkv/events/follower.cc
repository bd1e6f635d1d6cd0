#include "flexkv/events/follower.h"

#include <utility>

namespace flexkv::events {
namespace {

template <typename Visit>
void each_tier(unsigned tiers, Visit visit) {
  for (unsigned tier = 0; tiers >> tier != 0; ++tier) {
    if ((tiers >> tier & 1) != 0) visit(static_cast<std::uint8_t>(tier));
  }
}

}  // namespace

void Follower::apply(const Change& change, std::vector<Change>& out) {
  switch (change.kind) {
    case Change::Kind::kAdded:
      return add(change, out);
    case Change::Kind::kRemoved: {
      const auto found = blocks_.find(change.key);
      if (found == blocks_.end() || (found->second.tiers >> change.tier & 1) == 0) return;
      found->second.tiers &= ~(1U << change.tier);
      out.push_back(change);
      out.back().description = found->second.description;
      if (found->second.tiers == 0) blocks_.erase(found);
      return;
    }
    case Change::Kind::kCleared:
      return take_back([&](const Block& block) { return block.space == change.space ? 0 : block.tiers; }, out);
    case Change::Kind::kRestart:
      for (auto& [key, block] : blocks_) block.confirmed = 0;
      return;
    case Change::Kind::kCurrent:
      return take_back([](const Block& block) { return block.confirmed; }, out);
  }
}

void Follower::lose(std::vector<Change>& out) {
  take_back([](const Block&) { return 0U; }, out);
}

void Follower::add(const Change& change, std::vector<Change>& out) {
  if (change.description == nullptr) return;
  Block& block = blocks_[change.key];
  const unsigned bit = 1U << change.tier;
  block.confirmed |= bit;
  if ((block.tiers & bit) != 0) return;
  if (block.tiers == 0) {
    block.space = change.space;
    block.parent = change.parent;
    block.description = change.description;
  }
  block.tiers |= bit;
  out.push_back(change);
}

template <typename Keep>
void Follower::take_back(Keep keep, std::vector<Change>& out) {
  const std::size_t before = out.size();
  SpaceNumber space = 0;
  for (auto entry = blocks_.begin(); entry != blocks_.end();) {
    Block& block = entry->second;
    const unsigned lost = block.tiers & ~static_cast<unsigned>(keep(std::as_const(block)));
    each_tier(lost, [&](std::uint8_t tier) {
      out.push_back({Change::Kind::kRemoved, tier, block.space, entry->first, {}, block.description});
    });
    if (lost != 0) space = block.space;
    block.tiers &= ~lost;
    entry = block.tiers == 0 ? blocks_.erase(entry) : std::next(entry);
  }
  if (!clears_at_once_ || !blocks_.empty() || out.size() == before) return;
  out.resize(before);
  out.push_back({.kind = Change::Kind::kCleared, .space = space, .description = nullptr});
}

std::vector<Change> Follower::told() const {
  std::unordered_map<key::BlockKey, std::vector<key::BlockKey>, key::BlockKeyHash> children;
  std::vector<key::BlockKey> next;
  for (const auto& [key, block] : blocks_) {
    (blocks_.contains(block.parent) ? children[block.parent] : next).push_back(key);
  }
  std::vector<Change> out;
  while (!next.empty()) {
    const key::BlockKey key = next.back();
    next.pop_back();
    const Block& block = blocks_.at(key);
    each_tier(block.tiers, [&](std::uint8_t tier) {
      out.push_back({Change::Kind::kAdded, tier, block.space, key, block.parent, block.description});
    });
    if (const auto found = children.find(key); found != children.end()) {
      next.insert(next.end(), found->second.begin(), found->second.end());
    }
  }
  return out;
}

}  // namespace flexkv::events
