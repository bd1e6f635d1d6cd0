#include "flexkv/disk/record.h"

#define XXH_INLINE_ALL  // recovery checks tens of millions of records of 56 bytes
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>

namespace flexkv::disk {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little endian, and is written as it lies");

constexpr std::uint64_t kMagic = 0x4453564B58454C46;  // "FLEXKVSD"
constexpr std::uint32_t kVersion = 1;

struct HeaderLayout {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t header_bytes;
  std::uint32_t record_bytes;
  std::uint32_t zero;
  std::uint64_t slot_bytes;
  std::uint64_t epoch;
  SpaceId space;
  std::uint64_t check;  // of all before it
};
static_assert(sizeof(HeaderLayout) == 80 && std::has_unique_object_representations_v<HeaderLayout>);

struct RecordLayout {
  key::BlockKey key;
  key::BlockKey parent;
  std::uint64_t checksum;
  std::uint64_t sequence;
  std::uint64_t epoch;
  std::uint64_t check;  // of all before it and of the place
};
static_assert(sizeof(RecordLayout) == kRecordBytes && std::has_unique_object_representations_v<RecordLayout>);

struct PayloadSeed {
  key::BlockKey key;
  std::uint64_t epoch;
  std::uint64_t slot_bytes;
  SpaceId space;
};
static_assert(sizeof(PayloadSeed) == 64 && std::has_unique_object_representations_v<PayloadSeed>);

std::uint64_t check_of(const HeaderLayout& header) { return XXH3_64bits(&header, offsetof(HeaderLayout, check)); }

constexpr std::string_view kDigits = "0123456789abcdef";

}  // namespace

const char* fault_name(HeaderFault fault) {
  switch (fault) {
    case HeaderFault::kNone:
      return "none";
    case HeaderFault::kDamaged:
      return "damaged header";
    case HeaderFault::kVersion:
      return "another version of the format";
    case HeaderFault::kOtherSpace:
      return "another model or layout";
    case HeaderFault::kOtherSlots:
      return "another slot size";
  }
  return "?";
}

std::string version_refusal(const std::string& path) {
  return path + " is of another version of the format (this FlexKV reads and writes " + std::to_string(kVersion) +
         "); use the FlexKV that made it, name another directory, or remove all blocks there with `flexkv disk clear`";
}

HeaderPage encode_header(const Header& header) {
  HeaderLayout layout{kMagic,       kVersion, kHeaderBytes, kRecordBytes, 0, header.slot_bytes, header.epoch,
                      header.space, 0};
  layout.check = check_of(layout);
  HeaderPage page{};
  std::memcpy(page.data(), &layout, sizeof layout);
  return page;
}

HeaderFault decode_header(std::span<const std::byte> page, const SpaceId& space, std::uint64_t slot_bytes,
                          Header& out) {
  HeaderLayout layout{};
  if (page.size() < kHeaderBytes) return HeaderFault::kDamaged;
  std::memcpy(&layout, page.data(), sizeof layout);
  if (layout.magic != kMagic) return HeaderFault::kDamaged;
  if (layout.version != kVersion) return HeaderFault::kVersion;
  if (layout.check != check_of(layout) || layout.header_bytes != kHeaderBytes || layout.record_bytes != kRecordBytes ||
      layout.zero != 0 || layout.epoch == 0) {
    return HeaderFault::kDamaged;
  }
  out = {layout.space, layout.slot_bytes, layout.epoch};
  if (layout.space != space) return HeaderFault::kOtherSpace;
  return layout.slot_bytes == slot_bytes ? HeaderFault::kNone : HeaderFault::kOtherSlots;
}

std::uint64_t next_epoch(std::uint64_t previous, std::uint32_t seconds, std::uint32_t random) {
  return std::max<std::uint64_t>((previous >> 32) + 1, seconds) << 32 | random;
}

SpaceCodec::SpaceCodec(const SpaceId& space, std::uint64_t slot_bytes)
    : space_(space), slot_bytes_(slot_bytes), name_(space_name(space)) {
  record_seed_ = XXH3_64bits_withSeed(space.data(), space.size(), slot_bytes);
}

RecordBytes SpaceCodec::encode(const Record& record, std::uint32_t index) const {
  RecordLayout layout{record.key, record.parent, record.checksum, record.sequence, record.epoch, 0};
  layout.check = XXH3_64bits_withSeed(&layout, offsetof(RecordLayout, check), record_seed_ + index);
  RecordBytes bytes;
  std::memcpy(bytes.data(), &layout, sizeof layout);
  return bytes;
}

SpaceCodec::Found SpaceCodec::decode(std::span<const std::byte, kRecordBytes> bytes, std::uint32_t index,
                                     Record& out) const {
  static constexpr RecordBytes kZero{};
  RecordLayout layout{};
  std::memcpy(&layout, bytes.data(), sizeof layout);
  if (layout.check == XXH3_64bits_withSeed(&layout, offsetof(RecordLayout, check), record_seed_ + index)) {
    out = {layout.key, layout.parent, layout.checksum, layout.sequence, layout.epoch};
    return Found::kRecord;
  }
  return std::memcmp(bytes.data(), kZero.data(), kRecordBytes) == 0 ? Found::kEmpty : Found::kDamaged;
}

std::uint64_t SpaceCodec::payload_checksum(const key::BlockKey& key, std::uint64_t epoch,
                                           std::span<const std::byte> payload) const {
  const PayloadSeed seed{key, epoch, slot_bytes_, space_};
  return XXH3_64bits_withSeed(payload.data(), payload.size(), XXH3_64bits(&seed, sizeof seed));
}

bool SpaceCodec::holds(std::span<const std::byte, kRecordBytes> bytes, std::span<const std::byte> payload,
                       std::uint32_t index, const key::BlockKey& key, std::uint64_t epoch) const {
  Record record;
  return decode(bytes, index, record) == Found::kRecord && record.key == key && record.epoch == epoch &&
         record.checksum == payload_checksum(key, epoch, payload);
}

std::string space_name(const SpaceId& space) {
  std::string name;
  for (const std::uint8_t byte : space) {
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name;
}

bool parse_space_name(std::string_view name, SpaceId& out) {
  if (name.size() != 2 * out.size() || name.find_first_not_of(kDigits) != std::string_view::npos) return false;
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<std::uint8_t>(kDigits.find(name[2 * i]) << 4 | kDigits.find(name[2 * i + 1]));
  }
  return true;
}

}  // namespace flexkv::disk
