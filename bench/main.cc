// flexkv-bench: runs one suite. `flexkv bench` is the command for people; it calls this one and shows what comes out.
#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "bench/suites.h"

namespace flexkv::bench {
namespace {

constexpr int kWrongUsage = 2;

struct Suite {
  const char* name;
  const char* argument;  // what stands behind the name on the command line; nullptr: nothing
  Status (*add)(const std::string& argument);
};

constexpr Suite kSuites[] = {
    {"index", nullptr, [](const std::string&) { return register_index(), Status{}; }},
    {"keys", nullptr, [](const std::string&) { return register_keys(), Status{}; }},
    {"host", nullptr, [](const std::string&) { return register_host(), Status{}; }},
    {"replay", "TRACE", register_replay},
};

int wrong_usage() {
  std::fputs("usage, with options of Google Benchmark behind:\n", stderr);
  for (const Suite& suite : kSuites) {
    std::fprintf(stderr, "  flexkv-bench %s %s\n", suite.name, suite.argument == nullptr ? "" : suite.argument);
  }
  std::fputs("  flexkv-bench ssd BYTES DIR...  (without those options)\n", stderr);
  return kWrongUsage;
}

int run(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "ssd") {
    if (argc < 4) return wrong_usage();
    return run_ssd(std::strtoull(argv[2], nullptr, 10), {argv + 3, argv + argc});
  }
  for (const Suite& suite : kSuites) {
    if (suite.name != name) continue;
    const int used = suite.argument == nullptr ? 1 : 2;
    if (argc <= used) return wrong_usage();
    if (const Status added = suite.add(argv[used]); !added) {
      std::fprintf(stderr, "%s\n", added.error().message.c_str());
      return kWrongUsage;
    }
    argc -= used;
    argv += used;
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return kWrongUsage;
    benchmark::RunSpecifiedBenchmarks();
    return 0;
  }
  return wrong_usage();
}

}  // namespace
}  // namespace flexkv::bench

int main(int argc, char** argv) { return flexkv::bench::run(argc, argv); }
