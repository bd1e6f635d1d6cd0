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
      const auto found = blocks_.find({change.space, change.key});
      if (found == blocks_.end() || (found->second.tiers >> change.tier & 1) == 0) return;
      found->second.tiers &= ~(1U << change.tier);
      out.push_back(change);
      out.back().description = found->second.description;
      if (found->second.tiers == 0) blocks_.erase(found);
      return;
    }
    case Change::Kind::kCleared:
      return take_back([&](const Id& id, const Block& block) { return id.space == change.space ? 0 : block.tiers; },
                       out);
    case Change::Kind::kRestart:
      for (auto& [id, block] : blocks_) block.confirmed = 0;
      return;
    case Change::Kind::kCurrent:
      return take_back([](const Id&, const Block& block) { return block.confirmed; }, out);
  }
}

void Follower::lose(std::vector<Change>& out) {
  take_back([](const Id&, const Block&) { return 0U; }, out);
}

void Follower::add(const Change& change, std::vector<Change>& out) {
  if (change.description == nullptr) return;
  Block& block = blocks_[{change.space, change.key}];
  const unsigned bit = 1U << change.tier;
  block.confirmed |= bit;
  if ((block.tiers & bit) != 0) return;
  if (block.tiers == 0) {
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
    const Id& id = entry->first;
    Block& block = entry->second;
    const unsigned lost = block.tiers & ~static_cast<unsigned>(keep(id, std::as_const(block)));
    each_tier(lost, [&](std::uint8_t tier) {
      out.push_back({Change::Kind::kRemoved, tier, id.space, id.key, {}, block.description});
    });
    if (lost != 0) space = id.space;
    block.tiers &= ~lost;
    entry = block.tiers == 0 ? blocks_.erase(entry) : std::next(entry);
  }
  if (!clears_at_once_ || !blocks_.empty() || out.size() == before) return;
  out.resize(before);
  out.push_back({.kind = Change::Kind::kCleared, .space = space, .description = nullptr});
}

std::vector<Change> Follower::told() const {
  std::unordered_map<Id, std::vector<Id>, IdHash> children;
  std::vector<Id> next;
  for (const auto& [id, block] : blocks_) {
    const Id parent{id.space, block.parent};
    (blocks_.contains(parent) ? children[parent] : next).push_back(id);
  }
  std::vector<Change> out;
  while (!next.empty()) {
    const Id id = next.back();
    next.pop_back();
    const Block& block = blocks_.at(id);
    each_tier(block.tiers, [&](std::uint8_t tier) {
      out.push_back({Change::Kind::kAdded, tier, id.space, id.key, block.parent, block.description});
    });
    if (const auto found = children.find(id); found != children.end()) {
      next.insert(next.end(), found->second.begin(), found->second.end());
    }
  }
  return out;
}

}  // namespace flexkv::events
