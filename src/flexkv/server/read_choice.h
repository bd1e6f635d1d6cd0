// Where to read the beginning of a chain of blocks from, of several places that have more or less of it, by how long
// that is expected to take. Pure functions, thread-safe. All times are nanoseconds.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace flexkv::server {

struct ReadPlace {
  std::uint32_t blocks = 0;  // that it has of the chain, from the first on
  double wait = 0;           // before the first of them comes: distance, and what it was asked for before
  double per_block = 0;      // then; > 0
  std::uint64_t order = 0;   // of places that are as good and have as much the one with the least is taken
};

// A place, and one that has more behind what the first has. Numbers of places.
struct ReadChoice {
  std::size_t first = 0;
  std::optional<std::size_t> then;
  std::uint32_t blocks = 0;  // in all
  double wait = 0;           // of both
  double reading = 0;        // of all blocks, without the waits
};

// `block_worth`: what a block that is not read costs; 0: not known, then as many are read as there are. REQUIRES:
// there is a place, and each has a block
ReadChoice choose_read(std::span<const ReadPlace> places, double block_worth);

}  // namespace flexkv::server
