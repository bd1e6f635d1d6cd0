// The suites of flexkv-bench. Each call registers one with Google Benchmark; what each measures stands in its file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bench/workloads.h"
#include "flexkv/base/result.h"

namespace flexkv::bench {

void register_index();
void register_keys();
Status register_replay(const std::string& trace_path);  // fails, and names the line, if that is not a trace
void register_host();
// Ends with the code of the process; not one of Google Benchmark's, as what it measures takes turns with fio.
int run_ssd(std::uint64_t file_bytes, const std::vector<std::string>& directories);
void register_round_trips();  // part of the suite `host`

}  // namespace flexkv::bench
