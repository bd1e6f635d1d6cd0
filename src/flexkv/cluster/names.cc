#include "flexkv/cluster/names.h"

#include <charconv>
#include <cstddef>
#include <span>

namespace flexkv::cluster {
namespace {

constexpr std::size_t kHexDigits = 16;

std::string hex_of(std::span<const std::uint8_t> bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

}  // namespace

std::string hex(Incarnation incarnation) {
  std::array<std::uint8_t, sizeof(incarnation)> bytes;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::uint8_t>(incarnation >> (8 * (bytes.size() - 1 - i)));
  }
  return hex_of(bytes);
}

bool parse_hex(const std::string& text, Incarnation& out) {
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, out, 16);
  return text.size() == kHexDigits && error == std::errc{} && stop == end && out != 0 && hex(out) == text;
}

std::optional<std::uint64_t> parse_number(const std::string& text) {
  std::uint64_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || stop != end) return std::nullopt;
  return number;
}

void Names::set_epoch(const Epoch& epoch) {
  epoch_ = cluster_;
  epoch_ += std::to_string(epoch.number);
  if (epoch.reset != 0) epoch_.append("-").append(hex(epoch.reset));
  epoch_ += ":";
}

std::string Names::place(const SpaceId& space, Incarnation node) const {
  return epoch_ + hex_of(space) + ":" + hex(node) + ":";
}

}  // namespace flexkv::cluster
