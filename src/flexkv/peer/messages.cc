#include "flexkv/peer/messages.h"

#include <xxhash.h>

#include <algorithm>
#include <string_view>
#include <type_traits>
#include <utility>

#include "flexkv/ipc/wire.h"

namespace flexkv::peer {
namespace {

Error broken(const char* message, const std::string& what) {
  return {ErrorCode::kPeer, std::string(message) + " is not understood: " + what};
}

}  // namespace

const char* outcome_name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kDone:
      return "done";
    case Outcome::kMissing:
      return "missing";
    case Outcome::kBusy:
      return "busy";
    case Outcome::kExpired:
      return "expired";
    case Outcome::kCanceled:
      return "canceled";
    case Outcome::kDeadline:
      return "deadline";
    case Outcome::kUnreachable:
      return "unreachable";
    case Outcome::kChecksum:
      return "checksum";
  }
  return "?";
}

std::vector<std::byte> encode(const Hello& message) {
  ipc::Writer writer;
  writer.pod(message.version);
  writer.string(message.node);
  writer.pod(static_cast<std::uint8_t>(message.window.transport));
  writer.array(std::span(message.window.metadata));
  writer.pod(message.window.pool);
  writer.pod(message.window.pool_bytes);
  writer.pod(message.window.words);
  writer.pod(message.window.word_count);
  return writer.take();
}

std::vector<std::byte> encode(const Read& message) {
  ipc::Writer writer;
  writer.pod(message.space);
  writer.pod(message.slot_bytes);
  writer.pod(message.milliseconds);
  writer.pod(static_cast<std::uint8_t>(message.by_itself));
  writer.pod(message.first);
  writer.array(std::span(message.keys));
  return writer.take();
}

std::vector<std::byte> encode(const Block& message) {
  ipc::Writer writer;
  writer.pod(message.checksum);
  return writer.take();
}

std::vector<std::byte> encode(const End& message) {
  ipc::Writer writer;
  writer.pod(static_cast<std::uint8_t>(message.outcome));
  return writer.take();
}

std::vector<std::byte> encode(const Place& message) {
  ipc::Writer writer;
  writer.pod(message.offset);
  writer.pod(message.checksum);
  writer.pod(message.generation);
  writer.pod(message.word);
  writer.array(std::span(message.sums));
  return writer.take();
}

std::vector<std::byte> encode(const Placed& message) { return encode(End{message.outcome}); }
std::vector<std::byte> encode(const Sent& message) { return encode(End{message.outcome}); }

std::vector<std::byte> encode(const Sums& message) {
  ipc::Writer writer;
  writer.array(std::span(message.extents));
  return writer.take();
}

std::vector<std::byte> encode(const Damaged& message) { return encode(Plain{message.block}); }

std::vector<std::byte> encode(const Plain& message) {
  ipc::Writer writer;
  writer.pod(message.block);
  return writer.take();
}

std::vector<std::byte> encode(const Probe& message) {
  ipc::Writer writer;
  writer.pod(message.bytes);
  return writer.take();
}

Result<Hello> decode_hello(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  Hello message;
  message.version = reader.pod<std::uint32_t>();
  // Only this much is the same for ever.
  if (reader.ok() && message.version != kVersion) {
    return Error{ErrorCode::kUnsupported, "it speaks version " + std::to_string(message.version) +
                                              " of the protocol between nodes, this node version " +
                                              std::to_string(kVersion) + ": run one version of FlexKV on all nodes"};
  }
  message.node = reader.string(kNodeNameMax);
  Window& window = message.window;
  const auto transport = reader.pod<std::uint8_t>();
  window.metadata = reader.array<std::byte>(kMetadataBytesMax);
  window.pool = reader.pod<std::uint64_t>();
  window.pool_bytes = reader.pod<std::uint64_t>();
  window.words = reader.pod<std::uint64_t>();
  window.word_count = reader.pod<std::uint32_t>();
  if (!reader.done() || message.node.empty()) return broken("a hello", "wrong length, or no name");
  if (transport >= kTransportCount) return broken("a hello", "no such transport");
  window.transport = static_cast<Transport>(transport);
  if (window.pool + window.pool_bytes < window.pool || window.words + window.words_bytes() < window.words) {
    return broken("a hello", "no memory can lie there");
  }
  return message;
}

Result<Read> decode_read(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  Read message;
  message.space = reader.pod<SpaceName>();
  message.slot_bytes = reader.pod<std::uint64_t>();
  message.milliseconds = reader.pod<std::uint32_t>();
  const auto by_itself = reader.pod<std::uint8_t>();
  message.first = reader.pod<std::uint32_t>();
  message.keys = reader.array<key::BlockKey>(kKeysMax);
  if (!reader.done()) return broken("a request", "wrong length");
  if (by_itself > 1) return broken("a request", "neither yes nor no");
  message.by_itself = by_itself == 1;
  if (message.first >= message.keys.size()) return broken("a request", "no block is wanted");
  if (message.slot_bytes == 0 || message.slot_bytes > kSlotBytesMax) return broken("a request", "no such block size");
  return message;
}

Result<Block> decode_block(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  const Block message{reader.pod<std::uint64_t>()};
  if (!reader.done()) return broken("the end of a block", "wrong length");
  return message;
}

Result<End> decode_end(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  const auto outcome = reader.pod<std::uint8_t>();
  if (!reader.done() || outcome >= kOutcomeCount) return broken("an answer", "wrong length, or no such outcome");
  return End{static_cast<Outcome>(outcome)};
}

Result<Place> decode_place(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  Place message;
  message.offset = reader.pod<std::uint64_t>();
  message.checksum = reader.pod<std::uint64_t>();
  message.generation = reader.pod<std::uint64_t>();
  message.word = reader.pod<std::uint32_t>();
  message.sums = reader.array<SummedExtent>(kSumsMax);
  if (!reader.done()) return broken("a block's place", "wrong length");
  return message;
}

Result<Placed> decode_placed(std::span<const std::byte> body) {
  const auto same = decode_end(body);
  if (!same.ok()) return same.error();
  return Placed{same.value().outcome};
}

Result<Plain> decode_plain(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  const Plain message{reader.pod<std::uint32_t>()};
  if (!reader.done()) return broken("the wish for bytes", "wrong length");
  return message;
}

Result<Probe> decode_probe(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  const Probe message{reader.pod<std::uint32_t>()};
  if (!reader.done() || message.bytes > kDataBytesMax)
    return broken("a probe", "wrong length, or it asks for too much");
  return message;
}

Result<Sums> decode_sums(std::span<const std::byte> body) {
  ipc::Reader reader(body);
  Sums message{reader.array<SummedExtent>(kSumsMax)};
  if (!reader.done()) return broken("a block's sums", "wrong length");
  return message;
}

Result<Sent> decode_sent(std::span<const std::byte> body) {
  const auto same = decode_end(body);
  if (!same.ok()) return same.error();
  return Sent{same.value().outcome};
}

Result<Damaged> decode_damaged(std::span<const std::byte> body) {
  const auto same = decode_plain(body);
  if (!same.ok()) return same.error();
  return Damaged{same.value().block};
}

bool can_be(std::span<const SummedExtent> sums, std::uint64_t slot_bytes) {
  std::uint64_t end = 0;
  for (const auto& [offset, bytes, sum] : sums) {
    if (offset < end || offset > slot_bytes || bytes == 0 || bytes > slot_bytes - offset) return false;
    end = offset + bytes;
  }
  return sums.size() <= kSumsMax;
}

BlockChecksum::BlockChecksum(const SpaceName& space, std::uint64_t slot_bytes, const key::BlockKey& key,
                             std::span<const SummedExtent> sums, Side side)
    : space_(space), slot_bytes_(slot_bytes), key_(key), sums_(sums), side_(side) {}

std::uint64_t BlockChecksum::add(std::span<const std::byte> bytes) {
  std::uint64_t looked_at = 0;
  while (!bytes.empty()) {
    std::size_t count = bytes.size();
    const SummedExtent* const extent = next_ < sums_.size() ? &sums_[next_] : nullptr;
    if (extent == nullptr || added_ < extent->offset) {
      if (extent != nullptr) count = std::min<std::uint64_t>(count, extent->offset - added_);
      rest_.add(bytes.first(count));
      looked_at += count;
    } else {
      const std::uint64_t end = extent->offset + extent->bytes;
      count = std::min<std::uint64_t>(count, end - added_);
      if (side_ == Side::kReader) {
        summer_.add(bytes.first(count));
        looked_at += count;
      }
      if (added_ + count == end) {
        if (side_ == Side::kReader) holds_sums_ = holds_sums_ && std::exchange(summer_, {}).value() == extent->sum;
        ++next_;
      }
    }
    added_ += count;
    bytes = bytes.subspan(count);
  }
  return looked_at;
}

std::uint64_t BlockChecksum::value() const {
  const struct {
    SpaceName space;
    std::uint64_t slot_bytes;
    key::BlockKey key;
    std::uint64_t rest;
  } block{space_, slot_bytes_, key_, rest_.value()};
  static_assert(std::has_unique_object_representations_v<decltype(block)>);
  static_assert(std::has_unique_object_representations_v<SummedExtent>);
  constexpr std::string_view kDomain = "flexkv peer block 2";
  const std::uint64_t seed = XXH3_64bits_withSeed(&block, sizeof block, XXH3_64bits(kDomain.data(), kDomain.size()));
  return XXH3_64bits_withSeed(sums_.data(), sums_.size_bytes(), seed);
}

}  // namespace flexkv::peer
