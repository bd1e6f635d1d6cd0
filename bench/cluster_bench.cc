// `flexkv-bench cluster`: a simulated cluster that serves a trace; docs/operations/scale.md explains the figures. Not
// one of Google Benchmark's: what it tells are not times, but for those of lookups.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "bench/suites.h"
#include "flexkv/testing/cluster_sim.h"

namespace flexkv::bench {
namespace {

using Json = nlohmann::ordered_json;
using testing::ClusterFigures;
using testing::ClusterShape;
using testing::DirectoryTraffic;
using testing::DirectoryUse;

constexpr int kWrongUsage = 2;

struct Run {
  ClusterShape shape;
  std::uint32_t minutes = 60;  // of the trace
};

Result<Run> run_of(const Options& options) {
  Run run;
  const auto one = [&](const char* name, std::uint32_t otherwise, std::uint32_t most) -> Result<std::uint32_t> {
    const auto numbers = options.counts(name, {otherwise});
    if (!numbers) return numbers.error();
    if (numbers.value().size() == 1 && numbers.value()[0] <= most) return numbers.value()[0];
    return Error{ErrorCode::kInvalidArgument,
                 "--" + std::string(name) + ": takes one number up to " + std::to_string(most)};
  };
  const auto nodes = one("nodes", 8, 1000);
  if (!nodes) return nodes.error();
  const auto blocks = one("blocks", 1'000'000, 100'000'000);
  const auto block_tokens = one("block-tokens", 16, kTraceBlockTokens);
  const auto replicas = one("replicas", std::min(nodes.value(), 8U), nodes.value());
  const auto seed = one("seed", 1, UINT32_MAX);
  const auto minutes = one("minutes", 60, 60 * 24);
  for (const auto* number : {&blocks, &block_tokens, &replicas, &seed, &minutes}) {
    if (!*number) return number->error();
  }
  if (kTraceBlockTokens % block_tokens.value() != 0) {
    return Error{ErrorCode::kInvalidArgument, "--block-tokens: has to divide " + std::to_string(kTraceBlockTokens)};
  }
  const std::string router = options.text("router", "round-robin");
  if (router != "round-robin" && router != "prefix") {
    return Error{ErrorCode::kInvalidArgument, "--router: '" + router + "' is neither round-robin nor prefix"};
  }
  run.shape = {nodes.value(),
               replicas.value(),
               blocks.value(),
               block_tokens.value(),
               router == "prefix" ? testing::ClusterRouter::kPrefix : testing::ClusterRouter::kRoundRobin,
               seed.value()};
  run.minutes = minutes.value();
  return run;
}

std::vector<testing::TracedPrompt> prompts(std::vector<TraceRequest> requests, std::uint32_t minutes) {
  std::vector<testing::TracedPrompt> all;
  for (TraceRequest& request : requests) {
    if (request.seconds >= 60.0 * minutes) continue;
    all.push_back({static_cast<Nanos>(request.seconds * kSecond), request.tokens, std::move(request.blocks)});
  }
  std::ranges::stable_sort(all, {}, &testing::TracedPrompt::at);
  return all;
}

double share(std::uint64_t part, std::uint64_t all) {
  return all == 0 ? 0 : 100.0 * static_cast<double>(part) / static_cast<double>(all);
}

Json seconds(const std::optional<Nanos>& time) {
  return time ? Json(static_cast<double>(*time) / kSecond) : Json(nullptr);
}

// Bytes a second that one node sends and is sent, by what they are for.
Json per_second(const DirectoryTraffic& traffic, DirectoryUse use, double node_seconds) {
  const auto& flow = traffic.of(use);
  return {{"requests", static_cast<double>(flow.requests) / node_seconds},
          {"sent", static_cast<double>(flow.sent_bytes) / node_seconds},
          {"received", static_cast<double>(flow.received_bytes) / node_seconds}};
}

// `follower`: reads are taken from those that follow; all nodes would do as they do.
Json directory_json(const ClusterFigures& figures, const ClusterShape& shape) {
  const double time = static_cast<double>(figures.served) / kSecond;
  const double all_seconds = time * (shape.nodes + (shape.replicas < shape.nodes ? 1 : 0));
  const double follower_seconds = time * figures.followers;
  const auto changes = static_cast<double>(figures.changes);
  const auto& streams = figures.all.of(DirectoryUse::kStream);
  const auto& snapshots = figures.all.of(DirectoryUse::kSnapshot);
  double sent = 0;
  double received = 0;
  for (const auto use : {DirectoryUse::kStream, DirectoryUse::kSnapshot, DirectoryUse::kRound}) {
    sent += static_cast<double>(figures.all.of(use).sent_bytes) / all_seconds;
    received += static_cast<double>(figures.all.of(use).received_bytes) / all_seconds;
  }
  for (const auto use : {DirectoryUse::kFollow, DirectoryUse::kLoad}) {
    sent += static_cast<double>(figures.follower.of(use).sent_bytes) / follower_seconds;
    received += static_cast<double>(figures.follower.of(use).received_bytes) / follower_seconds;
  }
  const double nodes = shape.nodes;
  Json json;
  json["changes"] = figures.changes;
  json["changes_per_node_and_second"] = changes / time / nodes;
  json["batches_per_node_and_second"] = static_cast<double>(figures.batches) / time / nodes;
  json["bytes_per_change"] = {{"stream", static_cast<double>(streams.sent_bytes) / changes},
                              {"snapshots", static_cast<double>(snapshots.sent_bytes) / changes}};
  json["node_per_second"] = {{"stream", per_second(figures.all, DirectoryUse::kStream, all_seconds)},
                             {"snapshots", per_second(figures.all, DirectoryUse::kSnapshot, all_seconds)},
                             {"rounds", per_second(figures.all, DirectoryUse::kRound, all_seconds)},
                             {"follow", per_second(figures.follower, DirectoryUse::kFollow, follower_seconds)},
                             {"load", per_second(figures.follower, DirectoryUse::kLoad, follower_seconds)},
                             {"sent", sent},
                             {"received", received}};
  json["redis_per_second"] = {{"received", sent * nodes}, {"sent", received * nodes}};
  json["redis_value_bytes"] = figures.store_bytes;
  return json;
}

Json figures_json(const ClusterFigures& figures, const Run& run, const testing::ServedBlocks& alone,
                  const testing::ServedBlocks& ideal) {
  const ClusterShape& shape = run.shape;
  const testing::ServedBlocks& blocks = figures.blocks;
  std::vector<Nanos> lookups = figures.lookups;
  Json json;
  json["nodes"] = shape.nodes;
  json["blocks"] = shape.blocks;
  json["block_tokens"] = shape.block_tokens;
  json["replicas"] = shape.replicas;
  json["router"] = shape.router == testing::ClusterRouter::kPrefix ? "prefix" : "round-robin";
  json["seed"] = shape.seed;
  json["seconds"] = static_cast<double>(figures.served) / kSecond;
  json["requests"] = blocks.requests;
  json["busiest_node"] = static_cast<double>(figures.busiest_node) * shape.nodes / static_cast<double>(blocks.asked);
  json["hit_%"] = {{"ideal", share(ideal.hits(), ideal.asked)},
                   {"cluster", share(blocks.hits(), blocks.asked)},
                   {"own", share(blocks.own, blocks.asked)},
                   {"remote", share(blocks.remote, blocks.asked)},
                   {"undelivered", share(blocks.undelivered, blocks.asked)},
                   {"alone", share(alone.hits(), alone.asked)},
                   {"of_ideal", share(blocks.hits(), ideal.hits())}};
  Json& unimported = json["unimported_blocks"] = Json::object();
  for (std::size_t i = 0; i < proto::kReasonCount; ++i) {
    if (figures.unimported[i] > 0)
      unimported[proto::reason_name(static_cast<proto::Reason>(i))] = figures.unimported[i];
  }
  json["directory"] = directory_json(figures, shape);
  const auto& replica = figures.replica;
  json["replica"] = {{"blocks", replica.blocks},
                     {"bytes", replica.memory_bytes},
                     {"bytes_per_block", static_cast<double>(replica.memory_bytes) /
                                             static_cast<double>(std::max<std::uint64_t>(replica.blocks, 1))}};
  json["converged_s"] = {{"joined", seconds(figures.joined)},
                         {"after_last_change", seconds(figures.converged)},
                         {"death_seen", seconds(figures.death_seen)},
                         {"redis_emptied", seconds(figures.emptied_and_converged)}};
  json["this_machine"] = {{"lookups", lookups.size()},
                          {"lookup_p50_us", percentile_us(lookups, 0.5)},
                          {"lookup_p99_us", percentile_us(lookups, 0.99)}};
  return json;
}

void print(const Json& json, const std::string& name) {
  if (json.is_number_float()) {
    std::printf("%-48s %.4g\n", name.c_str(), json.get<double>());
  } else if (!json.is_object()) {
    std::printf("%-48s %s\n", name.c_str(), json.is_string() ? json.get<std::string>().c_str() : json.dump().c_str());
  }
  if (!json.is_object()) return;
  for (const auto& [key, value] : json.items()) print(value, name.empty() ? key : name + "." + key);
}

}  // namespace

int run_cluster(const std::string& trace_path, const Options& options) {
  const auto run = run_of(options);
  auto requests = read_trace(trace_path);
  for (const Error* error : {run ? nullptr : &run.error(), requests ? nullptr : &requests.error()}) {
    if (error == nullptr) continue;
    std::fprintf(stderr, "%s\n", error->message.c_str());
    return kWrongUsage;
  }
  const ClusterShape& shape = run.value().shape;
  const auto trace = prompts(std::move(requests).value(), run.value().minutes);
  const testing::ClusterLoad load(trace, shape.nodes, shape.seed);
  std::fprintf(stderr, "%zu requests; one shared cache\n", load.requests().size());
  const auto ideal = testing::serve_apart(load, shape, 1);
  std::fprintf(stderr, "each node alone\n");
  const auto alone = testing::serve_apart(load, shape, shape.nodes);
  std::fprintf(stderr, "the cluster\n");
  testing::ClusterSim sim(shape, load);
  sim.join();
  sim.serve();
  if (shape.nodes > 1) sim.kill_one();
  sim.empty_store();
  const Json json = figures_json(sim.figures(), run.value(), alone, ideal);
  if (options.has("json")) {
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    print(json, "");
  }
  return 0;
}

}  // namespace flexkv::bench
