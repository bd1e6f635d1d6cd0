// Directory's first request of a round. Private to this module.
#pragma once

#include <cstddef>

namespace flexkv::cluster {

// Answers of a look: the epoch, its reset, whether this node's is known, the members, the bell's newest entry, then
// what is asked of each space.
constexpr std::size_t kHeardWanted = 3;
constexpr std::size_t kMembers = 4;
constexpr std::size_t kBell = 5;
constexpr std::size_t kFirstAsk = 6;

}  // namespace flexkv::cluster
