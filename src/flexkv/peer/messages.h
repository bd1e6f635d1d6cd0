// What travels between two nodes, in frames (net/frame_stream.h). A frame's id is the request's; 0 for kHello.
//
//   reader -> owner   kHello, then kRead; for each of these at last kCancel or kDamaged
//   owner -> reader   kHello, then for each kRead: kSums kData ... kBlock for each block that is wanted, in order, and
//                     kSent; kEnd once the reader has cancelled, or instead of what is missing;
//                     kHello once more, before its next answers, when its window is another one
//
// kData bodies are a block's bytes, one after another, so the reader knows from the order where they belong. kSums:
// what must be in the block that follows, where the owner knows that. The lease lasts until the reader has what it
// wants, so that it can say which block is not what its sums say.
//
// A reader that can read the owner's memory by itself (one_sided.h) may get places instead of bytes:
//
//   owner -> reader   kPlace for each block, in order, then kPlaced
//   reader -> owner   kPlain, when that does not work: the rest as bytes after all
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

namespace flexkv::peer {

constexpr std::uint32_t kVersion = 5;
constexpr std::size_t kNodeNameMax = 256;
constexpr std::size_t kKeysMax = 32768;  // of one request's chain
constexpr std::size_t kSumsMax = 1024;   // of a block: one for each rank at most
constexpr std::uint64_t kSlotBytesMax = 1ULL << 30;
constexpr std::uint32_t kDataBytesMax = 256U << 10;  // of one frame
// Of a block, that all is done to before the next part: it stays in a processor's cache meanwhile.
constexpr std::uint32_t kPartBytes = 128U << 10;
static_assert(kPartBytes <= kDataBytesMax);
constexpr std::size_t kMessageBytesMax = 64 + kKeysMax * sizeof(key::BlockKey);

constexpr std::size_t kMetadataBytesMax = 64U << 10;  // of a window

enum class Kind : std::uint32_t {
  kHello = 1,
  kRead,
  kCancel,
  kData,
  kBlock,
  kEnd,
  kPlace,
  kPlaced,
  kPlain,
  kProbe,
  kSums,
  kSent,
  kDamaged,
};

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
struct Sums {
  std::vector<SummedExtent> extents;
};
struct Block {
  std::uint64_t checksum = 0;  // BlockChecksum
};
struct End {
  Outcome outcome = Outcome::kDone;
};
struct Place {
  std::uint64_t offset = 0;  // in the owner's pool
  std::uint64_t checksum = 0;
  std::uint64_t generation = 0;  // of the lease: its word says this as long as the block is pinned
  std::uint32_t word = 0;
  std::vector<SummedExtent> sums{};
};
struct Placed {                      // all places are told
  Outcome outcome = Outcome::kDone;  // why not of all blocks
};
struct Sent {                        // all bytes are sent
  Outcome outcome = Outcome::kDone;  // why not of all blocks
};
struct Damaged {            // ends the lease, too
  std::uint32_t block = 0;  // of those wanted: not what its sums or its checksum say
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
std::vector<std::byte> encode(const Sums& message);
std::vector<std::byte> encode(const Sent& message);
std::vector<std::byte> encode(const Damaged& message);

Result<Hello> decode_hello(std::span<const std::byte> body);
Result<Read> decode_read(std::span<const std::byte> body);
Result<Block> decode_block(std::span<const std::byte> body);
Result<End> decode_end(std::span<const std::byte> body);
Result<Place> decode_place(std::span<const std::byte> body);
Result<Placed> decode_placed(std::span<const std::byte> body);
Result<Plain> decode_plain(std::span<const std::byte> body);
Result<Probe> decode_probe(std::span<const std::byte> body);
Result<Sums> decode_sums(std::span<const std::byte> body);
Result<Sent> decode_sent(std::span<const std::byte> body);
Result<Damaged> decode_damaged(std::span<const std::byte> body);

// Whether sums are in order: ascending, apart, within a slot, kSumsMax at most.
bool can_be(std::span<const SummedExtent> sums, std::uint64_t slot_bytes);

// Of a block's bytes, fed in order. One number for what block it is, what its sums are and what the bytes are that no
// sum speaks of: the right bytes of another block are wrong. The bytes that sums speak of are compared with these, by
// the side that receives.
class BlockChecksum {
 public:
  enum class Side { kOwner, kReader };
  // `sums` outlive it. REQUIRES: can_be(sums, slot_bytes)
  BlockChecksum(const SpaceName& space, std::uint64_t slot_bytes, const key::BlockKey& key,
                std::span<const SummedExtent> sums, Side side);

  // How many of these had to be looked at.
  std::uint64_t add(std::span<const std::byte> bytes);
  // REQUIRES: all bytes have been added
  std::uint64_t value() const;
  bool holds_sums() const { return holds_sums_; }  // the reader's

 private:
  const SpaceName space_;
  const std::uint64_t slot_bytes_;
  const key::BlockKey key_;
  const std::span<const SummedExtent> sums_;
  const Side side_;
  std::uint64_t added_ = 0;
  std::size_t next_ = 0;  // of the sums: that which begins or goes on next
  BlockSummer summer_;    // of it
  BlockSummer rest_;
  bool holds_sums_ = true;
};

}  // namespace flexkv::peer
