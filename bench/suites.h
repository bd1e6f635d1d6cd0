// The suites of flexkv-bench. Each call registers one with Google Benchmark; what each measures stands in its file.
#pragma once

#include <string>

#include "bench/workloads.h"
#include "flexkv/base/result.h"

namespace flexkv::bench {

void register_index();
void register_keys();
Status register_replay(const std::string& trace_path);  // fails, and names the line, if that is not a trace
void register_host();
void register_round_trips();  // part of the suite `host`

}  // namespace flexkv::bench
