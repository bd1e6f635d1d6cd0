// flexkv-bench: runs one suite. `flexkv bench` is the command for people; it calls this one and shows what comes out.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "bench/suites.h"

namespace flexkv::bench {
namespace {

constexpr int kWrongUsage = 2;

struct Suite {
  const char* name;
  const char* argument;  // what stands behind the name on the command line; nullptr: nothing
  std::vector<std::string> options;
  Status (*add)(const std::string& argument, const Options& options);
};

const Suite kSuites[] = {
    {"index",
     nullptr,
     {},
     [](const std::string&, const Options&) { return register_index(), register_lookups(), Status{}; }},
    {"keys", nullptr, {}, [](const std::string&, const Options&) { return register_keys(), Status{}; }},
    {"directory", nullptr, {}, [](const std::string&, const Options&) { return register_directory(), Status{}; }},
    {"peers", nullptr, {"nixl"}, [](const std::string&, const Options& options) { return register_peers(options); }},
    {"updates", "REDIS", {}, register_updates},
    {"host", nullptr, {}, [](const std::string&, const Options&) { return register_host(), Status{}; }},
    {"replay", "TRACE", {"host-blocks", "ssd-blocks", "drive-gbs"}, register_replay},
    {"recovery", "DIR", {"blocks", "drives"}, register_recovery},
    {"remote", "URL", {}, register_remote},
};

int wrong_usage() {
  std::fputs("usage, with options of Google Benchmark behind:\n", stderr);
  for (const Suite& suite : kSuites) {
    std::fprintf(stderr, "  flexkv-bench %s %s", suite.name, suite.argument == nullptr ? "" : suite.argument);
    for (const std::string& option : suite.options) std::fprintf(stderr, " [--%s=...]", option.c_str());
    std::fputc('\n', stderr);
  }
  std::fputs("without those options:\n  flexkv-bench ssd BYTES DIR...\n  flexkv-bench cluster TRACE", stderr);
  for (const std::string& option : kClusterOptions) std::fprintf(stderr, " [--%s=...]", option.c_str());
  std::fputs(" [--json]\n", stderr);
  return kWrongUsage;
}

// Takes these options out of the arguments from `first` on.
Options take_options(const std::vector<std::string>& names, int first, int& argc, char** argv) {
  Options options;
  const auto taken = [&](const char* argument) {
    for (const std::string& name : names) {
      const std::string prefix = "--" + name + "=";
      if (!std::string_view(argument).starts_with(prefix)) continue;
      options.set(name, argument + prefix.size());
      return true;
    }
    return false;
  };
  argc = static_cast<int>(std::remove_if(argv + first, argv + argc, taken) - argv);
  argv[argc] = nullptr;
  return options;
}

int run(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "ssd") {
    if (argc < 4) return wrong_usage();
    return run_ssd(std::strtoull(argv[2], nullptr, 10), {argv + 3, argv + argc});
  }
  if (name == "cluster") {
    Options options = take_options(kClusterOptions, 2, argc, argv);
    if (argc == 4 && std::string_view(argv[3]) == "--json") options.set("json", "");
    return argc == 3 || options.has("json") ? run_cluster(argv[2], options) : wrong_usage();
  }
  for (const Suite& suite : kSuites) {
    if (suite.name != name) continue;
    const int used = suite.argument == nullptr ? 1 : 2;
    if (argc <= used) return wrong_usage();
    const std::string argument = suite.argument == nullptr ? "" : argv[used];
    const Options options = take_options(suite.options, used + 1, argc, argv);
    if (const Status added = suite.add(argument, options); !added) {
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
