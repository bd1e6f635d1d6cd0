#include "flexkv/cluster/wire.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "flexkv/base/assert.h"

namespace flexkv::cluster {
namespace {

constexpr std::uint32_t kBatchMagic = 0x32424446;  // "FDB2": the last character is the version
constexpr std::uint32_t kBeatMagic = 0x32484446;   // "FDH2"
constexpr std::size_t kChecksumBytes = 8;
constexpr std::uint8_t kClearedFlag = 1;
constexpr unsigned kMasks = 1U << kTierCount;
// The highest byte of a heartbeat's number is the condition: to versions that do not know it, it is another number.
constexpr unsigned kConditionShift = 56;
constexpr std::uint64_t kNumberMask = (std::uint64_t{1} << kConditionShift) - 1;

std::uint64_t checksum(std::string_view bytes, std::string_view place) {
  return XXH3_64bits_withSeed(bytes.data(), bytes.size(), XXH3_64bits(place.data(), place.size()));
}

template <typename T>
void append(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// Reads from the front; once there is too little left, it gives zeros and stays failed.
class Cursor {
 public:
  explicit Cursor(std::string_view bytes) : rest_(bytes) {}
  template <typename T>
  T take() {
    T value{};
    const std::string_view raw = bytes(sizeof(T));
    if (!raw.empty()) std::memcpy(&value, raw.data(), sizeof(T));
    return value;
  }
  std::string_view bytes(std::size_t size) {
    if (failed_ || size > rest_.size()) {
      failed_ = true;
      return {};
    }
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }
  std::size_t left() const { return rest_.size(); }
  bool failed() const { return failed_; }
  bool done() const { return !failed_ && rest_.empty(); }

 private:
  std::string_view rest_;
  bool failed_ = false;
};

Error refuse(std::string_view place, const std::string& why) {
  return {ErrorCode::kCorruption, "entry at '" + std::string(place) + "' refused: " + why};
}

// The bytes between magic and checksum.
Result<std::string_view> unseal(std::string_view bytes, std::uint32_t magic, std::string_view place) {
  if (bytes.size() < sizeof(magic) + kChecksumBytes) {
    return refuse(place, "only " + std::to_string(bytes.size()) + " bytes");
  }
  std::uint32_t found = 0;
  std::memcpy(&found, bytes.data(), sizeof(found));
  if (found != magic) {
    const bool other_version = ((found ^ magic) & 0x00FFFFFF) == 0;
    return refuse(place, other_version ? "of another version of FlexKV; give such nodes another redis_cluster"
                                       : "not one of FlexKV's");
  }
  const std::string_view body = bytes.substr(0, bytes.size() - kChecksumBytes);
  std::uint64_t sum = 0;
  std::memcpy(&sum, bytes.data() + body.size(), sizeof(sum));
  if (sum != checksum(body, place)) return refuse(place, "its checksum is wrong");
  return body.substr(sizeof(magic));
}

}  // namespace

const char* condition_name(Condition condition) {
  switch (condition) {
    case Condition::kServes:
      return "serves";
    case Condition::kDrains:
      return "drains";
    case Condition::kDrained:
      return "drained";
    case Condition::kEnds:
      return "ends";
  }
  return "unknown";
}

void seal_entry(std::string& bytes, std::string_view place) { append(bytes, checksum(bytes, place)); }

std::string encode_batch(const Batch& batch, std::string_view place) {
  FLEXKV_ASSERT(batch.residencies.size() <= kPartMax);
  std::array<std::vector<const Residency*>, kMasks> groups;
  for (const Residency& residency : batch.residencies) {
    FLEXKV_ASSERT(residency.tiers < kMasks);
    groups[residency.tiers].push_back(&residency);
  }
  std::string out;
  out.reserve(64 + batch.residencies.size() * (sizeof(Tag) + sizeof(Before)));
  append(out, kBatchMagic);
  append(out, batch.number);
  append(out, batch.cleared ? kClearedFlag : std::uint8_t{0});
  for (unsigned tiers = 0; tiers < kMasks; ++tiers) {
    const auto& group = groups[tiers];
    if (group.empty()) continue;
    append(out, static_cast<std::uint8_t>(tiers));
    append(out, static_cast<std::uint32_t>(group.size()));
    for (const Residency* residency : group) append(out, residency->tag);
    if (tiers == 0) continue;  // where a block has been interests nobody
    std::string said((group.size() + 7) / 8, '\0');
    std::string befores;
    Before implied = kUnsaid;
    for (std::size_t i = 0; i < group.size(); ++i) {
      const Before before = group[i]->before;
      if (before != kUnsaid && before != implied) {
        said[i / 8] = static_cast<char>(said[i / 8] | 1 << i % 8);
        append(befores, before);
      }
      implied = half(group[i]->tag);
    }
    out += said;
    out += befores;
  }
  seal_entry(out, place);
  return out;
}

namespace {

// What stands behind the blocks of a group: which of them do not follow the one before them there, and whom they do.
// Null: well.
const char* decode_befores(Cursor& cursor, std::span<Residency> group) {
  const std::string_view said = cursor.bytes((group.size() + 7) / 8);
  if (cursor.failed()) return "it ends too early";
  if (group.size() % 8 != 0 && static_cast<std::uint8_t>(said.back()) >> group.size() % 8 != 0) {
    return "more is said than there are blocks";
  }
  Before implied = kUnsaid;
  for (std::size_t i = 0; i < group.size(); ++i) {
    group[i].before = implied;
    if ((static_cast<std::uint8_t>(said[i / 8]) >> i % 8 & 1) != 0) {
      group[i].before = cursor.take<Before>();
      if (group[i].before == kUnsaid || group[i].before == implied) return "a block is said to follow what it follows";
    }
    implied = half(group[i].tag);
  }
  return nullptr;
}

}  // namespace

Result<Batch> decode_batch(std::string_view bytes, std::string_view place) {
  const auto body = unseal(bytes, kBatchMagic, place);
  if (!body) return body.error();
  Cursor cursor(body.value());
  Batch batch;
  batch.number = cursor.take<std::uint64_t>();
  const auto flags = cursor.take<std::uint8_t>();
  if (flags > kClearedFlag) return refuse(place, "unknown flags");
  batch.cleared = flags == kClearedFlag;
  int last = -1;
  while (!cursor.failed() && cursor.left() > 0) {
    const auto tiers = cursor.take<std::uint8_t>();
    const auto count = cursor.take<std::uint32_t>();
    if (tiers >= kMasks || tiers <= last) return refuse(place, "a wrong set of tiers");
    last = tiers;
    const std::size_t first = batch.residencies.size();
    if (count == 0 || count > kPartMax - first || count > cursor.left() / sizeof(Tag)) {
      return refuse(place, "a wrong count of blocks");
    }
    for (std::uint32_t i = 0; i < count; ++i) batch.residencies.push_back({cursor.take<Tag>(), tiers});
    if (tiers == 0) continue;
    const char* wrong = decode_befores(cursor, std::span(batch.residencies).subspan(first));
    if (wrong != nullptr) return refuse(place, wrong);
  }
  if (!cursor.done()) return refuse(place, "it ends too early");
  return batch;
}

std::string encode_beat(const Beat& beat, std::string_view place) {
  FLEXKV_ASSERT(beat.name.size() <= kNameMax && beat.address.size() <= kAddressMax && beat.spaces.size() <= kSpacesMax);
  std::string out;
  append(out, kBeatMagic);
  append(out, (beat.number & kNumberMask) | static_cast<std::uint64_t>(beat.condition) << kConditionShift);
  append(out, beat.resets);
  append(out, static_cast<std::uint16_t>(beat.name.size()));
  out += beat.name;
  append(out, static_cast<std::uint16_t>(beat.address.size()));
  out += beat.address;
  append(out, static_cast<std::uint16_t>(beat.spaces.size()));
  for (const Beat::Space& space : beat.spaces) {
    append(out, space.id);
    append(out, space.head);
    append(out, space.generation);
    append(out, space.base);
    append(out, space.part_count);
  }
  seal_entry(out, place);
  return out;
}

Result<Beat> decode_beat(std::string_view bytes, std::string_view place) {
  const auto body = unseal(bytes, kBeatMagic, place);
  if (!body) return body.error();
  Cursor cursor(body.value());
  Beat beat;
  const auto number = cursor.take<std::uint64_t>();
  beat.number = number & kNumberMask;
  const std::uint64_t condition = number >> kConditionShift;
  if (condition >= kConditionCount) return refuse(place, "no such condition of a node");
  beat.condition = static_cast<Condition>(condition);
  beat.resets = cursor.take<std::uint64_t>();
  const auto name_size = cursor.take<std::uint16_t>();
  if (name_size > kNameMax) return refuse(place, "its name is too long");
  beat.name = cursor.bytes(name_size);
  const auto address_size = cursor.take<std::uint16_t>();
  if (address_size > kAddressMax) return refuse(place, "its address is too long");
  beat.address = cursor.bytes(address_size);
  const auto space_count = cursor.take<std::uint16_t>();
  if (space_count > kSpacesMax) return refuse(place, "too many spaces");
  for (unsigned i = 0; i < space_count && !cursor.failed(); ++i) {
    Beat::Space& space = beat.spaces.emplace_back();
    space.id = cursor.take<SpaceId>();
    space.head = cursor.take<std::uint64_t>();
    space.generation = cursor.take<std::uint64_t>();
    space.base = cursor.take<std::uint64_t>();
    space.part_count = cursor.take<std::uint64_t>();
  }
  if (!cursor.done()) return refuse(place, "it has a wrong length");
  return beat;
}

}  // namespace flexkv::cluster
