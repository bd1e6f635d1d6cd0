#include "flexkv/server/status.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "flexkv/cluster/names.h"
#include "flexkv/server/status_beyond.h"

namespace flexkv::server {
namespace {

using nlohmann::json;

json render(const telemetry::Histogram& histogram) {
  json bounds = json::array();
  json counts = json::array();
  unsigned last = 0;
  for (unsigned i = 0; i < telemetry::Histogram::kBucketCount; ++i) {
    if (histogram.bucket(i) != 0) last = i + 1;
  }
  // Buckets of one doubling together: enough for a graph, short enough for a terminal.
  for (unsigned i = 0; i < last; i += 4) {
    std::uint64_t sum = 0;
    for (unsigned j = i; j < std::min(i + 4, telemetry::Histogram::kBucketCount); ++j) sum += histogram.bucket(j);
    const double bound = telemetry::Histogram::bound_us(std::min(i + 3, telemetry::Histogram::kBucketCount - 1));
    bounds.push_back(std::isfinite(bound) ? json(bound) : json("inf"));
    counts.push_back(sum);
  }
  return {{"count", histogram.count()},
          {"p50", histogram.quantile_us(0.5)},
          {"p90", histogram.quantile_us(0.9)},
          {"p99", histogram.quantile_us(0.99)},
          {"max", static_cast<double>(histogram.max()) / kMicrosecond},
          {"sum_us", histogram.sum_us()},
          {"bounds_us", bounds},
          {"counts", counts}};
}

json render(const std::array<std::uint64_t, proto::kReasonCount>& by_reason) {
  json out = json::object();
  for (std::size_t i = 1; i < by_reason.size(); ++i) {
    if (by_reason[i] != 0) out[proto::reason_name(static_cast<proto::Reason>(i))] = by_reason[i];
  }
  return out;
}

json render(const node::DirectionStats& direction) {
  return {{"jobs", direction.jobs},
          {"failed", direction.failed_jobs},
          {"blocks", direction.blocks},
          {"bytes", direction.bytes},
          {"latency_us", render(direction.latency)}};
}

json render(const DrainStatus& drain, json& messages) {
  using State = DrainStatus::State;
  const node::Node::Undone& undone = drain.undone;
  const char* const state = drain.state == State::kDrained    ? "drained"
                            : drain.state == State::kDraining ? "draining"
                                                              : "late";
  messages.push_back(drain.state == State::kDrained
                         ? "this node is drained: engines find and save nothing here until it is started anew"
                         : "this node drains: engines find and save nothing here any more");
  return {{"state", state},
          {"lasts_s", static_cast<double>(drain.lasts) / kSecond},
          {"jobs", undone.jobs},
          {"loans", undone.loans},
          {"lends", undone.lends},
          {"disk_writes", undone.disk_writes},
          {"remote_writes", undone.store_writes},
          {"host_only_blocks", undone.host_only},
          {"looks", undone.looks},
          {"offered_blocks", undone.offered}};
}

json render(const plan::PrefillTime& time) {
  if (!time.known()) return nullptr;
  return {{"fixed_us", time.fixed / kMicrosecond},
          {"us_per_token", time.per_token / kMicrosecond},
          {"ns_per_pair", time.per_pair},
          {"step_tokens", time.step_tokens}};
}

json render(const node::DiskFlowStats& flow, const std::array<std::uint64_t, proto::kReasonCount>& failed) {
  return {{"blocks", flow.blocks},
          {"bytes", flow.bytes},
          {"failed_blocks", render(failed)},
          {"latency_us", render(flow.latency)}};
}

json days(double left) { return std::isfinite(left) ? json(left) : json(nullptr); }

json render(const admission::WriteBudget::Report& report, double pressure) {
  return {{"written_bytes", report.written_bytes}, {"last_day_bytes", report.last_day_bytes},
          {"daily_bytes", report.daily_bytes},     {"bytes_per_day", report.bytes_per_day},
          {"days_left", days(report.days_left)},   {"pressure", pressure}};
}

json render(const DiskBridge::DriveStatus& status) {
  const disk::VolumeStats& drive = status.volume;
  json out = {{"directory", drive.directory},
              {"form", drive.form},
              {"reads", drive.health.reads},
              {"writes", drive.health.writes},
              {"why", drive.health.why},
              {"bytes", drive.share_bytes},
              {"used_bytes", drive.used_bytes},
              {"closed_bytes", drive.closed_bytes},
              {"queued", drive.queued},
              {"blocks_written", drive.blocks_written},
              {"blocks_read", drive.blocks_read},
              {"bytes_written", drive.block_bytes_written + drive.record_bytes_written},
              {"bytes_read", drive.block_bytes_read},
              {"checksum_failures", drive.checksum_failures},
              {"failed_reads", drive.failed_reads},
              {"failed_writes", drive.failed_writes},
              {"quarantined_slots", drive.quarantined_slots}};
  if (status.budget) out["endurance"] = render(status.budget->report, status.budget->pressure);
  return out;
}

// Of all drives; their days are those of the drive that has the fewest.
json render_endurance(const DiskBridge::Status& disk) {
  admission::WriteBudget::Report sum;
  sum.days_left = std::numeric_limits<double>::infinity();
  for (const auto& drive : disk.drives) {
    if (!drive.budget) continue;
    const auto& one = drive.budget->report;
    sum.written_bytes += one.written_bytes;
    sum.last_day_bytes += one.last_day_bytes;
    sum.daily_bytes += one.daily_bytes;
    sum.bytes_per_day += one.bytes_per_day;
    sum.days_left = std::min(sum.days_left, one.days_left);
  }
  return render(sum, disk.write_pressure);
}

json render(const DiskBridge::SpaceStatus& space) {
  const disk::Discarded& discarded = space.discarded;
  return {{"recovered_blocks", space.recovered_blocks},
          {"seconds", space.seconds},
          {"discarded",
           {{"damaged", discarded.damaged},
            {"other_epoch", discarded.other_epoch},
            {"out_of_range", discarded.out_of_range},
            {"duplicate", discarded.duplicate},
            {"orphan", discarded.orphan}}},
          {"dropped_files", space.dropped_files}};
}

json render(const DiskBridge::Status& disk, const node::NodeStats& stats, json& messages) {
  json drives = json::array();
  json opened = json::array();
  for (const auto& drive : disk.drives) {
    drives.push_back(render(drive));
    const auto& volume = drive.volume;
    if (!volume.health.why.empty()) messages.push_back("SSD cache: " + volume.directory + ": " + volume.health.why);
    if (drive.budget && !drive.budget->why.empty()) {
      messages.push_back("SSD cache: " + volume.directory + ": " + drive.budget->why);
    }
  }
  for (const auto& space : disk.spaces) opened.push_back(render(space));
  return {{"drives", drives},
          {"opened", opened},
          {"endurance", render_endurance(disk)},
          {"recovered_blocks", stats.disk_blocks_recovered},
          {"evicted_blocks", stats.disk_blocks_evicted},
          {"prefetched_blocks", stats.blocks_prefetched}};
}

const char* state_name(node::ScrubStatus::State state) {
  switch (state) {
    case node::ScrubStatus::State::kRunning:
      return "running";
    case node::ScrubStatus::State::kStopped:
      return "stopped";
    case node::ScrubStatus::State::kDone:
      break;
  }
  return "done";
}

json render(const node::ScrubStatus& scrub, const DiskBridge::Status& disk, Nanos now) {
  const bool running = scrub.state == node::ScrubStatus::State::kRunning;
  json drives = json::array();
  for (std::size_t i = 0; i < scrub.drives.size(); ++i) {
    const node::ScrubStatus::Drive& drive = scrub.drives[i];
    drives.push_back({{"directory", disk.drives[i].volume.directory},
                      {"checked_blocks", drive.checked_blocks},
                      {"checked_bytes", drive.checked_bytes},
                      {"damaged_blocks", drive.damaged_blocks},
                      {"unreadable_blocks", drive.unreadable_blocks},
                      {"unchecked_blocks", drive.unchecked_blocks}});
  }
  const auto seconds = [](Nanos time) { return static_cast<double>(time) / kSecond; };
  return {{"state", state_name(scrub.state)},
          {"bytes_per_s", scrub.bytes_per_second},
          {"blocks", scrub.blocks},
          {"bytes", scrub.bytes},
          {"seconds", seconds((running ? now : scrub.ended) - scrub.begun)},
          {"ended_seconds_ago", running ? json(nullptr) : json(seconds(now - scrub.ended))},
          {"drives", drives}};
}

const char* basis_name(node::Choice::Basis basis) {
  switch (basis) {
    case node::Choice::Basis::kCost:
      return "cost";
    case node::Choice::Basis::kAlways:
      return "always";
    case node::Choice::Basis::kReadsUnknown:
      return "reads_unknown";
    case node::Choice::Basis::kPrefillUnknown:
      break;
  }
  return "prefill_unknown";
}

json render_choices(const node::Node& node) {
  json latest = json::array();
  const auto engines = node.engines();
  const auto expected = [](double nanos) { return nanos > 0 ? json(nanos / kMicrosecond) : json(nullptr); };
  for (const node::Choice& choice : node.choices()) {
    const auto engine = std::ranges::find(engines, choice.engine, &node::Node::EngineInfo::handle);
    latest.push_back({{"seconds_ago", static_cast<double>(node.now() - choice.at) / kSecond},
                      {"engine", engine == engines.end() ? json(nullptr) : json(engine->id)},
                      {"sequence", choice.sequence},
                      {"prompt_blocks", choice.prompt_blocks},
                      {"engine_blocks", choice.engine_blocks},
                      {"host_blocks", choice.host_blocks},
                      {"coming_blocks", choice.coming_blocks},
                      {"drive_blocks", choice.drive_blocks},
                      {"chosen_blocks", choice.chosen_blocks},
                      {"basis", basis_name(choice.basis)},
                      {"read_bytes_per_s", choice.read_bytes_per_second},
                      {"read_wait_us", choice.read_wait / kMicrosecond},
                      {"engine_wait_us", choice.engine_wait / kMicrosecond},
                      {"requests_behind", choice.behind},
                      {"expected_us", expected(choice.expected)},
                      {"expected_if_all_us", expected(choice.expected_if_all)},
                      {"expected_if_none_us", expected(choice.expected_if_none)}});
  }
  const auto& stats = node.stats();
  return {{"policy", node.always_loads() ? "always" : "auto"},
          {"all", stats.choices_all},
          {"part", stats.choices_part},
          {"none", stats.choices_none},
          {"recomputed_blocks", stats.recomputed_blocks},
          {"latest", latest}};
}

json render(const admission::AdmissionFilter::Stats& stats) {
  return {{"admitted", stats.admitted},
          {"refused_unlikely", stats.refused_unlikely},
          {"refused_once", stats.refused_once},
          {"refused_rare", stats.refused_rare},
          {"hits", stats.hits},
          {"lost_hits", stats.lost_hits}};
}

// What became of blocks that were offered to a tier, over all spaces.
json sum_of_admission(const json& spaces, const char* tier) {
  json sum = {{"admitted", 0}, {"refused_unlikely", 0}};
  for (const json& space : spaces) {
    for (const auto& [decision, count] : space.at(tier).items()) {
      const bool of_blocks = decision == "admitted" || decision.starts_with("refused_");
      if (of_blocks) sum[decision] = sum.value(decision, std::uint64_t{0}) + count.get<std::uint64_t>();
    }
  }
  return sum;
}

}  // namespace

std::string render_status(const NodeIdentity& identity, const node::Node& node, const DiskBridge::Status* disk,
                          const ClusterBridge::Status* cluster, const RemoteBridge::Status* remote) {
  const auto& stats = node.stats();
  json spaces = json::array();
  std::uint64_t used_bytes = 0;
  std::uint64_t metadata_bytes = 0;
  for (const auto& space : node.spaces()) {
    used_bytes += std::uint64_t{space.used} * space.slot_bytes;
    metadata_bytes += space.metadata_bytes;
    spaces.push_back({{"id", space.id},
                      {"model", space.model},
                      {"block_bytes", space.block_bytes},
                      {"slot_bytes", space.slot_bytes},
                      {"slots", space.slots},
                      {"used", space.used},
                      {"reserved", space.reserved},
                      {"disk_slots", space.disk_slots},
                      {"disk_used", space.disk_used},
                      {"recovering", space.recovering},
                      {"admission", render(space.admission)},
                      {"remote_admission", render(space.store_admission)},
                      {"engines", space.engines}});
  }
  json engines = json::array();
  json messages = identity.messages;
  for (const auto& engine : node.engines()) {
    const char* state = engine.ready ? "ready" : "waiting";
    engines.push_back({{"id", engine.id},
                       {"model", engine.model},
                       {"ranks", engine.ranks},
                       {"attached_ranks", engine.ranks_attached},
                       {"sequences", engine.sequences},
                       {"prefill", render(engine.prefill)},
                       {"state", state}});
    if (!engine.ready) {
      messages.push_back("engine " + engine.id + " is not served yet: " + std::to_string(engine.ranks_attached) +
                         " of " + std::to_string(engine.ranks) + " ranks attached, scheduler " +
                         (engine.client ? "attached" : "not attached"));
    }
  }
  json transfers = {{"to_device", render(stats.to_device)}, {"to_host", render(stats.to_host)}};
  json on_drives;
  if (disk != nullptr) {
    transfers["from_disk"] = render(stats.from_disk, stats.unfetched_blocks);
    transfers["to_disk"] = render(stats.to_disk, stats.unwritten_blocks);
    transfers["to_disk"]["checked_blocks"] = stats.blocks_checked;
    on_drives = render(*disk, stats, messages);
    if (node.admits()) on_drives["admission"] = sum_of_admission(spaces, "admission");
    on_drives["read_bytes_per_s"] = node.disk_bytes_per_second();
    on_drives["choices"] = render_choices(node);
    on_drives["scrub"] = node.scrub() == nullptr ? json(nullptr) : render(*node.scrub(), *disk, identity.now);
  }
  json in_cluster;
  if (cluster != nullptr) in_cluster = render_cluster(*cluster, stats, messages);
  json in_store;
  if (remote != nullptr) {
    transfers["to_remote"] = render(stats.to_store, stats.unstored_blocks);
    in_store = render_remote(*remote, messages);
    in_store["read"]["latency_us"] = render(remote->read_latency);
    in_store["admission"] = sum_of_admission(spaces, "remote_admission");
  }
  if (cluster != nullptr || remote != nullptr) {
    transfers["from_remote"] = render(stats.from_remote, stats.unimported_blocks);
  }
  if (stats.blocks_damaged > 0) {
    messages.push_back(std::to_string(stats.blocks_damaged) +
                       " blocks in host memory were not what the device held when they were saved, and were dropped");
  }
  const json drain = identity.drain ? render(*identity.drain, messages) : json(nullptr);
  const auto queues = node.disk_queues();
  const json out = {{"node",
                     {{"name", identity.name},
                      {"pid", ::getpid()},
                      {"mode", identity.mode},
                      {"version", FLEXKV_VERSION},
                      {"uptime_s", static_cast<double>(identity.uptime) / kSecond},
                      {"drain", drain},
                      {"engine_listen", identity.door_address},
                      {"last_reset", identity.last_reset == 0 ? "" : cluster::hex(identity.last_reset)},
                      {"resets", stats.resets}}},
                    {"pool",
                     {{"bytes", identity.pool_bytes},
                      {"used_bytes", used_bytes},
                      {"free_bytes", node.free_pool_bytes()},
                      {"metadata_bytes", metadata_bytes},
                      {"page_kind", identity.page_kind}}},
                    {"disk", on_drives},
                    {"cluster", in_cluster},
                    {"remote", in_store},
                    {"spaces", spaces},
                    {"engines", engines},
                    {"lookups",
                     {{"count", stats.lookups},
                      {"blocks_queried", stats.blocks_queried},
                      {"blocks_hit", stats.blocks_hit},
                      {"disk_blocks_hit", stats.disk_blocks_hit},
                      {"remote_blocks_hit", stats.remote_blocks_hit},
                      {"miss_blocks", render(stats.missed_blocks)}}},
                    {"saves",
                     {{"blocks", stats.blocks_saved},
                      {"unsaved_blocks", render(stats.unsaved_blocks)},
                      {"damaged_blocks", stats.blocks_damaged}}},
                    {"loads", {{"failed", render(stats.failed_loads)}, {"kept_blocks", stats.blocks_of_failed_loads}}},
                    {"evictions", {{"blocks", stats.blocks_evicted}}},
                    {"transfers", transfers},
                    {"queues",
                     {{"jobs_in_flight", node.jobs_in_flight()},
                      {"peers", identity.peers},
                      {"disk_fetches", queues.fetches},
                      {"disk_writes", queues.writes},
                      {"remote_writes", node.store_queue()}}},
                    {"health", {{"state", messages.empty() ? "ok" : "degraded"}, {"messages", messages}}}};
  // Other nodes, Redis and engines say some of it: whatever bytes these are, it stays JSON.
  return out.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace flexkv::server
