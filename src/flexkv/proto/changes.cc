#include "flexkv/proto/changes.h"

#include <algorithm>
#include <memory>

#include "flexkv/key/namespace.h"

namespace flexkv::proto {
namespace {

constexpr std::size_t kHashBytesMax = key::kEngineHashBytesMax;
constexpr std::size_t kDetailBytesMax = 4096;

void write_strings(ipc::Writer& writer, const std::vector<std::string>& strings) {
  writer.pod(static_cast<std::uint32_t>(strings.size()));
  for (const std::string& string : strings) writer.string(string);
}

std::vector<std::string> read_strings(ipc::Reader& reader, std::size_t bytes_max) {
  const auto count = reader.pod<std::uint32_t>();
  std::vector<std::string> strings;
  for (std::uint32_t i = 0; i < count && i <= kDescribedBlocksMax && reader.ok(); ++i) {
    strings.emplace_back(reader.string(bytes_max));
  }
  return strings;
}

}  // namespace

bool valid(const DescribeRequest& request) {
  const std::size_t count = request.hashes.size();
  const auto fits = [](const std::string& hash) { return !hash.empty() && hash.size() <= kHashBytesMax; };
  return count > 0 && count <= kDescribedBlocksMax && std::ranges::all_of(request.hashes, fits) &&
         request.parent_hash.size() <= kHashBytesMax && request.parent_hash.empty() == (request.first_block == 0) &&
         !request.tokens.empty() && request.tokens.size() % count == 0 &&
         request.tokens.size() * sizeof(std::uint32_t) <= kDescribedBytesMax &&
         (request.details.size() == 1 || request.details.size() == count) &&
         std::ranges::all_of(request.details, [](const auto& text) { return text.size() <= kDetailBytesMax; });
}

std::vector<events::DescriptionRef> descriptions(const DescribeRequest& request) {
  const std::size_t count = request.hashes.size();
  const auto block_tokens = static_cast<std::ptrdiff_t>(request.tokens.size() / count);
  std::vector<events::DescriptionRef> described;
  described.reserve(count);
  std::shared_ptr<const std::string> details;
  auto tokens = request.tokens.begin();
  for (std::size_t i = 0; i < count; ++i, tokens += block_tokens) {
    if (i < request.details.size()) details = std::make_shared<const std::string>(request.details[i]);
    described.push_back(std::make_shared<const events::Description>(
        events::Description{request.hashes[i],
                            i == 0 ? request.parent_hash : request.hashes[i - 1],
                            {tokens, tokens + block_tokens},
                            details}));
  }
  return described;
}

void write(ipc::Writer& writer, const DescribeRequest& request) {
  writer.pod(request.sequence);
  writer.pod(request.first_block);
  writer.string(request.parent_hash);
  write_strings(writer, request.hashes);
  writer.array(std::span<const std::uint32_t>(request.tokens));
  write_strings(writer, request.details);
}

std::optional<DescribeRequest> read_describe_request(ipc::Reader& reader) {
  DescribeRequest request;
  request.sequence = reader.pod<std::uint64_t>();
  request.first_block = reader.pod<std::uint32_t>();
  request.parent_hash = reader.string(kHashBytesMax);
  request.hashes = read_strings(reader, kHashBytesMax);
  request.tokens = reader.array<std::uint32_t>(kDescribedBytesMax / sizeof(std::uint32_t));
  request.details = read_strings(reader, kDetailBytesMax);
  if (!reader.ok() || !valid(request)) return std::nullopt;
  return request;
}

void write(ipc::Writer& writer, const ChangesReply& reply) {
  writer.pod(static_cast<std::uint32_t>(reply.changes.size()));
  for (const events::Change& change : reply.changes) {
    writer.pod(change.kind);
    writer.pod(change.tier);
    writer.pod(change.space);
    writer.pod(change.key);
    writer.pod(change.parent);
    writer.pod(static_cast<std::uint8_t>(change.description != nullptr));
    if (change.description == nullptr) continue;
    writer.string(change.description->hash);
    writer.string(change.description->parent_hash);
    writer.array(std::span<const std::uint32_t>(change.description->tokens));
    writer.string(*change.description->details);
  }
}

std::optional<ChangesReply> read_changes_reply(ipc::Reader& reader) {
  ChangesReply reply;
  const auto count = reader.pod<std::uint32_t>();
  for (std::uint32_t i = 0; i < count; ++i) {
    if (!reader.ok() || i == kChangesMax) return std::nullopt;
    events::Change change;
    const auto kind = reader.pod<std::uint8_t>();
    if (kind > static_cast<std::uint8_t>(events::Change::Kind::kCurrent)) return std::nullopt;
    change.kind = static_cast<events::Change::Kind>(kind);
    change.tier = reader.pod<std::uint8_t>();
    change.space = reader.pod<events::SpaceNumber>();
    change.key = reader.pod<key::BlockKey>();
    change.parent = reader.pod<key::BlockKey>();
    const auto described = reader.pod<std::uint8_t>();
    if (described > 1) return std::nullopt;
    if (described == 1) {
      events::Description description;
      description.hash = reader.string(kHashBytesMax);
      description.parent_hash = reader.string(kHashBytesMax);
      description.tokens = reader.array<std::uint32_t>(kDescribedBytesMax / sizeof(std::uint32_t));
      description.details = std::make_shared<const std::string>(reader.string(kDetailBytesMax));
      change.description = std::make_shared<const events::Description>(std::move(description));
    }
    // A tier is a bit in what a reader remembers of a block.
    if (change.tier >= 8) return std::nullopt;
    reply.changes.push_back(std::move(change));
  }
  if (!reader.ok()) return std::nullopt;
  return reply;
}

}  // namespace flexkv::proto
