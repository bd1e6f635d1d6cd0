// Sets of holders, each with the tiers in which it has a block: a set is kept once, however many blocks have it, so
// that a block takes a number only. Blocks of one prompt have few sets.
//
// Thread-compatible; any number of threads may read at once. About 120 bytes a set and 4 for each of its members.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "flexkv/cluster/types.h"

namespace flexkv::cluster {

class HolderSets {
 public:
  using Id = std::uint32_t;  // 0: the empty set
  using Holder = std::uint16_t;
  struct Member {
    Holder holder;
    std::uint16_t tiers;  // never 0
    friend bool operator==(const Member&, const Member&) = default;
  };

  HolderSets() : sets_(1) {}

  // The set that has this holder in these tiers (0: nowhere), and is `from` else. It lasts as long as it is used: until
  // use() has been called for it, no other call that may change sets comes in between.
  Id with(Id from, Holder holder, Tiers tiers);
  // `members`: ascending. As with() for the rest.
  Id of(std::span<const Member> members);
  void use(Id id) { ++sets_[id].uses; }
  void drop(Id id);

  // By holder, ascending. Valid until sets change.
  std::span<const Member> members(Id id) const { return sets_[id].members; }
  Tiers tiers(Id id, Holder holder) const;
  // All ids are below this.
  Id end() const { return static_cast<Id>(sets_.size()); }
  std::size_t memory_bytes() const;

 private:
  struct Set {
    std::vector<Member> members;
    std::uint64_t uses = 0;
  };
  static std::uint64_t hash(std::span<const Member> members);
  void forget(Id id);

  std::vector<Set> sets_;  // by id
  std::unordered_multimap<std::uint64_t, Id> by_hash_;
  std::vector<Id> free_;
  std::size_t member_count_ = 0;
  std::vector<Member> scratch_;
  // The last answer of with(): blocks that change in a row ask the same.
  struct Asked {
    Id from = 0;
    Holder holder = 0;
    Tiers tiers = 0;
    Id to = 0;
  } asked_;
};

}  // namespace flexkv::cluster
