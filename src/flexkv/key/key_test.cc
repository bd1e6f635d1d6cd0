#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <rapidcheck.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <set>
#include <string>

#include "flexkv/base/prng.h"
#include "flexkv/key/namespace.h"
#include "flexkv/key/token_chain.h"
#include "flexkv/key/token_hashes.h"

namespace flexkv::key {
namespace {

__extension__ using Wide = unsigned __int128;
using Bytes = std::vector<std::uint8_t>;

Digest evp_sha256(const Bytes& input) {
  Digest digest;
  EVP_Digest(input.data(), input.size(), digest.data(), nullptr, EVP_sha256(), nullptr);
  return digest;
}

BlockKey first_16_bytes(const Digest& digest) {
  BlockKey key;
  for (std::size_t i = 0; i < 8; ++i) {
    key.high = key.high << 8 | digest[i];
    key.low = key.low << 8 | digest[8 + i];
  }
  return key;
}

void put_little_endian(Bytes& out, std::uint64_t value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) out.push_back(static_cast<std::uint8_t>(value >> (8 * i)));
}

// The compression function as FIPS 180-4 writes it; its constants are computed from their definition.
struct PlainSha {
  std::array<std::uint32_t, 64> k;
  std::array<std::uint32_t, 8> initial;

  PlainSha() {
    auto fraction = [](unsigned prime, bool cube) {  // first 32 bits of the fraction of the square or cube root
      const auto target = static_cast<Wide>(prime) << (cube ? 96 : 64);
      std::uint64_t root = 0;
      for (int bit = 35; bit >= 0; --bit) {
        const auto tried = static_cast<Wide>(root | std::uint64_t{1} << bit);
        if ((cube ? tried * tried * tried : tried * tried) <= target) root |= std::uint64_t{1} << bit;
      }
      return static_cast<std::uint32_t>(root);
    };
    unsigned count = 0;
    for (unsigned n = 2; count < 64; ++n) {
      bool prime = true;
      for (unsigned d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
      if (!prime) continue;
      if (count < 8) initial[count] = fraction(n, false);
      k[count++] = fraction(n, true);
    }
  }

  void compress(std::array<std::uint32_t, 8>& h, const std::uint8_t* block) const {
    std::array<std::uint32_t, 64> w;
    for (unsigned i = 0; i < 64; ++i) {
      if (i < 16) {
        w[i] = std::uint32_t{block[4 * i]} << 24 | std::uint32_t{block[4 * i + 1]} << 16 |
               std::uint32_t{block[4 * i + 2]} << 8 | block[4 * i + 3];
      } else {
        const std::uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
        const std::uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
      }
    }
    std::array<std::uint32_t, 8> v = h;
    for (unsigned i = 0; i < 64; ++i) {
      const std::uint32_t s1 = std::rotr(v[4], 6) ^ std::rotr(v[4], 11) ^ std::rotr(v[4], 25);
      const std::uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
      const std::uint32_t s0 = std::rotr(v[0], 2) ^ std::rotr(v[0], 13) ^ std::rotr(v[0], 22);
      const std::uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      for (unsigned j = 7; j > 0; --j) v[j] = v[j - 1];
      v[4] += t1;
      v[0] = t1 + t2;
    }
    for (unsigned i = 0; i < 8; ++i) h[i] += v[i];
  }
};

Root test_root(std::string_view salt = "") {
  std::array<std::uint8_t, 32> secret{};
  secret[0] = 7;
  return NamespaceBuilder(secret).add(Field::kModel, "m").add(Field::kSalt, salt).finish();
}

std::vector<BlockKey> chain_keys(const Root& root, std::size_t tokens_per_block,
                                 const std::vector<std::int32_t>& tokens) {
  std::vector<BlockKey> keys;
  TokenChain(root, tokens_per_block).append(tokens, keys);
  return keys;
}

// The definition in token_chain.h, word by word.
std::vector<BlockKey> plain_chain_keys(const Root& root, std::size_t tokens_per_block,
                                       const std::vector<std::int32_t>& tokens) {
  static const PlainSha sha;
  auto state = sha.initial;
  auto absorb = [&](Bytes bytes) {
    bytes.resize((bytes.size() + 63) / 64 * 64);
    for (std::size_t at = 0; at < bytes.size(); at += 64) sha.compress(state, bytes.data() + at);
  };
  Bytes first(root.begin(), root.end());
  for (char c : std::string_view("flexkv token chain 1")) first.push_back(static_cast<std::uint8_t>(c));
  put_little_endian(first, tokens_per_block, 4);
  absorb(first);
  std::vector<BlockKey> keys;
  for (std::size_t at = 0; at + tokens_per_block <= tokens.size(); at += tokens_per_block) {
    Bytes block;
    for (std::size_t i = 0; i < tokens_per_block; ++i) {
      put_little_endian(block, static_cast<std::uint32_t>(tokens[at + i]), 4);
    }
    absorb(block);
    keys.push_back(first_16_bytes(to_digest(state)));
  }
  return keys;
}

TEST(Sha256, CompressionAgreesWithEvpAndWithThePlainOne) {
  const PlainSha plain;
  EXPECT_EQ(plain.initial, sha256_initial_state());
  Bytes padded(64);  // the message "abc"
  padded[0] = 'a', padded[1] = 'b', padded[2] = 'c', padded[3] = 0x80, padded[63] = 24;
  ShaState state = sha256_initial_state();
  sha256_compress(state, padded);
  auto plain_state = plain.initial;
  plain.compress(plain_state, padded.data());
  EXPECT_EQ(to_digest(state), evp_sha256({'a', 'b', 'c'}));
  EXPECT_EQ(plain_state, state);
}

TEST(Namespace, RootIsSha256OfTypedLengthPrefixedFields) {
  EXPECT_TRUE(rc::check([](const std::vector<std::pair<std::uint8_t, std::string>>& fields) {
    std::array<std::uint8_t, 32> secret{};
    for (std::size_t i = 0; i < 32; ++i) secret[i] = static_cast<std::uint8_t>(3 * i);
    NamespaceBuilder builder(secret);
    Bytes expected(secret.begin(), secret.end());
    for (const auto& [type, value] : fields) {
      const auto field = static_cast<Field>(type % 10 + 1);
      builder.add(field, value);
      expected.push_back(static_cast<std::uint8_t>(field));
      put_little_endian(expected, value.size(), 8);
      expected.insert(expected.end(), value.begin(), value.end());
    }
    RC_ASSERT(builder.finish() == evp_sha256(expected));
  }));
}

TEST(Namespace, DifferentFieldListsGiveDifferentRoots) {
  const std::array<std::uint8_t, 32> secret{};
  std::array<std::uint8_t, 32> other_secret{};
  other_secret[31] = 1;
  auto builder = [&] { return NamespaceBuilder(secret); };
  const std::set<Root> roots = {
      builder().finish(),
      NamespaceBuilder(other_secret).finish(),
      builder().add(Field::kModel, "").finish(),
      builder().add(Field::kModel, "ab").finish(),
      builder().add(Field::kModel, "a").add(Field::kModel, "b").finish(),
      builder().add(Field::kModel, "a").add(Field::kLora, "b").finish(),
      builder().add(Field::kModel, "ab").add(Field::kLora, "").finish(),
      builder().add(Field::kModel, "").add(Field::kLora, "ab").finish(),
      builder().add(Field::kLora, "ab").finish(),
      builder().add(Field::kModel, std::string_view("a\0b", 3)).finish(),
      builder().add(Field::kLora, "b").add(Field::kModel, "a").finish(),
  };
  EXPECT_EQ(roots.size(), 11u);
}

TEST(EngineHash, FoldsRootLengthAndHash) {
  EXPECT_TRUE(rc::check([](const std::string& salt) {
    const auto size = *rc::gen::inRange<std::size_t>(0, kEngineHashBytesMax + 1);
    const auto hash = *rc::gen::container<std::vector<std::uint8_t>>(size, rc::gen::arbitrary<std::uint8_t>());
    const Root root = test_root(salt);
    Bytes input(root.begin(), root.end());
    put_little_endian(input, hash.size(), 8);
    input.insert(input.end(), hash.begin(), hash.end());
    BlockKey expected = first_16_bytes(evp_sha256(input));
    if (hash.size() == root.size()) {
      for (std::size_t i = 0; i < 16; ++i) {
        reinterpret_cast<std::uint8_t*>(&expected)[i] = static_cast<std::uint8_t>(hash[i] ^ root[i]);
      }
    }
    RC_ASSERT(fold_engine_hash(root, std::as_bytes(std::span(hash))) == expected);
  }));
}

TEST(TokenChain, FollowsItsDefinition) {
  EXPECT_TRUE(rc::check([](const std::vector<std::int32_t>& tokens) {
    const auto tokens_per_block = *rc::gen::inRange<std::size_t>(1, 40);
    RC_ASSERT(chain_keys(test_root(), tokens_per_block, tokens) ==
              plain_chain_keys(test_root(), tokens_per_block, tokens));
  }));
}

TEST(TokenChain, KeysDoNotDependOnHowTokensAreCut) {
  EXPECT_TRUE(rc::check([](const std::vector<std::int32_t>& tokens) {
    const auto tokens_per_block = *rc::gen::inRange<std::size_t>(1, 20);
    TokenChain chain(test_root(), tokens_per_block);
    std::vector<BlockKey> keys;
    for (std::span<const std::int32_t> rest(tokens); !rest.empty();) {
      const auto taken = *rc::gen::inRange<std::size_t>(1, rest.size() + 1);
      chain.append(rest.first(taken), keys);
      rest = rest.subspan(taken);
    }
    RC_ASSERT(keys == chain_keys(test_root(), tokens_per_block, tokens));
    RC_ASSERT(keys.size() == tokens.size() / tokens_per_block);
  }));
}

TEST(TokenChain, AKeyDependsOnAllTokensBeforeItOnTheRootAndOnTheBlockSize) {
  Prng prng(1);
  std::vector<std::int32_t> tokens(16 * 20);
  for (auto& token : tokens) token = static_cast<std::int32_t>(prng.below(128000));
  const auto keys = chain_keys(test_root(), 16, tokens);
  for (std::size_t changed = 0; changed < tokens.size(); ++changed) {
    auto others = tokens;
    ++others[changed];
    const auto other_keys = chain_keys(test_root(), 16, others);
    for (std::size_t i = 0; i < keys.size(); ++i) EXPECT_EQ(keys[i] == other_keys[i], i < changed / 16);
  }
  EXPECT_NE(keys[0], chain_keys(test_root("other"), 16, tokens)[0]);
  // Without the block size in the first state these two would absorb the same bytes.
  const std::vector<std::int32_t> fifteen(tokens.begin(), tokens.begin() + 15);
  std::vector<std::int32_t> zero_behind = fifteen;
  zero_behind.push_back(0);
  EXPECT_NE(chain_keys(test_root(), 15, fifteen)[0], chain_keys(test_root(), 16, zero_behind)[0]);
}

TEST(TokenHashes, DependOnAllTokensBeforeThemOnTheBlockSizeAndOnEveryPartOfTheNamespace) {
  const std::vector<std::int64_t> tokens{1, 2, 3, 4, 5, 6, 7, 8, 9};
  const auto of = [](std::vector<std::int64_t> t, std::uint32_t block_tokens, std::vector<std::string> name_space) {
    const auto hashes = TokenHashes::of(t, block_tokens, name_space).value();
    std::vector<std::vector<std::byte>> out;
    for (std::size_t i = 0; i < hashes.size(); ++i) out.emplace_back(hashes[i].begin(), hashes[i].end());
    return out;
  };
  const auto hashes = of(tokens, 4, {"a", "b"});
  ASSERT_EQ(hashes.size(), 2U);  // the ninth token fills no block
  EXPECT_EQ(hashes[0].size(), sizeof(Digest));
  EXPECT_EQ(hashes, of(tokens, 4, {"a", "b"}));
  EXPECT_EQ(hashes[0], of({1, 2, 3, 4}, 4, {"a", "b"})[0]);
  auto changed = of({1, 2, 3, 4, 5, 6, 7, -8}, 4, {"a", "b"});
  EXPECT_EQ(hashes[0], changed[0]);
  EXPECT_NE(hashes[1], changed[1]);
  EXPECT_NE(hashes[1], of({0, 2, 3, 4, 5, 6, 7, 8}, 4, {"a", "b"})[1]);
  EXPECT_NE(hashes[1], of(tokens, 8, {"a", "b"})[0]);
  for (const auto& other : std::vector<std::vector<std::string>>{{}, {"a"}, {"b", "a"}, {"ab"}, {"a", "b", ""}}) {
    EXPECT_NE(hashes[0], of(tokens, 4, other)[0]);
  }
}

TEST(TokenHashes, DoNotDependOnHowTheTokensAreCutIntoCallsAndTakeNoneOfACallThatIsRefused) {
  const std::vector<std::int64_t> tokens{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};
  const auto whole = TokenHashes::of(tokens, 4, {}).value();
  for (std::size_t first = 0; first <= tokens.size(); ++first) {
    auto grown = TokenHashes::of(std::span(tokens).first(first), 4, {}).value();
    const auto refused = grown.append(std::vector<std::int64_t>{5, std::int64_t{1} << 40});
    ASSERT_FALSE(refused.ok());
    EXPECT_TRUE(refused.error().message.starts_with("token " + std::to_string(first + 1) + " is 1099511627776:"));
    ASSERT_TRUE(grown.append(std::span(tokens).subspan(first)).ok());
    ASSERT_EQ(grown.size(), whole.size());
    for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(std::ranges::equal(grown[i], whole[i]));
  }
}

TEST(TokenHashes, RefuseTokensThatWouldBeCutAndNameThem) {
  std::vector<std::int64_t> tokens(5000, 7);
  tokens[4100] = std::int64_t{1} << 31;
  const auto refused = TokenHashes::of(tokens, 16, {});
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().message, "token 4100 is 2147483648: token ids must fit in 32 bits");
  EXPECT_FALSE(TokenHashes::of(tokens, 0, {}).ok());
}

}  // namespace
}  // namespace flexkv::key
