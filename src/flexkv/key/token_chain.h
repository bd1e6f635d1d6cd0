// Keys of the blocks of a prompt, computed from its tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flexkv/key/block_key.h"
#include "flexkv/key/namespace.h"
#include "flexkv/key/sha256.h"

namespace flexkv::key {

// A cascade of SHA-256's compression function C:
//   state_-1 = C(initial state, root || "flexkv token chain 1" || tokens_per_block as 4 bytes little endian || zeros)
//   state_i  = C(state_i-1, tokens of block i as int32 little endian, zero-padded to a multiple of 64 bytes)
//   key_i    = first 16 of the 32 bytes of state_i
// The chain carries all 32 bytes, so a key depends on every token before it and a collision inside the chain costs
// 2^128 work. Only half of a state is ever shown, so a key tells nothing that helps to continue its chain, and the
// cascade is pseudorandom to those who do not know the root (the argument of AMAC: Bellare, Bernstein, Tessaro,
// "Hash-Function Based PRFs", Eurocrypt 2016). The fixed block size, bound into the first state, is what makes length
// padding needless. Against SHA-256(state || tokens) this halves the work: one compression for a block of 16 tokens.
//
// Thread-compatible. Holds at most one block of tokens.
class TokenChain {
 public:
  // REQUIRES: tokens_per_block > 0
  TokenChain(const Root& root, std::size_t tokens_per_block);

  // Appends to `out` the key of every block that these tokens complete; what is left over waits for the next call, so
  // the keys do not depend on how the tokens are cut into calls.
  void append(std::span<const std::int32_t> tokens, std::vector<BlockKey>& out);
  // The same with all 32 bytes of the states: for chains below a root that is no secret, as an engine's block hashes.
  void append(std::span<const std::int32_t> tokens, std::vector<Digest>& out);

 private:
  template <typename Emit>
  void absorb(std::span<const std::int32_t> tokens, Emit&& emit);

  ShaState state_;
  std::size_t tokens_per_block_;
  std::size_t waiting_ = 0;           // tokens in buffer_
  std::vector<std::uint8_t> buffer_;  // one block, zero-padded
};

}  // namespace flexkv::key
