// The bytes of batches, parts of snapshots and heartbeats: docs/formats/directory.md. Each ends with a checksum over
// itself and the name of its place in Redis (which has cluster, epoch, space and node in it), so that bytes in the
// wrong place fail, too. Pure functions. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/cluster/types.h"

namespace flexkv::cluster {

constexpr std::size_t kBatchMax = 4096;   // residencies in a batch of a stream
constexpr std::size_t kPartMax = 65'536;  // and in a part of a snapshot
constexpr std::size_t kNameMax = 64;      // bytes
constexpr std::size_t kAddressMax = 256;

struct Batch {
  std::uint64_t number = 0;  // of the batch in its stream, or of the part in its snapshot; both from 1 and 0 on
  bool cleared = false;      // all that came before is void
  std::vector<Residency> residencies;
};

// REQUIRES: at most kPartMax residencies, tiers below 2^kTierCount
std::string encode_batch(const Batch& batch, std::string_view place);
// In a batch the order is lost: by tiers. Whom a block follows is lost if the batch does not say it, or says it of a
// block that is gone: then it follows the one before it among those of its tiers. The error says what is wrong with the
// bytes.
Result<Batch> decode_batch(std::string_view bytes, std::string_view place);

// REQUIRES: at most kSpacesMax spaces, name and address not too long
std::string encode_beat(const Beat& beat, std::string_view place);
Result<Beat> decode_beat(std::string_view bytes, std::string_view place);

// Appends the checksum, as both encoders do last.
void seal_entry(std::string& bytes, std::string_view place);

}  // namespace flexkv::cluster
