// One change of what can be found, as readers get it. Values; a description is shared and never changes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flexkv/key/block_key.h"

namespace flexkv::events {

// What an engine calls a block in events of its own. A key tells none of it; only engines know, when they save or find
// a block. So a block that came from a drive after a restart has none until a request finds it.
struct Description {
  std::string hash;                            // the engine's own, 1 to 256 bytes
  std::string parent_hash;                     // of the block before it; empty: there is none
  std::vector<std::uint32_t> tokens;           // of this block
  std::shared_ptr<const std::string> details;  // what else the engine's events say of it; only engines read it
};
using DescriptionRef = std::shared_ptr<const Description>;

using SpaceNumber = std::uint32_t;  // of blocks of one kind, unique in the life of a node; 0: none

struct Change {
  enum class Kind : std::uint8_t {
    kAdded,    // the block has a place in the tier. Said again when its description becomes known
    kRemoved,  // it has none there any more
    kCleared,  // no block of the space is found any more
    kRestart,  // all that was said before is void: kAdded of all that is kept follow, parents first, then kCurrent
    kCurrent,
  };
  Kind kind = Kind::kAdded;
  std::uint8_t tier = 0;  // 0 = host, 1 = disk, as the index numbers them
  SpaceNumber space = 0;
  key::BlockKey key{};
  key::BlockKey parent{};      // kAdded only. Zero: the block is the first of its chain
  DescriptionRef description;  // null: not known
};

}  // namespace flexkv::events
