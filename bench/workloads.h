// Workloads of the control-plane benchmarks (prefix trees of conversations, the conversation trace), and a cache to
// run them on.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/prng.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/index/prefix_index.h"
#include "flexkv/key/block_key.h"

namespace flexkv::bench {

using Keys = std::vector<key::BlockKey>;

// Random-looking chained keys without hashing tokens: the key depends on the one before it and on `content`.
inline key::BlockKey next_key(const key::BlockKey& previous, std::uint64_t content) {
  const std::uint64_t low = Prng::mix(previous.low + 0x9E3779B97F4A7C15ULL * (content + 1));
  return {Prng::mix(low ^ previous.high), low};
}

inline void append_keys(Keys& keys, std::uint64_t content, std::uint32_t count) {
  for (std::uint32_t i = 0; i < count; ++i)
    keys.push_back(next_key(keys.empty() ? key::BlockKey{} : keys.back(), content));
}

inline constexpr std::uint32_t kConversationBlocks = 512;

// A tree shape: conversations of 512 blocks, inserted turn by turn over all conversations of a group.
struct Shape {
  const char* name;
  std::uint32_t shared_blocks;  // a system prompt, shared by `group` conversations
  std::uint32_t group;
  std::uint32_t turn_blocks;
};
inline constexpr Shape kFlat512{"flat512", 0, 1, 512};
inline constexpr Shape kChat32{"chat32", 64, 64, 32};
inline constexpr Shape kChat4{"chat4", 64, 64, 4};

inline Keys conversation_keys(const Shape& shape, std::uint64_t conversation) {
  Keys keys;
  append_keys(keys, (conversation / shape.group) << 32, shape.shared_blocks);
  append_keys(keys, conversation << 32 | 1, kConversationBlocks - shape.shared_blocks);
  return keys;
}

struct TraceRequest {
  double seconds = 0;
  std::uint32_t tokens = 0;
  std::vector<std::uint32_t> blocks;  // of 512 tokens
};

inline constexpr std::uint32_t kTraceBlockTokens = 512;

inline std::int32_t trace_token(std::uint32_t block, std::uint32_t at) {
  return static_cast<std::int32_t>(Prng::mix(std::uint64_t{block} * kTraceBlockTokens + at + 0x9E3779B97F4A7C15ULL) %
                                   128000);
}

// One JSON object a line, fields timestamp (ms), input_length, hash_ids. An error names the file and the line.
Result<std::vector<TraceRequest>> read_trace(const std::string& path);

// The value that a `share` of the values do not exceed, in microseconds; 0 of none.
double percentile_us(std::vector<Nanos>& values, double share);

// An index with one tier of slots, used as a cache is.
class Cache {
 public:
  Cache(const index::PrefixIndex::Options& options, std::uint32_t slot_count);

  index::PrefixIndex& index() { return index_; }

  // Looks the blocks up and inserts those that are missing, as far as there is room. Returns how many were found.
  std::uint32_t visit(std::span<const key::BlockKey> keys, Nanos now);
  // The same in steps. insert() evicts what it needs to.
  void insert(index::PinId pin, std::span<const key::BlockKey> keys, Nanos now);
  void unpin(index::PinId pin);
  std::uint32_t evict(std::uint32_t count, Nanos now);

 private:
  index::PrefixIndex index_;
  std::vector<index::Slot> free_;
  std::vector<index::Slot> slots_;
  std::vector<index::PrefixIndex::Evicted> evicted_;
};

}  // namespace flexkv::bench
