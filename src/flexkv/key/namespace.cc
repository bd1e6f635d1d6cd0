#include "flexkv/key/namespace.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "flexkv/base/assert.h"

namespace flexkv::key {
namespace {

constexpr std::size_t kLengthBytes = 8;

void put_length(std::uint8_t* out, std::uint64_t value, bool big_endian) {
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    out[big_endian ? kLengthBytes - 1 - i : i] = static_cast<std::uint8_t>(value >> (8 * i));
  }
}

// SHA-256 of the first `size` bytes of `buffer`. REQUIRES: room for the padding behind them (72 bytes more).
ShaState sha256(std::span<std::uint8_t> buffer, std::size_t size) {
  const std::size_t padded = (size + 1 + kLengthBytes + kShaBlockBytes - 1) / kShaBlockBytes * kShaBlockBytes;
  FLEXKV_ASSERT(padded <= buffer.size());
  std::fill(buffer.begin() + static_cast<std::ptrdiff_t>(size), buffer.begin() + static_cast<std::ptrdiff_t>(padded),
            std::uint8_t{0});
  buffer[size] = 0x80;
  put_length(buffer.data() + padded - kLengthBytes, std::uint64_t{size} * 8, true);
  ShaState state = sha256_initial_state();
  sha256_compress(state, buffer.first(padded));
  return state;
}

}  // namespace

NamespaceBuilder::NamespaceBuilder(std::span<const std::uint8_t, 32> secret) : input_(secret.begin(), secret.end()) {}

NamespaceBuilder& NamespaceBuilder::add(Field field, std::span<const std::byte> value) {
  const std::size_t at = input_.size();
  input_.resize(at + 1 + kLengthBytes + value.size());
  input_[at] = static_cast<std::uint8_t>(field);
  put_length(input_.data() + at + 1, value.size(), false);
  std::transform(value.begin(), value.end(), input_.begin() + static_cast<std::ptrdiff_t>(at + 1 + kLengthBytes),
                 [](std::byte b) { return std::to_integer<std::uint8_t>(b); });
  return *this;
}

NamespaceBuilder& NamespaceBuilder::add(Field field, std::string_view value) {
  return add(field, std::as_bytes(std::span(value.data(), value.size())));
}

Root NamespaceBuilder::finish() const {
  std::vector<std::uint8_t> buffer(input_);
  buffer.resize(input_.size() + 1 + kLengthBytes + kShaBlockBytes);
  return to_digest(sha256(buffer, input_.size()));
}

BlockKey hash_engine_hash(const Root& root, std::span<const std::byte> engine_hash) {
  FLEXKV_ASSERT(engine_hash.size() <= kEngineHashBytesMax);
  std::array<std::uint8_t, 32 + kLengthBytes + kEngineHashBytesMax + 1 + kLengthBytes + kShaBlockBytes> buffer;
  std::copy(root.begin(), root.end(), buffer.begin());
  put_length(buffer.data() + root.size(), engine_hash.size(), false);
  std::transform(engine_hash.begin(), engine_hash.end(), buffer.begin() + 32 + kLengthBytes,
                 [](std::byte b) { return std::to_integer<std::uint8_t>(b); });
  return to_block_key(sha256(buffer, root.size() + kLengthBytes + engine_hash.size()));
}

}  // namespace flexkv::key
