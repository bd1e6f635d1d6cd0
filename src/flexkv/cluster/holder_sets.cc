#include "flexkv/cluster/holder_sets.h"

#include <xxhash.h>

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::cluster {
namespace {

constexpr std::size_t kSetBytes = 120;  // with what the allocator and the hash table take for it

bool before(const HolderSets::Member& member, HolderSets::Holder holder) { return member.holder < holder; }

}  // namespace

std::uint64_t HolderSets::hash(std::span<const Member> members) {
  return XXH3_64bits(members.data(), members.size_bytes());
}

HolderSets::Id HolderSets::of(std::span<const Member> members) {
  if (members.empty()) return 0;
  const std::uint64_t sum = hash(members);
  const auto [begin, end] = by_hash_.equal_range(sum);
  for (auto same = begin; same != end; ++same) {
    if (std::ranges::equal(members, sets_[same->second].members)) return same->second;
  }
  if (free_.empty()) {
    free_.push_back(static_cast<Id>(sets_.size()));
    sets_.emplace_back();
  }
  const Id id = free_.back();
  free_.pop_back();
  sets_[id].members.assign(members.begin(), members.end());
  member_count_ += members.size();
  by_hash_.emplace(sum, id);
  return id;
}

HolderSets::Id HolderSets::with(Id from, Holder holder, Tiers tiers) {
  if (asked_.to != from && asked_.from == from && asked_.holder == holder && asked_.tiers == tiers) return asked_.to;
  scratch_ = sets_[from].members;
  const auto at = std::lower_bound(scratch_.begin(), scratch_.end(), holder, before);
  const bool there = at != scratch_.end() && at->holder == holder;
  if (there && tiers != 0) {
    at->tiers = tiers;
  } else if (there) {
    scratch_.erase(at);
  } else if (tiers != 0) {
    scratch_.insert(at, {holder, tiers});
  }
  asked_ = {from, holder, tiers, of(scratch_)};
  return asked_.to;
}

void HolderSets::drop(Id id) {
  FLEXKV_ASSERT(sets_[id].uses > 0);
  if (--sets_[id].uses == 0 && id != 0) forget(id);
}

void HolderSets::forget(Id id) {
  if (asked_.from == id || asked_.to == id) asked_ = {};
  const auto [begin, end] = by_hash_.equal_range(hash(sets_[id].members));
  by_hash_.erase(std::find_if(begin, end, [&](const auto& entry) { return entry.second == id; }));
  member_count_ -= sets_[id].members.size();
  sets_[id].members = {};
  free_.push_back(id);
}

Tiers HolderSets::tiers(Id id, Holder holder) const {
  const auto& members = sets_[id].members;
  const auto at = std::lower_bound(members.begin(), members.end(), holder, before);
  return at == members.end() || at->holder != holder ? Tiers{0} : static_cast<Tiers>(at->tiers);
}

std::size_t HolderSets::memory_bytes() const { return sets_.size() * kSetBytes + member_count_ * sizeof(Member); }

}  // namespace flexkv::cluster
