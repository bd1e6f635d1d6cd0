// What travels between two nodes, in frames (net/frame_stream.h). A frame's id is the request's; 0 for kHello.
//
//   reader -> owner   kHello, then kRead and kCancel
//   owner -> reader   kHello, then for each kRead: kData ... kBlock for each block that is wanted, in order, kEnd;
//                     kHello once more, before its next answers, when its window is another one
//
// kData bodies are a block's bytes, one after another, so the reader knows from the order where they belong.
// A reader that can read the owner's memory by itself (one_sided.h) may get places instead of bytes:
//
//   owner -> reader   kPlace for each block, in order, then kPlaced; kEnd once the reader has cancelled, or in between
//   reader -> owner   kPlain, when that does not work: the rest as kData and kBlock after all
//
// kProbe, which only who looks for faults sends, is answered at once by a kProbe of as many zeros as it asks for.
//
// Pure functions; decoding checks every length and value and never trusts a count.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/key/block_key.h"
#include "flexkv/peer/one_sided.h"
#include "flexkv/peer/types.h"

struct XXH3_state_s;

namespace flexkv::peer {

constexpr std::uint32_t kVersion = 4;
constexpr std::size_t kNodeNameMax = 256;
constexpr std::size_t kKeysMax = 32768;  // of one request's chain
constexpr std::uint64_t kSlotBytesMax = 1ULL << 30;
constexpr std::uint32_t kDataBytesMax = 256U << 10;  // of one frame
constexpr std::size_t kMessageBytesMax = 64 + kKeysMax * sizeof(key::BlockKey);

constexpr std::size_t kMetadataBytesMax = 64U << 10;  // of a window

enum class Kind : std::uint32_t { kHello = 1, kRead, kCancel, kData, kBlock, kEnd, kPlace, kPlaced, kPlain, kProbe };

struct Hello {
  std::uint32_t version = kVersion;
  std::string node;
  Window window{};  // of the owner
};
struct Read {
  SpaceName space{};
  std::uint64_t slot_bytes = 0;
  std::uint32_t milliseconds = 0;   // for which the reader waits
  std::uint32_t first = 0;          // of the keys whose blocks are wanted; those before only say where these belong
  std::vector<key::BlockKey> keys;  // from the first of the chain on
  bool by_itself = false;           // the reader would rather have places than bytes
};
struct Block {
  std::uint64_t checksum = 0;
};
struct End {
  Outcome outcome = Outcome::kDone;
};
struct Place {
  std::uint64_t offset = 0;  // in the owner's pool
  std::uint64_t checksum = 0;
  std::uint64_t generation = 0;  // of the lease: its word says this as long as the block is pinned
  std::uint32_t word = 0;
};
struct Placed {                      // all places are told
  Outcome outcome = Outcome::kDone;  // why not of all blocks
};
struct Plain {
  std::uint32_t block = 0;  // of those wanted, the first whose bytes are to come
};
struct Probe {
  std::uint32_t bytes = 0;  // of the answer, at most kDataBytesMax
};

std::vector<std::byte> encode(const Hello& message);
std::vector<std::byte> encode(const Read& message);
std::vector<std::byte> encode(const Block& message);
std::vector<std::byte> encode(const End& message);
std::vector<std::byte> encode(const Place& message);
std::vector<std::byte> encode(const Placed& message);
std::vector<std::byte> encode(const Plain& message);
std::vector<std::byte> encode(const Probe& message);

Result<Hello> decode_hello(std::span<const std::byte> body);
Result<Read> decode_read(std::span<const std::byte> body);
Result<Block> decode_block(std::span<const std::byte> body);
Result<End> decode_end(std::span<const std::byte> body);
Result<Place> decode_place(std::span<const std::byte> body);
Result<Placed> decode_placed(std::span<const std::byte> body);
Result<Plain> decode_plain(std::span<const std::byte> body);
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
