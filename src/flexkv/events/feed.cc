#include "flexkv/events/feed.h"

#include <algorithm>

namespace flexkv::events {

void Feed::append(Change change) {
  if (changes_.size() == changes_max_) changes_.pop_front();
  changes_.push_back(std::move(change));
  ++end_;
  if (!wake_wanted_) return;
  wake_wanted_ = false;
  wake_();
}

DescriptionRef SpaceFeed::find(const key::BlockKey& key) const {
  const auto found = descriptions_.find(key);
  return found == descriptions_.end() ? nullptr : found->second;
}

Change SpaceFeed::kept(unsigned tier, const key::BlockKey& parent, const key::BlockKey& key) const {
  return {Change::Kind::kAdded, static_cast<std::uint8_t>(tier), space_, key, parent, find(key)};
}

void SpaceFeed::added(unsigned tier, const key::BlockKey& parent, std::span<const key::BlockKey> keys) {
  for (std::size_t i = 0; i < keys.size(); ++i) feed_.append(kept(tier, i == 0 ? parent : keys[i - 1], keys[i]));
}

void SpaceFeed::removed(unsigned tier, const key::BlockKey& key, bool last) {
  feed_.append({Change::Kind::kRemoved, static_cast<std::uint8_t>(tier), space_, key, {}, find(key)});
  if (last) descriptions_.erase(key);
}

void SpaceFeed::cleared() {
  feed_.append({Change::Kind::kCleared, 0, space_, {}, {}, nullptr});
  descriptions_.clear();
}

void SpaceFeed::describe(const key::BlockKey& parent, const key::BlockKey& key, const DescriptionRef& description,
                         unsigned tiers) {
  if (tiers == 0 || !descriptions_.emplace(key, description).second) return;
  for (unsigned tier = 0; tiers >> tier != 0; ++tier) {
    if ((tiers >> tier & 1) != 0) feed_.append(kept(tier, parent, key));
  }
}

bool Subscription::read(const Feed& feed, SpaceNumber space, std::size_t changes_max,
                        const std::function<void(std::vector<Change>&)>& snapshot, std::vector<Change>& out) {
  if (!current_ || space != space_ || next_ < feed.begin()) {
    current_ = true;
    space_ = space;
    next_ = feed.end();
    backlog_.clear();
    backlog_.push_back({.kind = Change::Kind::kRestart, .space = space, .description = nullptr});
    snapshot(backlog_);
    backlog_.push_back({.kind = Change::Kind::kCurrent, .space = space, .description = nullptr});
    std::ranges::reverse(backlog_);
  }
  std::size_t room = changes_max;
  for (; room > 0 && !backlog_.empty(); --room) {
    out.push_back(std::move(backlog_.back()));
    backlog_.pop_back();
  }
  if (!backlog_.empty()) return true;
  backlog_.shrink_to_fit();
  for (; room > 0 && next_ < feed.end(); ++next_) {
    const Change& change = feed.at(next_);
    if (space != 0 && change.space != space) continue;
    out.push_back(change);
    --room;
  }
  return next_ < feed.end();
}

}  // namespace flexkv::events
