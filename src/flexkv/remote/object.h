// The bytes and names of objects. docs/formats/remote.md describes them. Pure functions of their arguments; an
// ObjectCodec is immutable. Thread-safe.
#pragma once

#include <optional>
#include <string_view>

#include "flexkv/remote/types.h"

namespace flexkv::remote {

constexpr std::size_t kHeadBytes = 48;
constexpr std::uint32_t kObjectBlocksMax = 65536;

using BlockHead = std::array<std::byte, kHeadBytes>;

// What a name says.
struct ObjectName {
  std::array<std::uint8_t, 16> digest{};  // of all that the object is of, but the payloads
  std::uint32_t blocks = 0;

  friend auto operator<=>(const ObjectName&, const ObjectName&) = default;
};

// A chain of blocks, as one object holds it.
struct Chain {
  key::BlockKey parent;  // of the first one
  std::vector<key::BlockKey> keys;
};

// The names, places and checksums of one space. What it computes binds the space's name and slot size.
class ObjectCodec {
 public:
  // REQUIRES: 0 < slot_bytes <= kSlotBytesMax
  ObjectCodec(const SpaceName& space, std::uint64_t slot_bytes);

  const SpaceName& space() const { return space_; }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  // Before the names of all its objects; ends with '/'.
  const std::string& folder() const { return folder_; }

  ObjectName name_of(const Chain& chain) const;
  std::string path_of(const ObjectName& name) const;
  // Nothing when it is no object's of this space.
  std::optional<ObjectName> parse_path(std::string_view path) const;

  static constexpr std::uint64_t header_bytes(std::uint32_t blocks) {
    return 80 + std::uint64_t{blocks} * sizeof(key::BlockKey);
  }
  std::uint64_t object_bytes(std::uint32_t blocks) const { return head_offset(blocks, blocks); }
  // Of the head of block `index`, behind which its payload follows.
  std::uint64_t head_offset(std::uint32_t blocks, std::uint32_t index) const {
    return header_bytes(blocks) + index * (kHeadBytes + slot_bytes_);
  }

  // REQUIRES: 0 < chain.keys.size() <= kObjectBlocksMax
  std::vector<std::byte> encode_header(const Chain& chain) const;
  // `bytes`: of the object `name`, from its beginning. On success `out` is what the object says that it holds.
  std::optional<Fault> decode_header(std::span<const std::byte> bytes, const ObjectName& name, Chain& out) const;

  BlockHead encode_head(const key::BlockKey& key, const key::BlockKey& parent,
                        std::span<const std::byte> payload) const;
  // Nothing when these are the block `key`. Only then it is served.
  std::optional<Fault> check_block(const BlockHead& head, std::span<const std::byte> payload,
                                   const key::BlockKey& key) const;

 private:
  std::uint64_t payload_checksum(const key::BlockKey& key, std::span<const std::byte> payload) const;

  SpaceName space_;
  std::uint64_t slot_bytes_;
  std::string folder_;
  std::uint64_t head_seed_;
};

}  // namespace flexkv::remote
