#include "flexkv/server/resets_seen.h"

#include <bit>
#include <cstring>

#include "flexkv/base/log.h"

namespace flexkv::server {
namespace {

constexpr const char* kName = "node.resets";
constexpr std::uint64_t kMagic = 0x0000000253524B46;  // "FKRS" and the version
struct Body {
  std::uint64_t magic = kMagic;
  key::Root cluster{};
  std::uint64_t epoch = 0;
  std::uint64_t reset = 0;
  key::Root marks{};
};
struct Record {
  Body body;
  key::Root check{};
};
static_assert(sizeof(Record) == 120);  // nothing between its fields

// For names and checks, not for secrecy.
key::NamespaceBuilder hash() { return key::NamespaceBuilder(std::array<std::uint8_t, 32>{}); }

key::Root check(const Body& body) {
  return hash().add(key::Field::kUserNamespace, std::as_bytes(std::span(&body, 1))).finish();
}

}  // namespace

key::Root hash_of_cluster(const std::string& name) { return hash().add(key::Field::kUserNamespace, name).finish(); }

key::Root hash_of_marks(const std::set<remote::Mark>& marks) {
  key::NamespaceBuilder all = hash();
  for (const remote::Mark& mark : marks) all.add(key::Field::kWeightEpoch, std::as_bytes(std::span(mark)));
  return all.finish();
}

ResetsRecord encode(const ResetsSeen& seen) {
  Record record{{kMagic, seen.cluster, seen.epoch.number, seen.epoch.reset, seen.marks}};
  record.check = check(record.body);
  return std::bit_cast<ResetsRecord>(record);
}

Result<ResetsSeen> decode_resets_seen(std::span<const std::byte> bytes) {
  const auto refuse = [](const std::string& why) { return Error{ErrorCode::kCorruption, "record of resets: " + why}; };
  Record record;
  if (bytes.size() != sizeof record) {
    return refuse(std::to_string(bytes.size()) + " bytes instead of " + std::to_string(sizeof record));
  }
  std::memcpy(&record, bytes.data(), sizeof record);
  if (record.body.magic != kMagic) return refuse("unknown format");
  if (record.check != check(record.body)) return refuse("wrong checksum");
  return ResetsSeen{record.body.cluster, {record.body.epoch, record.body.reset}, record.body.marks};
}

ResetsSeen read_resets_seen(const disk::Directory& directory) {
  const auto bytes = directory.read(kName, sizeof(Record) + 1);
  if (!bytes && bytes.error().code == ErrorCode::kNotFound) return {};
  const auto seen = bytes ? decode_resets_seen(bytes.value()) : Result<ResetsSeen>(bytes.error());
  if (seen) return seen.value();
  log_warning("SSD cache: " + directory.path() + ": " + seen.error().message +
              "; what is there is forgotten if the cluster or the remote store was ever reset");
  return {};
}

Status write_resets_seen(const disk::Directory& directory, const ResetsSeen& seen) {
  return directory.replace(kName, encode(seen));
}

}  // namespace flexkv::server
