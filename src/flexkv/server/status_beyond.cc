#include "flexkv/server/status_beyond.h"

#include <nlohmann/json.hpp>

#include "flexkv/cluster/names.h"

namespace flexkv::server {

using nlohmann::json;

namespace {

template <typename Value, std::size_t kCount>
json by_name(const std::array<std::uint64_t, kCount>& counts, const char* (*name)(Value)) {
  json out = json::object();
  for (std::size_t i = 0; i < kCount; ++i) {
    if (counts[i] != 0) out[name(static_cast<Value>(i))] = counts[i];
  }
  return out;
}

json render(const ClusterBridge::PeerStatus& peer) {
  return {{"name", peer.info.name},
          {"incarnation", cluster::hex(peer.info.node)},
          {"address", peer.info.address},
          {"condition", cluster::condition_name(peer.info.condition)},
          {"silent_s", static_cast<double>(peer.info.silent) / kSecond},
          {"blocks", peer.blocks},
          {"waiting_bytes", peer.flow.waiting_bytes},
          {"read_bytes_per_s", peer.flow.bytes_per_second},
          {"resting", peer.flow.resting}};
}

}  // namespace

json render_cluster(const ClusterBridge::Status& status, const node::NodeStats& stats, json& messages) {
  const cluster::DirectoryStats& directory = status.directory.directory;
  const std::string& trouble = status.directory.trouble;
  if (!trouble.empty()) messages.push_back("cluster: no other node's blocks until this is over: " + trouble);
  if (directory.same_name > 0) messages.push_back("cluster: another node has this one's name, " + status.node);
  const std::string& one_sided_trouble = status.one_sided_trouble;
  if (!one_sided_trouble.empty()) messages.push_back("cluster: blocks travel over TCP: " + one_sided_trouble);
  json peers = json::array();
  json told_resets = json::array();
  for (const cluster::ResetId reset : directory.told_resets) told_resets.push_back(cluster::hex(reset));
  for (const auto& peer : status.nodes) peers.push_back(render(peer));
  return {{"name", status.cluster},
          {"node", status.node},
          {"address", status.address},
          {"transport", peer::transport_name(status.one_sided)},
          {"peers", peers},
          {"directory",
           {{"joined", directory.joined},
            {"left", directory.left},
            {"epoch", directory.epoch},
            {"told_resets", told_resets},
            {"trouble", trouble},
            {"blocks", status.directory.replica.blocks},
            {"memory_bytes", status.directory.replica.memory_bytes},
            {"left_out_blocks", status.directory.replica.left_out},
            {"spaces_loading", directory.loading},
            {"spaces_stuck", directory.stuck},
            {"told_blocks", directory.blocks_told},
            {"stream_bytes", directory.stream_bytes},
            {"snapshot_bytes", directory.snapshot_bytes}}},
          {"read",
           {{"connections", status.peers.owners},
            {"under_way", status.reading},
            {"requests", status.peers.read.requests},
            {"blocks", status.peers.read.blocks},
            {"bytes", status.peers.read.bytes},
            {"one_sided_blocks", status.peers.read.one_sided_blocks},
            {"one_sided_failures", status.peers.read.one_sided_failures},
            {"given_up", status.given_up},
            {"ended", by_name(status.peers.read.ended, peer::outcome_name)}}},
          {"lent",
           {{"connections", status.peers.readers},
            {"under_way", status.lending},
            {"requests", stats.loans},
            {"blocks", status.peers.served.blocks},
            {"bytes", status.peers.served.bytes},
            {"one_sided_blocks", status.peers.served.placed_blocks}}}};
}

json render_remote(const RemoteBridge::Status& status, json& messages) {
  const remote::RemoteStats& tier = status.tier;
  const auto say = [&](const std::string& what) { messages.push_back("remote tier: " + status.url + ": " + what); };
  const std::string behind = tier.last_error.empty() ? "" : " (" + tier.last_error + ")";
  if (!tier.reads_off.empty()) say("nothing is read for now: " + tier.reads_off + behind);
  if (!tier.writes_off.empty()) say("nothing is written for now: " + tier.writes_off + behind);
  if (tier.reads_off.empty() && tier.writes_off.empty() && !tier.trouble.empty()) say(tier.trouble);
  if (tier.marks_unstored > 0) say("does not know of a reset yet");
  return {{"url", status.url},
          {"looked_through", tier.scans},
          {"known_blocks", tier.blocks},
          {"known_objects", tier.objects},
          {"left_out_objects", tier.left_out},
          {"resets", tier.marks},
          {"resets_unstored", tier.marks_unstored},
          {"reads_off", tier.reads_off},
          {"writes_off", tier.writes_off},
          {"trouble", tier.trouble},
          {"last_error", tier.last_error},
          {"read",
           {{"under_way", status.reading},
            {"waiting_bytes", status.waiting_bytes},
            {"bytes_per_s", status.bytes_per_second},
            {"given_up", status.given_up},
            {"resting", status.resting},
            {"blocks", tier.read_blocks},
            {"bytes", tier.read_bytes},
            {"ended", by_name(tier.reads, remote::outcome_name)}}},
          {"written",
           {{"under_way", status.writing},
            {"objects", tier.objects_written},
            {"blocks", tier.written_blocks},
            {"bytes", tier.written_bytes},
            {"ended", by_name(tier.writes, remote::outcome_name)}}},
          {"operations",
           {{"gets", tier.gets}, {"puts", tier.puts}, {"lists", tier.lists}, {"tried_again", tier.tried_again}}},
          {"scans_failed", tier.scans_failed},
          {"faults", by_name(tier.faults, remote::fault_name)}};
}

}  // namespace flexkv::server
