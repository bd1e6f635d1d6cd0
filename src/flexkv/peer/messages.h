// What travels between two nodes, in frames (net/frame_stream.h). A frame's id is the request's; 0 for kHello.
//
//   reader -> owner   kHello, then kRead and kCancel
//   owner -> reader   kHello, then for each kRead: kData ... kBlock for each block that is wanted, in order, kEnd
//
// kProbe, which only who looks for faults sends, is answered at once by a kProbe of as many zeros as it asks for.
//
// kData bodies are a block's bytes, one after another, so the reader knows from the order where they belong.
// Pure functions; decoding checks every length and value and never trusts a count.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/key/block_key.h"
#include "flexkv/peer/types.h"

struct XXH3_state_s;

namespace flexkv::peer {

constexpr std::uint32_t kVersion = 2;
constexpr std::size_t kNodeNameMax = 256;
constexpr std::size_t kKeysMax = 32768;  // of one request's chain
constexpr std::uint64_t kSlotBytesMax = 1ULL << 30;
constexpr std::uint32_t kDataBytesMax = 256U << 10;  // of one frame
constexpr std::size_t kMessageBytesMax = 64 + kKeysMax * sizeof(key::BlockKey);

enum class Kind : std::uint32_t { kHello = 1, kRead, kCancel, kData, kBlock, kEnd, kProbe };

struct Hello {
  std::uint32_t version = kVersion;
  std::string node;
};
struct Read {
  SpaceName space{};
  std::uint64_t slot_bytes = 0;
  std::uint32_t milliseconds = 0;   // for which the reader waits
  std::uint32_t first = 0;          // of the keys whose blocks are wanted; those before only say where these belong
  std::vector<key::BlockKey> keys;  // from the first of the chain on
};
struct Block {
  std::uint64_t checksum = 0;
};
struct End {
  Outcome outcome = Outcome::kDone;
};
struct Probe {
  std::uint32_t bytes = 0;  // of the answer, at most kDataBytesMax
};

std::vector<std::byte> encode(const Hello& message);
std::vector<std::byte> encode(const Read& message);
std::vector<std::byte> encode(const Block& message);
std::vector<std::byte> encode(const End& message);
std::vector<std::byte> encode(const Probe& message);

Result<Hello> decode_hello(std::span<const std::byte> body);
Result<Read> decode_read(std::span<const std::byte> body);
Result<Block> decode_block(std::span<const std::byte> body);
Result<End> decode_end(std::span<const std::byte> body);
Result<Probe> decode_probe(std::span<const std::byte> body);

// Of a block's bytes, fed in order. It binds space, slot size and key: the right bytes of another block are wrong.
class BlockChecksum {
 public:
  BlockChecksum(const SpaceName& space, std::uint64_t slot_bytes, const key::BlockKey& key);
  ~BlockChecksum();
  BlockChecksum(BlockChecksum&& other) noexcept;
  BlockChecksum& operator=(BlockChecksum&& other) noexcept;

  void add(std::span<const std::byte> bytes);
  std::uint64_t value() const;

 private:
  XXH3_state_s* state_;  // owned; null: moved from
};

}  // namespace flexkv::peer
