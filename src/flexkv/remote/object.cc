#include "flexkv/remote/object.h"

#define XXH_INLINE_ALL  // heads are 40 bytes
#include <xxhash.h>

#include <bit>
#include <charconv>
#include <cstring>

#include "flexkv/base/assert.h"

namespace flexkv::remote {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little endian, and is written as it lies");

constexpr std::uint64_t kMagic = 0x4F52564B58454C46;  // "FLEXKVRO"
constexpr std::uint32_t kVersion = 1;
constexpr std::string_view kVersionFolder = "v1/";
constexpr std::string_view kSuffix = ".kv";
constexpr std::string_view kDigits = "0123456789abcdef";

struct HeaderLayout {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t blocks;
  std::uint64_t slot_bytes;
  SpaceName space;
  key::BlockKey parent;
  std::uint64_t check;  // of all before it and of the keys that follow
};
static_assert(sizeof(HeaderLayout) == ObjectCodec::header_bytes(0));
static_assert(std::has_unique_object_representations_v<HeaderLayout>);

struct HeadLayout {
  key::BlockKey key;
  key::BlockKey parent;
  std::uint64_t checksum;  // of the payload
  std::uint64_t check;     // of all before it
};
static_assert(sizeof(HeadLayout) == kHeadBytes && std::has_unique_object_representations_v<HeadLayout>);

struct PayloadSeed {
  key::BlockKey key;
  std::uint64_t slot_bytes;
  SpaceName space;
};
static_assert(sizeof(PayloadSeed) == 56 && std::has_unique_object_representations_v<PayloadSeed>);

std::uint64_t check_of(const HeaderLayout& header, std::span<const std::byte> keys) {
  return XXH3_64bits_withSeed(keys.data(), keys.size(), XXH3_64bits(&header, offsetof(HeaderLayout, check)));
}

void append_hex(std::string& out, std::span<const std::uint8_t> bytes) {
  for (const std::uint8_t byte : bytes) {
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
}

bool parse_hex(std::string_view text, std::span<std::uint8_t> out) {
  if (text.size() != 2 * out.size() || text.find_first_not_of(kDigits) != std::string_view::npos) return false;
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<std::uint8_t>(kDigits.find(text[2 * i]) << 4 | kDigits.find(text[2 * i + 1]));
  }
  return true;
}

}  // namespace

ObjectCodec::ObjectCodec(const SpaceName& space, std::uint64_t slot_bytes)
    : space_(space),
      slot_bytes_(slot_bytes),
      folder_(kVersionFolder),
      head_seed_(XXH3_64bits_withSeed(space.data(), space.size(), slot_bytes)) {
  FLEXKV_ASSERT(slot_bytes > 0 && slot_bytes <= kSlotBytesMax);
  append_hex(folder_, space_);
  folder_ += '/';
}

ObjectName ObjectCodec::name_of(const Chain& chain) const {
  const std::vector<std::byte> header = encode_header(chain);
  const XXH128_hash_t hash = XXH3_128bits(header.data(), header.size());
  ObjectName name;
  std::memcpy(name.digest.data(), &hash, name.digest.size());
  name.blocks = static_cast<std::uint32_t>(chain.keys.size());
  return name;
}

// FOLDER/ab/ab...-16.kv
std::string ObjectCodec::path_of(const ObjectName& name) const {
  std::string path = folder_;
  append_hex(path, std::span(name.digest).first(1));
  path += '/';
  append_hex(path, name.digest);
  path += '-' + std::to_string(name.blocks);
  path += kSuffix;
  return path;
}

std::optional<ObjectName> ObjectCodec::parse_path(std::string_view path) const {
  if (!path.starts_with(folder_) || !path.ends_with(kSuffix)) return {};
  const std::string_view file = path.substr(folder_.size());
  ObjectName name;
  const std::size_t digest_at = 3;
  const std::size_t count_at = digest_at + 2 * name.digest.size() + 1;
  if (file.size() <= count_at + kSuffix.size()) return {};
  if (!parse_hex(file.substr(digest_at, 2 * name.digest.size()), name.digest)) return {};
  const std::string_view count = file.substr(count_at, file.size() - count_at - kSuffix.size());
  std::from_chars(count.data(), count.data() + count.size(), name.blocks);
  if (name.blocks == 0 || name.blocks > kObjectBlocksMax || path_of(name) != path) return {};
  return name;
}

std::vector<std::byte> ObjectCodec::encode_header(const Chain& chain) const {
  FLEXKV_ASSERT(!chain.keys.empty() && chain.keys.size() <= kObjectBlocksMax);
  const std::span<const std::byte> keys = std::as_bytes(std::span(chain.keys));
  HeaderLayout layout{kMagic,       kVersion, static_cast<std::uint32_t>(chain.keys.size()), slot_bytes_, space_,
                      chain.parent, 0};
  layout.check = check_of(layout, keys);
  std::vector<std::byte> bytes(sizeof layout + keys.size());
  std::memcpy(bytes.data(), &layout, sizeof layout);
  std::memcpy(bytes.data() + sizeof layout, keys.data(), keys.size());
  return bytes;
}

std::optional<Fault> ObjectCodec::decode_header(std::span<const std::byte> bytes, const ObjectName& name,
                                                Chain& out) const {
  HeaderLayout layout{};
  if (bytes.size() < sizeof layout) return Fault::kShort;
  std::memcpy(&layout, bytes.data(), sizeof layout);
  if (layout.magic != kMagic) return Fault::kHeader;
  if (layout.version != kVersion) return Fault::kOther;
  if (layout.blocks == 0 || layout.blocks > kObjectBlocksMax) return Fault::kHeader;
  if (bytes.size() < header_bytes(layout.blocks)) return Fault::kShort;
  const auto keys = bytes.subspan(sizeof layout, layout.blocks * sizeof(key::BlockKey));
  if (layout.check != check_of(layout, keys)) return Fault::kHeader;
  if (layout.space != space_ || layout.slot_bytes != slot_bytes_) return Fault::kOther;
  Chain chain{layout.parent, std::vector<key::BlockKey>(layout.blocks)};
  std::memcpy(chain.keys.data(), keys.data(), keys.size());
  if (name_of(chain) != name) return Fault::kOther;
  out = std::move(chain);
  return {};
}

BlockHead ObjectCodec::encode_head(const key::BlockKey& key, const key::BlockKey& parent,
                                   std::span<const std::byte> payload) const {
  HeadLayout layout{key, parent, payload_checksum(key, payload), 0};
  layout.check = XXH3_64bits_withSeed(&layout, offsetof(HeadLayout, check), head_seed_);
  BlockHead head;
  std::memcpy(head.data(), &layout, sizeof layout);
  return head;
}

std::optional<Fault> ObjectCodec::check_block(const BlockHead& head, std::span<const std::byte> payload,
                                              const key::BlockKey& key) const {
  HeadLayout layout{};
  std::memcpy(&layout, head.data(), sizeof layout);
  if (layout.check != XXH3_64bits_withSeed(&layout, offsetof(HeadLayout, check), head_seed_)) return Fault::kHead;
  if (layout.key != key) return Fault::kOther;
  if (payload.size() != slot_bytes_) return Fault::kShort;
  if (layout.checksum != payload_checksum(key, payload)) return Fault::kPayload;
  return {};
}

std::uint64_t ObjectCodec::payload_checksum(const key::BlockKey& key, std::span<const std::byte> payload) const {
  const PayloadSeed seed{key, slot_bytes_, space_};
  return XXH3_64bits_withSeed(payload.data(), payload.size(), XXH3_64bits(&seed, sizeof seed));
}

}  // namespace flexkv::remote
