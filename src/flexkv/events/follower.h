// What one reader has said of the blocks that a router can be told of: those with a description. Turns the changes of a
// subscription into what is new, each block and tier once, so that a router that only ever adds and removes is right
// after snapshots, lost connections and resets, too.
#pragma once

#include <cstddef>
#include <unordered_map>
#include <vector>

#include "flexkv/events/change.h"

namespace flexkv::events {

// Thread-compatible; owned by the reader. About 100 bytes for each block that was told.
class Follower {
 public:
  // Appends kAdded and kRemoved, always with a description; and kCleared, if nothing that was told is left and
  // `clears_at_once`: where the stream is also another cache's, that would clear too much.
  explicit Follower(bool clears_at_once) : clears_at_once_(clears_at_once) {}

  void apply(const Change& change, std::vector<Change>& out);
  // The reader's node is gone: nothing is kept any more.
  void lose(std::vector<Change>& out);
  // All that was told and not taken back, as kAdded, parents first.
  std::vector<Change> told() const;
  std::size_t block_count() const { return blocks_.size(); }

 private:
  struct Block {
    SpaceNumber space = 0;
    key::BlockKey parent{};
    DescriptionRef description;
    unsigned tiers = 0;      // a bit for each in which it was told
    unsigned confirmed = 0;  // of them, said again since the restart
  };
  void add(const Change& change, std::vector<Change>& out);
  // Takes back what `keep` does not give bits of.
  template <typename Keep>
  void take_back(Keep keep, std::vector<Change>& out);

  const bool clears_at_once_;
  std::unordered_map<key::BlockKey, Block, key::BlockKeyHash> blocks_;
};

}  // namespace flexkv::events
