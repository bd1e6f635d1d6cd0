#include "flexkv/key/token_chain.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <string_view>

#include "flexkv/base/assert.h"

namespace flexkv::key {

static_assert(std::endian::native == std::endian::little, "tokens are hashed as they lie in memory");

constexpr std::string_view kLabel = "flexkv token chain 1";

TokenChain::TokenChain(const Root& root, std::size_t tokens_per_block)
    : state_(sha256_initial_state()), tokens_per_block_(tokens_per_block) {
  FLEXKV_ASSERT(tokens_per_block > 0 && tokens_per_block <= UINT32_MAX);
  std::array<std::uint8_t, kShaBlockBytes> first{};
  static_assert(sizeof(Root) + kLabel.size() + sizeof(std::uint32_t) <= kShaBlockBytes);
  const auto block_size = static_cast<std::uint32_t>(tokens_per_block);
  std::memcpy(first.data(), root.data(), root.size());
  std::memcpy(first.data() + root.size(), kLabel.data(), kLabel.size());
  std::memcpy(first.data() + root.size() + kLabel.size(), &block_size, sizeof(block_size));
  sha256_compress(state_, first);
  const std::size_t bytes = tokens_per_block * sizeof(std::int32_t);
  buffer_.resize((bytes + kShaBlockBytes - 1) / kShaBlockBytes * kShaBlockBytes);
}

void TokenChain::append(std::span<const std::int32_t> tokens, std::vector<BlockKey>& out) {
  absorb(tokens, [&](const ShaState& state) { out.push_back(to_block_key(state)); });
}

void TokenChain::append(std::span<const std::int32_t> tokens, std::vector<Digest>& out) {
  absorb(tokens, [&](const ShaState& state) { out.push_back(to_digest(state)); });
}

template <typename Emit>
void TokenChain::absorb(std::span<const std::int32_t> tokens, Emit&& emit) {
  while (!tokens.empty()) {
    const std::size_t taken = std::min(tokens.size(), tokens_per_block_ - waiting_);
    std::memcpy(buffer_.data() + waiting_ * sizeof(std::int32_t), tokens.data(), taken * sizeof(std::int32_t));
    tokens = tokens.subspan(taken);
    waiting_ += taken;
    if (waiting_ < tokens_per_block_) return;
    sha256_compress(state_, buffer_);
    emit(state_);
    waiting_ = 0;
  }
}

}  // namespace flexkv::key
