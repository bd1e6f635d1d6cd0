#include "bench/workloads.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

namespace flexkv::bench {

Result<std::vector<TraceRequest>> read_trace(const std::string& path) {
  std::vector<TraceRequest> requests;
  std::ifstream file(path);
  if (!file) return Error{ErrorCode::kNotFound, path + ": cannot be read"};
  for (std::string line; std::getline(file, line);) {
    try {
      const auto json = nlohmann::json::parse(line);
      requests.push_back({json.at("timestamp").get<double>() / 1000, json.at("input_length").get<std::uint32_t>(),
                          json.at("hash_ids").get<std::vector<std::uint32_t>>()});
    } catch (const nlohmann::json::exception& error) {
      return Error{ErrorCode::kInvalidArgument,
                   path + ":" + std::to_string(requests.size() + 1) + ": not a request of a trace: " + error.what()};
    }
    if (requests.back().tokens > requests.back().blocks.size() * std::uint64_t{kTraceBlockTokens}) {
      return Error{ErrorCode::kInvalidArgument, path + ":" + std::to_string(requests.size()) + ": input_length " +
                                                    std::to_string(requests.back().tokens) +
                                                    " is more than its hash_ids cover"};
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
