// The three frames that open a channel. A client sends Hello; the server answers Welcome, with descriptors, or Refused.
// Each begins with magic, version and kind; these and Refused never change, so that any two versions can tell each
// other apart. Pure functions over private bytes from a hostile peer. Private to the module, but for Hello and kMax*.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"

namespace flexkv::ipc {

constexpr std::uint32_t kProtocolVersion = 9;
constexpr std::size_t kMaxPayload = 60 * 1024;

struct Hello {
  std::uint32_t role = 0;
  std::int32_t pid = 0;            // as the client sees itself; the sender fills it in
  std::vector<std::byte> payload;  // at most kMaxPayload; opaque here
};

std::vector<std::byte> encode_hello(const Hello& hello);
std::vector<std::byte> encode_welcome(std::span<const std::byte> payload);
// The client sees code kNoSpace for kNoSpace (trying later may help), kUnsupported for any other.
std::vector<std::byte> encode_refused(const Error& error);

// Codes: kUnsupported for another version, with text that names both; kPeer for what is no Hello.
Result<Hello> decode_hello(std::span<const std::byte> frame);
// The payload of a Welcome; the text of a Refused as an Error; kPeer for what is neither.
Result<std::vector<std::byte>> decode_answer(std::span<const std::byte> frame);

}  // namespace flexkv::ipc
