#include "bench/workloads.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

namespace flexkv::bench {

Result<std::vector<TraceRequest>> read_trace(const std::string& path) {
  std::vector<TraceRequest> requests;
  std::ifstream file(path);
  if (!file) return Error{ErrorCode::kNotFound, path + ": cannot be read"};
  const auto wrong = [&](std::size_t line, const std::string& why) {
    return Error{ErrorCode::kInvalidArgument, path + ":" + std::to_string(line) + ": " + why};
  };
  std::size_t number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      const auto json = nlohmann::json::parse(line);
      requests.push_back({json.at("timestamp").get<double>() / 1000, json.at("input_length").get<std::uint32_t>(),
                          json.at("hash_ids").get<std::vector<std::uint32_t>>()});
    } catch (const nlohmann::json::parse_error&) {
      return wrong(number, "not a request of a trace: this line is not JSON");
    } catch (const nlohmann::json::exception&) {
      return wrong(number,
                   "not a request of a trace: it takes numbers as timestamp (in ms) and input_length, and a list "
                   "of numbers as hash_ids");
    }
    const TraceRequest& request = requests.back();
    if (request.tokens > request.blocks.size() * std::uint64_t{kTraceBlockTokens}) {
      return wrong(number, "input_length " + std::to_string(request.tokens) + " is more than its " +
                               std::to_string(request.blocks.size()) + " hash_ids cover (" +
                               std::to_string(kTraceBlockTokens) + " tokens each)");
    }
  }
  if (requests.empty()) return Error{ErrorCode::kInvalidArgument, path + ": no request in it"};
  return requests;
}

double percentile_us(std::vector<Nanos>& values, double share) {
  if (values.empty()) return 0;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), at, values.end());
  return static_cast<double>(*at) / kMicrosecond;
}

Cache::Cache(const index::PrefixIndex::Options& options, std::uint32_t slot_count)
    : index_(options), free_(slot_count) {
  for (index::Slot slot = 0; slot < slot_count; ++slot) free_[slot] = slot;
}

std::uint32_t Cache::visit(std::span<const key::BlockKey> keys, Nanos now) {
  const auto match = index_.match(keys, true, now);
  insert(match.pin, keys.subspan(match.block_count), now);
  unpin(match.pin);
  return match.block_count;
}

void Cache::insert(index::PinId pin, std::span<const key::BlockKey> keys, Nanos now) {
  if (keys.size() > free_.size()) evict(static_cast<std::uint32_t>(keys.size() - free_.size()), now);
  const std::size_t count = std::min(keys.size(), free_.size());
  slots_.assign(free_.end() - static_cast<std::ptrdiff_t>(count), free_.end());
  free_.resize(free_.size() - count);
  index_.insert(pin, 0, keys.first(count), slots_, now, free_);
}

void Cache::unpin(index::PinId pin) {
  evicted_.clear();
  index_.unpin(pin, evicted_);
}

std::uint32_t Cache::evict(std::uint32_t count, Nanos now) {
  evicted_.clear();
  const std::uint32_t taken = index_.evict(0, count, now, evicted_);
  for (const auto& evicted : evicted_) free_.push_back(evicted.slot);
  return taken;
}

}  // namespace flexkv::bench
