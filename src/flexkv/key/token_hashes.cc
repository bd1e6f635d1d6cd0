#include "flexkv/key/token_hashes.h"

#include <algorithm>
#include <array>
#include <limits>

#include "flexkv/key/namespace.h"
#include "flexkv/key/token_chain.h"

namespace flexkv::key {
namespace {

// Tokens are narrowed so many at a time.
constexpr std::size_t kBatch = 4096;

}  // namespace

Result<TokenHashes> TokenHashes::of(std::span<const std::int64_t> tokens, std::uint32_t block_tokens,
                                    std::span<const std::string> name_space) {
  if (block_tokens == 0) return Error{ErrorCode::kInvalidArgument, "a block must have at least one token"};
  constexpr std::array<std::uint8_t, 32> kNoSecret{};
  NamespaceBuilder root(kNoSecret);
  root.add(Field::kEngineFormat, "flexkv token hashes 1");
  for (const std::string& part : name_space) root.add(Field::kUserNamespace, part);
  TokenHashes result;
  result.hashes_.reserve(tokens.size() / block_tokens);
  TokenChain chain(root.finish(), block_tokens);
  std::array<std::int32_t, kBatch> narrow;
  for (std::size_t begin = 0; begin < tokens.size(); begin += kBatch) {
    const auto batch = tokens.subspan(begin, std::min(kBatch, tokens.size() - begin));
    for (std::size_t i = 0; i < batch.size(); ++i) {
      narrow[i] = static_cast<std::int32_t>(batch[i]);
      if (narrow[i] != batch[i]) {
        return Error{ErrorCode::kInvalidArgument, "token " + std::to_string(begin + i) + " is " +
                                                      std::to_string(batch[i]) + ": token ids must fit in 32 bits"};
      }
    }
    chain.append(std::span(narrow).first(batch.size()), result.hashes_);
  }
  return result;
}

}  // namespace flexkv::key
