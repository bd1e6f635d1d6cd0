// SHA-256 as this module needs it: the compression function on whole 64-byte blocks. Stateless functions, thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "flexkv/key/block_key.h"

namespace flexkv::key {

using Digest = std::array<std::uint8_t, 32>;
using ShaState = std::array<std::uint32_t, 8>;  // a chaining value, in words

inline constexpr std::size_t kShaBlockBytes = 64;

// The chaining value that SHA-256 starts from.
ShaState sha256_initial_state();

// Absorbs `data` into `state`. REQUIRES: data.size() is a multiple of kShaBlockBytes.
void sha256_compress(ShaState& state, std::span<const std::uint8_t> data);

// The bytes of a chaining value in the order in which SHA-256 prints them.
Digest to_digest(const ShaState& state);

// The first 16 of those bytes, each half big endian.
inline BlockKey to_block_key(const ShaState& state) {
  return {std::uint64_t{state[0]} << 32 | state[1], std::uint64_t{state[2]} << 32 | state[3]};
}

}  // namespace flexkv::key
