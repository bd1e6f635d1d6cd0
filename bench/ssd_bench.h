// The drive of module file against a plain loop of 32 threads, on the same files in the same run.
#pragma once

#include <string>
#include <vector>

#include "flexkv/base/result.h"

namespace flexkv::bench {

struct SsdBenchOptions {
  std::vector<std::string> directories;  // one drive each
  std::uint64_t file_bytes = 2ULL << 30;
  std::vector<std::size_t> block_bytes{64 << 10, 256 << 10, 1 << 20, 4 << 20};
  double seconds = 2;  // per row
};

struct SsdBenchRow {
  std::string what;  // "drive|drive registered|threads" + " read|write" + " sequential|random"
  std::size_t block_bytes;
  double gigabytes_per_second;
};

// Makes `flexkv-ssd-bench` in each directory (filled) and leaves it there, for fio to use.
Result<std::vector<SsdBenchRow>> run_ssd(const SsdBenchOptions& options);

}  // namespace flexkv::bench
