// OpenSSL 3 deprecates the low-level calls in favour of EVP, which has no way to run the compression function alone and
// costs over half a microsecond a message in look-ups and allocation: five times the hashing of a block of tokens.
#define OPENSSL_SUPPRESS_DEPRECATED

#include "flexkv/key/sha256.h"

#include <openssl/sha.h>

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::key {

ShaState sha256_initial_state() {
  SHA256_CTX context;
  SHA256_Init(&context);
  ShaState state;
  std::copy_n(context.h, state.size(), state.begin());
  return state;
}

void sha256_compress(ShaState& state, std::span<const std::uint8_t> data) {
  FLEXKV_ASSERT(data.size() % kShaBlockBytes == 0);
  SHA256_CTX context{};
  std::copy(state.begin(), state.end(), context.h);
  for (std::size_t at = 0; at < data.size(); at += kShaBlockBytes) SHA256_Transform(&context, data.data() + at);
  std::copy_n(context.h, state.size(), state.begin());
}

Digest to_digest(const ShaState& state) {
  Digest digest;
  for (std::size_t i = 0; i < digest.size(); ++i) {
    digest[i] = static_cast<std::uint8_t>(state[i / 4] >> (24 - 8 * (i % 4)));
  }
  return digest;
}

}  // namespace flexkv::key
