#include "flexkv/cluster/replica.h"

#include <algorithm>
#include <utility>

namespace flexkv::cluster {
namespace {

// Residencies between two releases of the mutex.
constexpr std::size_t kPiece = 64;
// After a run of fewer blocks than this, so many more keys are searched for at once: the next one may be as short.
constexpr std::size_t kAhead = 32;
// Blocks of nodes that are gone for which no space is written anew.
constexpr std::uint64_t kClearedMin = 4096;
constexpr std::uint32_t kUnknown = UINT32_MAX;

template <typename Table>
void prefetch(const Table& table, std::span<const key::BlockKey> keys) {
  for (const key::BlockKey& key : keys) table.prefetch(half(tag_of(key)));
  for (const key::BlockKey& key : keys) table.prefetch_place(half(tag_of(key)));
}

// What applying `residencies` will read.
template <typename Table>
void prefetch(const Table& table, std::span<const Residency> residencies) {
  const auto searched = [](const Residency& one) { return one.before != kUnsaid && one.before != kFirst; };
  const auto each = [&](auto fetch) {
    Before last = kUnsaid;
    for (const Residency& one : residencies) {
      fetch(half(one.tag));
      if (searched(one) && one.before != last) fetch(one.before);
      last = half(one.tag);
    }
  };
  each([&](Before half) { table.prefetch(half); });
  each([&](Before half) { table.prefetch_place(half); });
}

// How many of `ids`, from the first on, are the same.
std::size_t same(std::span<const HolderSets::Id> ids) {
  constexpr std::size_t kEight = 8;
  std::size_t length = 1;
  for (; length + kEight <= ids.size(); length += kEight) {
    HolderSets::Id different = 0;
    for (std::size_t i = length; i < length + kEight; ++i) different |= ids[i] ^ ids[0];
    if (different != 0) break;
  }
  while (length < ids.size() && ids[length] == ids[0]) ++length;
  return length;
}

}  // namespace

const Replica::Node* Replica::find(Incarnation node) const {
  for (const Node& candidate : nodes_) {
    if (candidate.id == node) return &candidate;
  }
  return nullptr;
}
Replica::Node* Replica::find(Incarnation node) {
  return const_cast<Node*>(static_cast<const Replica*>(this)->find(node));
}

const Replica::Holder* Replica::holder_of(const Node& node, SpaceIndex space) const {
  const HolderSets::Holder number = node.holders[space];
  return number == kNone ? nullptr : &spaces_[space]->holders[number];
}

std::uint64_t Replica::blocks_of(const Node& node) const {
  std::uint64_t blocks = 0;
  for (SpaceIndex space = 0; space < kSpacesMax; ++space) {
    const Holder* holder = holder_of(node, space);
    blocks += holder == nullptr ? 0 : holder->blocks;
  }
  return blocks;
}

// ---- the writer ----------------------------------------------------------------------------------------------------

void Replica::refresh(Incarnation id, const std::string& address, Nanos until) {
  MutexLock lock(mutex_);
  Node* node = find(id);
  if (node == nullptr) {
    node = &nodes_.emplace_back();
    node->id = id;
    node->holders.fill(kNone);
  }
  node->address = address;
  node->until = until;
  for (SpaceIndex space = 0; space < kSpacesMax; ++space) {
    if (node->holders[space] != kNone) spaces_[space]->holders[node->holders[space]].until = until;
  }
}

void Replica::clear(Node& node, SpaceIndex space_index) {
  const HolderSets::Holder number = std::exchange(node.holders[space_index], kNone);
  if (number == kNone) return;
  Space& space = *spaces_[space_index];
  const std::uint64_t blocks = std::exchange(space.holders[number], Holder{}).blocks;
  space.cleared_blocks += blocks;
  space.held_blocks -= blocks;
  block_count_ -= blocks;
}

void Replica::remove(Incarnation id) {
  {
    MutexLock lock(mutex_);
    Node* node = find(id);
    if (node == nullptr) return;
    for (SpaceIndex space = 0; space < kSpacesMax; ++space) clear(*node, space);
    if (node != &nodes_.back()) *node = std::move(nodes_.back());
    nodes_.pop_back();
  }
  for (SpaceIndex space = 0; space < kSpacesMax; ++space) tidy(space, false);
}

void Replica::remove_all() {
  std::array<std::unique_ptr<Space>, kSpacesMax> gone;  // freed after the mutex
  MutexLock lock(mutex_);
  nodes_.clear();
  gone.swap(spaces_);
  block_count_ = 0;
}

void Replica::clear(Incarnation id, SpaceIndex space) {
  {
    MutexLock lock(mutex_);
    if (Node* node = find(id)) clear(*node, space);
  }
  tidy(space, false);
}

void Replica::tidy(SpaceIndex index, bool full) {
  const Space* old = nullptr;
  {
    MutexLock lock(mutex_);
    old = spaces_[index].get();
  }
  if (old == nullptr) return;
  const bool many_cleared = old->cleared_blocks > old->held_blocks / 2 + kClearedMin;
  if (!full && !many_cleared && !old->blocks.sparse()) return;
  auto space = std::make_unique<Space>();
  std::vector<HolderSets::Holder> numbers(old->holders.size(), kNone);
  for (std::size_t h = 0; h < old->holders.size(); ++h) {
    if (old->holders[h].node == 0) continue;
    numbers[h] = static_cast<HolderSets::Holder>(space->holders.size());
    space->holders.push_back(old->holders[h]);
  }
  space->held_blocks = old->held_blocks;
  std::vector<HolderSets::Id> ids(old->sets.end(), kUnknown);
  std::vector<HolderSets::Member> members;
  space->blocks = old->blocks.rewritten([&](HolderSets::Id id) {
    if (ids[id] == kUnknown) {
      members.clear();
      for (const auto& [holder, tiers] : old->sets.members(id)) {
        if (numbers[holder] != kNone) members.push_back({numbers[holder], tiers});
      }
      ids[id] = space->sets.of(members);
    }
    if (ids[id] != 0) space->sets.use(ids[id]);
    return ids[id];
  });
  MutexLock lock(mutex_);
  spaces_[index].swap(space);
  for (Node& node : nodes_) {
    if (node.holders[index] != kNone) node.holders[index] = numbers[node.holders[index]];
  }
}

bool Replica::apply(Space& space, HolderSets::Holder number, const Residency& residency, bool& complete) {
  const auto slot = space.blocks.slot_of(residency.tag);
  const HolderSets::Id before = slot ? space.blocks.at(*slot) : 0;
  const bool had = space.sets.tiers(before, number) != 0;
  const bool has = residency.tiers != 0;
  if (!had && !has) return false;
  if (!had && block_count_ >= blocks_max_) {
    complete = false;
    ++left_out_;
    return false;
  }
  if (!slot && space.blocks.full()) return true;
  const HolderSets::Id after = space.sets.with(before, number, residency.tiers);
  if (after != 0) space.sets.use(after);
  if (before != 0) space.sets.drop(before);
  if (!slot) {
    space.blocks.insert(residency.tag, after, residency.before);
  } else if (after != 0) {
    space.blocks.at(*slot) = after;
  } else {
    space.blocks.erase(*slot);
  }
  const std::uint64_t added = static_cast<std::uint64_t>(has) - static_cast<std::uint64_t>(had);
  space.holders[number].blocks += added;
  space.held_blocks += added;
  block_count_ += added;
  return false;
}

bool Replica::apply(Incarnation id, SpaceIndex index, std::span<const Residency> residencies) {
  bool complete = true;
  while (!residencies.empty()) {
    bool full = false;
    {
      MutexLock lock(mutex_);
      Node* node = find(id);
      if (node == nullptr) return complete;
      if (spaces_[index] == nullptr) spaces_[index] = std::make_unique<Space>();
      Space& space = *spaces_[index];
      full = node->holders[index] == kNone && space.holders.size() == kNone;
      if (!full && node->holders[index] == kNone) {
        node->holders[index] = static_cast<HolderSets::Holder>(space.holders.size());
        space.holders.push_back({node->id, node->until, 0});
      }
      const std::size_t piece = std::min(kPiece, residencies.size());
      prefetch(space.blocks, residencies.first(piece));
      std::size_t done = 0;
      while (done < piece && !full) {
        full = apply(space, node->holders[index], residencies[done], complete);
        if (!full) ++done;
      }
      residencies = residencies.subspan(done);
    }
    if (full) tidy(index, true);
  }
  tidy(index, false);
  return complete;
}

// ---- any thread ----------------------------------------------------------------------------------------------------

void Replica::narrow(const Space& space, HolderSets::Id id, std::uint32_t count, Nanos now,
                     std::vector<Holding>& out) const {
  const auto members = space.sets.members(id);
  auto member = members.begin();
  const bool first = standing_.empty();
  if (first) {
    for (const auto& [holder, tiers] : members) {
      const Holder& who = space.holders[holder];
      if (who.node != 0 && who.until >= now) standing_.push_back({holder, {who.node, 0, {}}});
    }
  }
  auto stays = standing_.begin();
  for (Standing& one : standing_) {
    while (member != members.end() && member->holder < one.holder) ++member;
    if (member == members.end() || member->holder != one.holder) {
      out.push_back(one.holding);
      continue;
    }
    one.holding.blocks += count;
    for (unsigned tier = 0; tier < kTierCount; ++tier) {
      if ((member->tiers >> tier & 1U) != 0) one.holding.in_tier[tier] += count;
    }
    *stays++ = one;
  }
  standing_.erase(stays, standing_.end());
}

void Replica::lookup(SpaceIndex index, std::span<const key::BlockKey> keys, Nanos now,
                     std::vector<Holding>& out) const {
  out.clear();
  MutexLock lock(mutex_);
  if (keys.empty() || spaces_[index] == nullptr) return;
  const Space& space = *spaces_[index];
  standing_.clear();
  auto next = space.blocks.kNowhere;
  std::size_t fetched = 0;
  for (std::size_t at = 0, likely = keys.size(); at < keys.size();) {
    const auto run = space.blocks.run(keys.subspan(at), likely, next);
    if (run.values.empty()) break;
    for (auto ids = run.values; !ids.empty();) {
      const std::size_t count = same(ids);
      narrow(space, ids[0], static_cast<std::uint32_t>(count), now, out);
      if (standing_.empty()) break;
      ids = ids.subspan(count);
    }
    if (standing_.empty()) break;
    at += run.values.size();
    next = run.next;
    likely = run.values.size();  // as a prompt that came turn by turn
    if (next != space.blocks.kNowhere || run.values.size() >= kAhead || at < fetched) continue;
    fetched = std::min(at + kAhead, keys.size());
    prefetch(space.blocks, keys.subspan(at, fetched - at));
  }
  // Who had fewer fell out before.
  for (const Standing& one : standing_) out.push_back(one.holding);
  std::reverse(out.begin(), out.end());
}

std::string Replica::address(Incarnation id, Nanos now) const {
  MutexLock lock(mutex_);
  const Node* node = find(id);
  return node == nullptr || node->until < now ? std::string() : node->address;
}

Replica::Stats Replica::stats() const {
  MutexLock lock(mutex_);
  Stats stats;
  stats.nodes = nodes_.size();
  stats.left_out = left_out_;
  for (const auto& space : spaces_) {
    if (space == nullptr) continue;
    stats.blocks += space->held_blocks;
    stats.memory_bytes += space->blocks.memory_bytes() + space->sets.memory_bytes();
  }
  return stats;
}

std::uint64_t Replica::blocks(Incarnation id) const {
  MutexLock lock(mutex_);
  const Node* node = find(id);
  return node == nullptr ? 0 : blocks_of(*node);
}

std::vector<Residency> Replica::content(Incarnation id, SpaceIndex index) const {
  MutexLock lock(mutex_);
  std::vector<Residency> all;
  const Node* node = find(id);
  if (node == nullptr || node->holders[index] == kNone) return all;
  const Space& space = *spaces_[index];
  space.blocks.walk(0, space.blocks.end(), [&](Tag tag, HolderSets::Id set, Before) {
    const Tiers tiers = space.sets.tiers(set, node->holders[index]);
    if (tiers != 0) all.push_back({tag, tiers});
  });
  return all;
}

}  // namespace flexkv::cluster
