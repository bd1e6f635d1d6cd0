#include "flexkv/key/token_hashes.h"

#include <algorithm>
#include <array>
#include <limits>

#include "flexkv/key/namespace.h"

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
  TokenHashes result(TokenChain(root.finish(), block_tokens));
  result.hashes_.reserve(tokens.size() / block_tokens);
  if (auto taken = result.append(tokens); !taken) return taken.error();
  return result;
}

Status TokenHashes::append(std::span<const std::int64_t> tokens) {
  using Limits = std::numeric_limits<std::int32_t>;
  const auto cut = std::find_if(tokens.begin(), tokens.end(),
                                [](std::int64_t token) { return token < Limits::min() || token > Limits::max(); });
  if (cut != tokens.end()) {
    return Error{ErrorCode::kInvalidArgument,
                 "token " + std::to_string(tokens_ + static_cast<std::size_t>(cut - tokens.begin())) + " is " +
                     std::to_string(*cut) + ": token ids must fit in 32 bits"};
  }
  std::array<std::int32_t, kBatch> narrow;
  for (std::size_t begin = 0; begin < tokens.size(); begin += kBatch) {
    const auto batch = tokens.subspan(begin, std::min(kBatch, tokens.size() - begin));
    std::transform(batch.begin(), batch.end(), narrow.begin(),
                   [](auto token) { return static_cast<std::int32_t>(token); });
    chain_.append(std::span(narrow).first(batch.size()), hashes_);
  }
  tokens_ += tokens.size();
  return {};
}

}  // namespace flexkv::key
