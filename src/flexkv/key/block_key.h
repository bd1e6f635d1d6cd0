// A block's identity: 128 bits of a cryptographic hash over everything that its KV depends on.
#pragma once

#include <cstdint>
#include <functional>

namespace flexkv::key {

struct BlockKey {
  std::uint64_t high = 0;
  std::uint64_t low = 0;

  friend bool operator==(const BlockKey&, const BlockKey&) = default;
};

// The bits of a key are uniform already, so any 64 of them make a hash value.
struct BlockKeyHash {
  std::size_t operator()(const BlockKey& key) const { return static_cast<std::size_t>(key.low); }
};

}  // namespace flexkv::key
