// The changes of a node's indexes in one order, for readers that come at their own pace. See README.md.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <span>
#include <unordered_map>
#include <vector>

#include "flexkv/events/change.h"

namespace flexkv::events {

class Feed {
 public:
  // Holds the last `changes_max` changes. `wake` is called, inside the call that makes a change, at the first change
  // after want_wake(); it must not call back.
  Feed(std::size_t changes_max, std::function<void()> wake) : changes_max_(changes_max), wake_(std::move(wake)) {}

  void append(Change change);
  // Sequence numbers: of the oldest change held, and of the next one to come.
  std::uint64_t begin() const { return end_ - changes_.size(); }
  std::uint64_t end() const { return end_; }
  // REQUIRES: begin() <= sequence < end()
  const Change& at(std::uint64_t sequence) const { return changes_[sequence - begin()]; }
  void want_wake() { wake_wanted_ = true; }

 private:
  const std::size_t changes_max_;
  const std::function<void()> wake_;
  std::deque<Change> changes_;
  std::uint64_t end_ = 0;
  bool wake_wanted_ = false;
};

// How one index writes to the feed, which must outlive it. Keeps the descriptions of blocks as long as these have a
// place anywhere.
class SpaceFeed {
 public:
  SpaceFeed(Feed& feed, SpaceNumber space) : feed_(feed), space_(space) {}
  ~SpaceFeed() { cleared(); }
  SpaceFeed(const SpaceFeed&) = delete;
  SpaceFeed& operator=(const SpaceFeed&) = delete;

  SpaceNumber space() const { return space_; }

  // By the index. `parent`: of the first key; each of the others follows the one before it.
  void added(unsigned tier, const key::BlockKey& parent, std::span<const key::BlockKey> keys);
  // `last`: it has no place in any tier now.
  void removed(unsigned tier, const key::BlockKey& key, bool last);
  void cleared();

  bool described(const key::BlockKey& key) const { return descriptions_.contains(key); }
  // What a block is called that has a place now, in the tiers whose bits are set. No effect if that is known.
  void describe(const key::BlockKey& parent, const key::BlockKey& key, const DescriptionRef& description,
                unsigned tiers);
  // As in a snapshot.
  Change kept(unsigned tier, const key::BlockKey& parent, const key::BlockKey& key) const;
  std::size_t description_count() const { return descriptions_.size(); }

 private:
  DescriptionRef find(const key::BlockKey& key) const;

  Feed& feed_;
  const SpaceNumber space_;
  std::unordered_map<key::BlockKey, DescriptionRef, key::BlockKeyHash> descriptions_;
};

// A reader's place in the feed.
class Subscription {
 public:
  // Appends what has happened since the last call, at most `changes_max` changes. When that is no longer held, and at
  // first, `snapshot` is asked to append all that is kept, parents first. `space`: only that one's, 0 for all; when it
  // is another one than before, the reader begins anew. Returns whether there is more.
  bool read(const Feed& feed, SpaceNumber space, std::size_t changes_max,
            const std::function<void(std::vector<Change>&)>& snapshot, std::vector<Change>& out);

 private:
  bool current_ = false;
  SpaceNumber space_ = 0;
  std::uint64_t next_ = 0;
  std::vector<Change> backlog_;  // of a snapshot, the next one last
};

}  // namespace flexkv::events
