// What the parts of the directory have in common. Values.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "flexkv/cluster/residency_table.h"
#include "flexkv/key/block_key.h"

namespace flexkv::cluster {

using SpaceId = std::array<std::uint8_t, 32>;  // of a model and layout; blocks of another one are never looked at
using SpaceIndex = std::uint32_t;              // of this node's spaces, from 0
using Incarnation = std::uint64_t;             // of one run of a node: random, never 0, never used twice

using ResetId = std::uint64_t;  // of one reset of a cluster: random, never 0

// What has been forgotten. Two nodes are in one epoch if they know the same latest reset.
struct Epoch {
  std::uint64_t number = 0;  // of resets, for people: it may lag, or begin anew
  ResetId reset = 0;         // the latest one; 0: none, or one of an older version, which had numbers only
  friend bool operator==(const Epoch&, const Epoch&) = default;
};

constexpr unsigned kTierCount = 4;
constexpr std::size_t kSpacesMax = 16;
using Tiers = std::uint8_t;  // a bit for each tier in which a block is; 0: in none

// A change in this node's index, as its feed of events gives it.
struct Change {
  enum class Kind : std::uint8_t {
    kAdded,    // the block is in the tier now
    kRemoved,  // it is not there any more
    kCleared,  // no block of the space is found any more
    kRestart,  // all that was said before is void: kAdded of all that is kept follow, then kCurrent
    kCurrent,
  };
  Kind kind = Kind::kAdded;
  std::uint8_t tier = 0;  // below kTierCount
  SpaceIndex space = 0;
  key::BlockKey key{};
  key::BlockKey parent{};  // kAdded only. Zero: the block is the first of its chain
};

// What a batch says of a block: not what happened, but where it is now. So saying it twice, or late, does no harm.
struct Residency {
  Tag tag = 0;
  Tiers tiers = 0;
  Before before = kUnsaid;  // the block that it follows in its prompt; a hint
  friend bool operator==(const Residency&, const Residency&) = default;
};

// What others can expect of a node.
enum class Condition : std::uint8_t {
  kServes,
  kDrains,   // gives nothing more, and still writes what it has to
  kDrained,  // has nothing left to do
  kEnds,     // its farewell
};
constexpr std::size_t kConditionCount = 4;
const char* condition_name(Condition condition);

// What a node says of itself with each heartbeat.
struct Beat {
  struct Space {
    SpaceId id{};
    std::uint64_t head = 0;        // the newest batch of its stream
    std::uint64_t generation = 0;  // of the snapshot, 0: none; then the stream alone says it all
    std::uint64_t base = 0;        // the snapshot is to be followed by the stream behind this batch
    std::uint64_t part_count = 0;
    friend bool operator==(const Space&, const Space&) = default;
  };
  std::uint64_t number = 0;  // another one each time; below 2^56
  std::string name;          // of the node, for people
  std::string address;       // where other nodes reach it; theirs to read
  std::vector<Space> spaces;
  std::uint64_t resets = 0;  // says which resets from outside the cluster it knows of; 0: it hears of none
  Condition condition = Condition::kServes;
  friend bool operator==(const Beat&, const Beat&) = default;
};

}  // namespace flexkv::cluster
