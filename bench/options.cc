#include <charconv>
#include <sstream>

#include "bench/suites.h"

namespace flexkv::bench {

Result<std::vector<std::uint32_t>> Options::counts(const std::string& name,
                                                   std::vector<std::uint32_t> otherwise) const {
  const auto found = values_.find(name);
  if (found == values_.end()) return otherwise;
  std::vector<std::uint32_t> counts;
  std::istringstream list(found->second);
  for (std::string text; std::getline(list, text, ',');) {
    std::uint32_t count = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
    if (error != std::errc{} || end != text.data() + text.size() || count == 0) {
      return Error{ErrorCode::kInvalidArgument, "--" + name + ": '" + text + "' is not a number from 1 to 4294967295"};
    }
    counts.push_back(count);
  }
  if (counts.empty()) return Error{ErrorCode::kInvalidArgument, "--" + name + ": no number in it"};
  return counts;
}

std::string Options::text(const std::string& name, const std::string& otherwise) const {
  const auto found = values_.find(name);
  return found == values_.end() ? otherwise : found->second;
}

Result<double> Options::positive(const std::string& name, double otherwise) const {
  const auto found = values_.find(name);
  if (found == values_.end()) return otherwise;
  const std::string& text = found->second;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value > 0)) {
    return Error{ErrorCode::kInvalidArgument, "--" + name + ": '" + text + "' is not a number above 0"};
  }
  return value;
}

}  // namespace flexkv::bench
