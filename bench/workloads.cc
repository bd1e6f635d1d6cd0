#include "workloads.h"

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

namespace flexkv::bench {

std::vector<TraceRequest> read_trace(const std::string& path) {
  std::vector<TraceRequest> requests;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line);
    requests.push_back({json.at("timestamp").get<double>() / 1000, json.at("input_length").get<std::uint32_t>(),
                        json.at("hash_ids").get<std::vector<std::uint32_t>>()});
  }
  return requests;
}

std::string trace_path() {
  const char* path = std::getenv("FLEXKV_TRACE");
  return path == nullptr ? "" : path;
}

}  // namespace flexkv::bench
