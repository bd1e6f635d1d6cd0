#include "flexkv/peer/messages.h"

#include <xxhash.h>

#include <utility>

#include "flexkv/base/assert.h"
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
  return writer.take();
}

std::vector<std::byte> encode(const Placed& message) { return encode(End{message.outcome}); }

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

BlockChecksum::BlockChecksum(const SpaceName& space, std::uint64_t slot_bytes, const key::BlockKey& key)
    : state_(XXH3_createState()) {
  FLEXKV_ASSERT(state_ != nullptr && XXH3_64bits_reset(state_) == XXH_OK);
  add(std::as_bytes(std::span("flexkv peer block 1")));
  add(std::as_bytes(std::span(space)));
  add(std::as_bytes(std::span(&slot_bytes, 1)));
  add(std::as_bytes(std::span(&key, 1)));
}

BlockChecksum::~BlockChecksum() { XXH3_freeState(state_); }
BlockChecksum::BlockChecksum(BlockChecksum&& other) noexcept : state_(std::exchange(other.state_, nullptr)) {}
BlockChecksum& BlockChecksum::operator=(BlockChecksum&& other) noexcept {
  std::swap(state_, other.state_);
  return *this;
}

void BlockChecksum::add(std::span<const std::byte> bytes) {
  FLEXKV_ASSERT(XXH3_64bits_update(state_, bytes.data(), bytes.size()) == XXH_OK);
}

std::uint64_t BlockChecksum::value() const { return XXH3_64bits_digest(state_); }

}  // namespace flexkv::peer
