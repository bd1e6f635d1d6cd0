// Block hashes of a prompt for engines that have none of their own: of its tokens and of a namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/key/sha256.h"
#include "flexkv/key/token_chain.h"

namespace flexkv::key {

// What stands for an engine's chained block hashes (see fold_engine_hash): one of 32 bytes for each whole block, each
// of them depending on all tokens before it, on the block size and on every part of the namespace, in order. No secret
// is in them; the client folds that in. Value that only grows. Thread-compatible.
class TokenHashes {
 public:
  // Refuses tokens that do not fit 32 bits, naming the first, and a block size of 0.
  static Result<TokenHashes> of(std::span<const std::int64_t> tokens, std::uint32_t block_tokens,
                                std::span<const std::string> name_space);

  // Goes on with the tokens that follow. Refuses as of() does, and then takes none of them.
  Status append(std::span<const std::int64_t> tokens);

  std::size_t size() const { return hashes_.size(); }
  std::span<const std::byte> operator[](std::size_t block) const { return std::as_bytes(std::span(hashes_[block])); }

 private:
  explicit TokenHashes(TokenChain chain) : chain_(std::move(chain)) {}

  TokenChain chain_;
  std::size_t tokens_ = 0;
  std::vector<Digest> hashes_;
};

}  // namespace flexkv::key
