// The suites of flexkv-bench. Each call registers one with Google Benchmark; what each measures stands in its file.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/workloads.h"
#include "flexkv/base/result.h"

namespace flexkv::bench {

// Given as --name=value; lists have commas between their numbers.
class Options {
 public:
  void set(const std::string& name, const std::string& value) { values_[name] = value; }
  bool has(const std::string& name) const { return values_.contains(name); }
  // Numbers from 1 to 2^32 - 1.
  Result<std::vector<std::uint32_t>> counts(const std::string& name, std::vector<std::uint32_t> otherwise) const;
  std::string text(const std::string& name, const std::string& otherwise) const;
  Result<double> positive(const std::string& name, double otherwise) const;

 private:
  std::map<std::string, std::string> values_;
};

void register_index();
void register_lookups();
void register_keys();
void register_directory();
// Options: nixl, the path of libnixl_capi.so, to measure reads through it, too.
Status register_peers(const Options& options);
Status register_peers_through_nixl(const std::string& path);
// Fails, and names the line, if that is not a trace. Options: those of DriveReplay; with sizes, only drives are
// replayed.
Status register_replay(const std::string& trace_path, const Options& options);
struct DriveReplay {
  std::vector<std::pair<std::uint32_t, std::uint32_t>> sizes;  // host memory and SSD, in blocks of 512 tokens
  double drive_gbs = 0;                                        // of each of four drives, GB/s
};
Status register_replay_drives(std::shared_ptr<const std::vector<TraceRequest>> trace, const DriveReplay& options);
// Makes its files below the directory, and removes them. Options: blocks, drives (both may be lists).
Status register_recovery(const std::string& directory, const Options& options);
// `url`: file:///... or s3://...; credentials as in S3Options::from_environment().
Status register_remote(const std::string& url, const Options& options);
// `redis`: HOST:PORT, or the path of a UNIX socket. Its keys there are gone after 30 s.
Status register_updates(const std::string& redis, const Options& options);
void register_host();
// Ends with the code of the process; not one of Google Benchmark's, as what it measures takes turns with fio.
int run_ssd(std::uint64_t file_bytes, const std::vector<std::string>& directories);
// Ends with the code of the process, too. Options: kClusterOptions, and json, which has no value.
int run_cluster(const std::string& trace_path, const Options& options);
inline const std::vector<std::string> kClusterOptions{"nodes",    "blocks",  "block-tokens", "router",
                                                      "replicas", "minutes", "seed"};
void register_round_trips();  // part of the suite `host`

}  // namespace flexkv::bench
