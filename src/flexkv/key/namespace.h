// The root of a key chain: what, besides the tokens before it, a block's KV depends on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "flexkv/key/block_key.h"
#include "flexkv/key/sha256.h"

namespace flexkv::key {

using Root = Digest;

// Values are part of every key: append new ones, never renumber.
enum class Field : std::uint8_t {
  kModel = 1,
  kWeightEpoch = 2,
  kKvDtype = 3,
  kLayout = 4,
  kLora = 5,
  kSalt = 6,
  kMultimodal = 7,
  kUserNamespace = 8,
  kEngineFormat = 9,
  kParallel = 10,
};

// Collects typed fields and hashes them into a Root: SHA-256 of the secret and, per field, {type, length as 8 bytes
// little endian, bytes}. The lengths make sure that no two different lists of fields give the same input. Order and
// repetition of fields count. The secret makes roots, and so keys, unpredictable to those who do not hold it.
// Thread-compatible. Holds a copy of all fields added; memory is bounded only by what the caller adds.
class NamespaceBuilder {
 public:
  explicit NamespaceBuilder(std::span<const std::uint8_t, 32> secret);

  NamespaceBuilder& add(Field field, std::span<const std::byte> value);
  NamespaceBuilder& add(Field field, std::string_view value);
  Root finish() const;

 private:
  std::vector<std::uint8_t> input_;
};

inline constexpr std::size_t kEngineHashBytesMax = 256;
// What fold_engine_hash() does with hashes of other than 32 bytes.
BlockKey hash_engine_hash(const Root& root, std::span<const std::byte> engine_hash);

// The key of a block that an engine has already named by a safe hash, chained over all tokens before it.
//
// A hash of 32 bytes is taken for SHA-256, vLLM's default: key = its first 16 bytes XOR the root's first 16. Half of a
// SHA-256 is as hard to collide as any 128-bit hash, about 2^64 tries; so is finding two hashes that differ by exactly
// the difference of two roots, which only who holds the secret knows. Unlike a hash of both, a key shown together with
// its engine hash reveals that part of the root: keys do not leave the node and its clients. Hashing again would cost
// 80 to 120 ns a block.
// Any other length: the first 16 bytes of SHA-256(root || length as 8 bytes little endian || engine_hash).
// REQUIRES: engine_hash.size() <= kEngineHashBytesMax.
inline BlockKey fold_engine_hash(const Root& root, std::span<const std::byte> engine_hash) {
  if (engine_hash.size() != root.size()) return hash_engine_hash(root, engine_hash);
  BlockKey hash;
  BlockKey mask;
  std::memcpy(&hash, engine_hash.data(), sizeof hash);
  std::memcpy(&mask, root.data(), sizeof mask);
  return {hash.high ^ mask.high, hash.low ^ mask.low};
}

}  // namespace flexkv::key
