#include "flexkv/ipc/handshake.h"

#include <unistd.h>

#include "flexkv/ipc/wire.h"

namespace flexkv::ipc {
namespace {

constexpr std::uint32_t kMagic = 0x564B5846;  // "FXKV"
constexpr std::size_t kMaxMessage = 1024;

enum class Kind : std::uint32_t { kHello = 1, kWelcome = 2, kRefused = 3 };
enum class Refusal : std::uint32_t { kFinal = 0, kBusy = 1 };

struct Prefix {
  std::uint32_t magic;
  std::uint32_t version;
  Kind kind;
};

Writer begin(Kind kind) {
  Writer writer;
  writer.pod(Prefix{.magic = kMagic, .version = kProtocolVersion, .kind = kind});
  return writer;
}

Error protocol_error(const std::string& what) { return {ErrorCode::kPeer, "not a FlexKV peer: " + what}; }

Error version_error(std::uint32_t client, std::uint32_t server) {
  return {ErrorCode::kUnsupported, "the client speaks protocol version " + std::to_string(client) +
                                       ", the server version " + std::to_string(server) +
                                       "; install the same FlexKV on both sides"};
}

// What a peer says ends up in logs and terminals.
std::string printable(std::string_view text) {
  std::string clean(text);
  for (char& c : clean) {
    if (c < ' ' || c > '~') c = '?';
  }
  return clean;
}

}  // namespace

std::vector<std::byte> encode_hello(const Hello& hello) {
  FLEXKV_ASSERT(hello.payload.size() <= kMaxPayload);
  Writer writer = begin(Kind::kHello);
  writer.pod(hello.role);
  writer.pod(std::int32_t{::getpid()});
  writer.bytes(hello.payload);
  return writer.take();
}

std::vector<std::byte> encode_welcome(std::span<const std::byte> payload) {
  FLEXKV_ASSERT(payload.size() <= kMaxPayload);
  Writer writer = begin(Kind::kWelcome);
  writer.bytes(payload);
  return writer.take();
}

std::vector<std::byte> encode_refused(const Error& error) {
  Writer writer = begin(Kind::kRefused);
  writer.pod(error.code == ErrorCode::kNoSpace ? Refusal::kBusy : Refusal::kFinal);
  writer.string(std::string_view(error.message).substr(0, kMaxMessage));
  return writer.take();
}

Result<Hello> decode_hello(std::span<const std::byte> frame) {
  Reader reader(frame);
  const auto prefix = reader.pod<Prefix>();
  if (!reader.ok() || prefix.magic != kMagic || prefix.kind != Kind::kHello) return protocol_error("no Hello");
  if (prefix.version != kProtocolVersion) return version_error(prefix.version, kProtocolVersion);
  Hello hello;
  hello.role = reader.pod<std::uint32_t>();
  hello.pid = reader.pod<std::int32_t>();
  hello.payload = reader.array<std::byte>(kMaxPayload);
  if (!reader.done()) return protocol_error("malformed Hello");
  return hello;
}

Result<std::vector<std::byte>> decode_answer(std::span<const std::byte> frame) {
  Reader reader(frame);
  const auto prefix = reader.pod<Prefix>();
  if (!reader.ok() || prefix.magic != kMagic) return protocol_error("no answer");
  if (prefix.kind == Kind::kRefused) {
    const auto refusal = reader.pod<Refusal>();
    const auto message = reader.string(kMaxMessage);
    if (!reader.done()) return protocol_error("malformed Refused");
    const ErrorCode code = refusal == Refusal::kBusy ? ErrorCode::kNoSpace : ErrorCode::kUnsupported;
    return Error{code, "refused by the server: " + printable(message)};
  }
  if (prefix.kind != Kind::kWelcome) return protocol_error("unknown answer");
  if (prefix.version != kProtocolVersion) return version_error(kProtocolVersion, prefix.version);
  auto payload = reader.array<std::byte>(kMaxPayload);
  if (!reader.done()) return protocol_error("malformed Welcome");
  return payload;
}

}  // namespace flexkv::ipc
