// Every decoder of messages from other processes, on arbitrary bytes. What decodes must encode to the same bytes: a
// decoder that skips or invents something would show.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "flexkv/base/assert.h"
#include "flexkv/proto/messages.h"

namespace {

template <typename T>
void check(const flexkv::Result<T>& decoded, std::span<const std::byte> bytes) {
  if (!decoded) return;
  const auto again = flexkv::proto::encode(decoded.value());
  FLEXKV_ASSERT(again.size() == bytes.size() && std::memcmp(again.data(), bytes.data(), bytes.size()) == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const auto bytes = std::as_bytes(std::span(data, size)).subspan(1);
  switch (data[0] % 9) {
    case 0:
      check(flexkv::proto::decode_agent_hello(bytes), bytes);
      break;
    case 1:
      check(flexkv::proto::decode_client_hello(bytes), bytes);
      break;
    case 2:
      check(flexkv::proto::decode_welcome(bytes), bytes);
      break;
    case 3:
      check(flexkv::proto::decode_to_agent(bytes), bytes);
      break;
    case 4:
      check(flexkv::proto::decode_job_report(bytes), bytes);
      break;
    case 5:
      check(flexkv::proto::decode_scrub_request(bytes), bytes);
      break;
    case 6:
      check(flexkv::proto::decode_drain_request(bytes), bytes);
      break;
    case 7:
      check(flexkv::proto::decode_from_client(bytes), bytes);
      break;
    default:
      check(flexkv::proto::decode_to_client(bytes), bytes);
      break;
  }
  return 0;
}
