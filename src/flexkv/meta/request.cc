#include "flexkv/meta/request.h"

#include <algorithm>
#include <charconv>

namespace flexkv::meta {

std::string entry_id(std::uint64_t number) { return std::to_string(number) + "-0"; }

std::uint64_t entry_number(const std::string& id) {
  std::uint64_t number = 0;
  const char* const end = id.data() + id.size();
  const auto [stop, error] = std::from_chars(id.data(), end, number);
  return error == std::errc{} && std::string(stop, end) == "-0" ? number : 0;
}

Nanos waiting_time(const Request& request) {
  Nanos time = 0;
  for (const Op& op : request) {
    if (op.kind == Op::Kind::kRead) time += op.ttl;
  }
  return time;
}

}  // namespace flexkv::meta
