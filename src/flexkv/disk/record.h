// The bytes of a `.records` file: a header page, then one record per slot at its place. docs/formats/disk.md describes
// them. Pure functions of their arguments; a SpaceCodec is immutable. Thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "flexkv/key/block_key.h"

namespace flexkv::disk {

using SpaceId = std::array<std::uint8_t, 32>;  // of a model and layout: what may share slots and keys

constexpr std::size_t kHeaderBytes = 4096;
constexpr std::size_t kRecordBytes = 64;

struct Header {
  SpaceId space{};
  std::uint64_t slot_bytes = 0;
  std::uint64_t epoch = 0;
};

enum class HeaderFault : std::uint8_t {
  kNone,
  kDamaged,     // not a header, or its checksum is wrong
  kVersion,     // of another version of this format
  kOtherSpace,  // of another model or layout
  kOtherSlots,  // of slots of another size
};
const char* fault_name(HeaderFault fault);
// Why a directory with the file `path` of another version is not used: nothing of it may be lost, and the operator
// decides.
std::string version_refusal(const std::string& path);

using HeaderPage = std::array<std::byte, kHeaderBytes>;
HeaderPage encode_header(const Header& header);
// `out` is set unless the fault is kDamaged or kVersion.
HeaderFault decode_header(std::span<const std::byte> page, const SpaceId& space, std::uint64_t slot_bytes, Header& out);

// An epoch that is younger than `previous` (0: none) and, as far as the clock (seconds since 1970) is right, than all
// that drives have which are away. The lower half is random, so that epochs of lost headers or of deleted files never
// come again.
std::uint64_t next_epoch(std::uint64_t previous, std::uint32_t seconds, std::uint32_t random);

struct Record {
  key::BlockKey key;
  key::BlockKey parent;  // kNoParent: first block of a chain
  std::uint64_t checksum = 0;
  std::uint64_t sequence = 0;
  std::uint64_t epoch = 0;
};
constexpr key::BlockKey kNoParent{};

using RecordBytes = std::array<std::byte, kRecordBytes>;

// The file names and checksums of one space. What it computes binds the space's id and slot size.
class SpaceCodec {
 public:
  SpaceCodec(const SpaceId& space, std::uint64_t slot_bytes);

  const SpaceId& space() const { return space_; }
  std::uint64_t slot_bytes() const { return slot_bytes_; }
  std::string blocks_name() const { return name_ + ".blocks"; }
  std::string records_name() const { return name_ + ".records"; }

  // `index`: of the slot in its file. A record that is valid in one place is damaged in another.
  RecordBytes encode(const Record& record, std::uint32_t index) const;
  enum class Found : std::uint8_t { kEmpty, kRecord, kDamaged };
  Found decode(std::span<const std::byte, kRecordBytes> bytes, std::uint32_t index, Record& out) const;

  std::uint64_t payload_checksum(const key::BlockKey& key, std::uint64_t epoch,
                                 std::span<const std::byte> payload) const;

  // Whether slot `index`, of which these bytes were read, holds the block `key` of this epoch. Only then is it served.
  bool holds(std::span<const std::byte, kRecordBytes> record, std::span<const std::byte> payload, std::uint32_t index,
             const key::BlockKey& key, std::uint64_t epoch) const;

 private:
  SpaceId space_;
  std::uint64_t slot_bytes_;
  std::string name_;
  std::uint64_t record_seed_;
};

std::string space_name(const SpaceId& space);  // 64 hexadecimal digits
// False when `name` is not one.
bool parse_space_name(std::string_view name, SpaceId& out);

// Bytes of a `.records` file for so many slots.
constexpr std::uint64_t records_file_bytes(std::uint64_t slots) {
  return (kHeaderBytes + slots * kRecordBytes + 4095) / 4096 * 4096;
}

}  // namespace flexkv::disk
