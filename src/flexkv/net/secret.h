// What all nodes of a cluster know and nobody else does: by it they recognise each other. Immutable; thread-safe. It
// never appears in a message or a log.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include "flexkv/base/result.h"

namespace flexkv::net {

class Secret {
 public:
  // Who sees a handshake can try secrets at leisure, so it must not be one that people think up.
  static constexpr std::size_t kMinBytes = 32;
  static constexpr std::size_t kMaxBytes = 4096;
  using Key = std::array<unsigned char, 32>;

  // The file's text without blanks at its end. Only its owner may have access to the file.
  static Result<Secret> from_file(const std::string& path);
  static Result<Secret> from_text(std::string text);

  // A key for one purpose. Keys of other purposes tell nothing about it. HKDF with SHA-256 (RFC 5869).
  Key derive(std::string_view purpose) const;

 private:
  explicit Secret(std::string text) : text_(std::move(text)) {}

  std::string text_;
};

}  // namespace flexkv::net
