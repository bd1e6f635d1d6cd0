// Directory's first request of a round. Private to this module.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "flexkv/meta/request.h"

namespace flexkv::cluster {

// Answers of a look: the epoch, its reset, whether this node's is known, the members, the bell's newest entry, then
// what is asked of each space.
constexpr std::size_t kHeardWanted = 3;
constexpr std::size_t kMembers = 4;
constexpr std::size_t kBell = 5;
constexpr std::size_t kFirstAsk = 6;

inline std::optional<std::uint64_t> parse_number(const meta::Answer& answer) {
  std::uint64_t number = 0;
  const char* const end = answer.value.data() + answer.value.size();
  const auto [stop, error] = std::from_chars(answer.value.data(), end, number);
  if (!answer.found || error != std::errc{} || stop != end) return std::nullopt;
  return number;
}

}  // namespace flexkv::cluster
