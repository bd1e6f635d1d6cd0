// The Python module flexkv._core: the node, the scheduler's client and the rank agent, with plain Python values.
// No KV bytes pass through here. Calls that may wait release the GIL; all others are short.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>
#include <poll.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "changes.h"
#include "cluster_checks.h"
#include "flexkv/agent/rank_agent.h"
#include "flexkv/base/log.h"
#include "flexkv/client/client.h"
#include "flexkv/device/cuda_device.h"
#include "flexkv/device/host_device.h"
#include "flexkv/device/self_test.h"
#include "flexkv/disk/check.h"
#include "flexkv/disk/directory.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/net/secret.h"
#include "flexkv/proto/host_frames.h"
#include "flexkv/server/node_server.h"
#include "hashes.h"
#include "machine.h"
#include "options.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flexkv::bind {
namespace {

[[noreturn]] void raise(const Error& error) {
  if (error.code == ErrorCode::kInvalidArgument) throw nb::value_error(error.message.c_str());
  throw std::runtime_error(error.message);
}

template <typename T>
T unwrap(Result<T> result) {
  if (!result) raise(result.error());
  return std::move(result).value();
}

Nanos nanos(double seconds) { return static_cast<Nanos>(std::clamp(seconds, 0.0, 1e9) * kSecond); }

index::PolicyOptions policy_options(const nb::dict& options) {
  using Kind = index::PolicyKind;
  static constexpr std::pair<std::string_view, Kind> kNames[] = {
      {"adaptive", Kind::kAdaptive}, {"lru", Kind::kLru}, {"lfu", Kind::kLfu},   {"slru", Kind::kSlru},
      {"fifo", Kind::kFifo},         {"mru", Kind::kMru}, {"filo", Kind::kFilo}, {"s3fifo", Kind::kS3Fifo}};
  index::PolicyOptions policy;
  const auto name = option<std::string>(options, "policy", "adaptive");
  const auto* found =
      std::find_if(std::begin(kNames), std::end(kNames), [&](const auto& e) { return e.first == name; });
  if (found == std::end(kNames)) throw nb::value_error(("unknown eviction policy '" + name + "'").c_str());
  policy.kind = found->second;
  policy.protected_after = option<unsigned>(options, "slru_protected_hits", policy.protected_after);
  const double reward = option<double>(options, "hit_reward_seconds", 0);
  if (reward > 0 && policy.kind == Kind::kLru) {
    policy.kind = Kind::kHitReward;
    policy.hit_reward = static_cast<Nanos>(reward * kSecond);
  }
  return policy;
}

server::NodeServerOptions server_options(const nb::dict& options) {
  server::NodeServerOptions out;
  out.node.pool_bytes = option<std::uint64_t>(options, "pool_bytes", 0);
  out.node.policy = policy_options(options);
  out.node.evict_ratio = option<double>(options, "evict_ratio", 0.0);
  out.node.evict_start_threshold = option<double>(options, "evict_start_threshold", 1.0);
  out.node.load_timeout = option<std::int64_t>(options, "load_timeout_ms", 10'000) * kMillisecond;
  out.node.save_timeout = option<std::int64_t>(options, "save_timeout_ms", 30'000) * kMillisecond;
  out.node.always_load = option<bool>(options, "always_load", false);
  out.node.disk_admission = option<bool>(options, "ssd_admission", true);
  out.huge_pages = option<bool>(options, "huge_pages", true);
  out.disk.bytes = option<std::uint64_t>(options, "ssd_bytes", 0);
  out.disk.directories = option<std::vector<std::string>>(options, "ssd_directories", {});
  out.disk.make_parents = option<bool>(options, "ssd_make_parents", false);
  out.disk.strict = option<bool>(options, "ssd_strict", false);
  out.disk.direct = option<bool>(options, "ssd_direct_io", true);
  out.disk.endurance.dwpd = option<double>(options, "ssd_dwpd", 0.0);
  out.disk.endurance.capacity_bytes = option<std::uint64_t>(options, "ssd_capacity_bytes", 0);
  out.disk.endurance.tbw = option<double>(options, "ssd_tbw", 0.0);
  out.disk.endurance.years = option<double>(options, "ssd_years", 5.0);
  if (options.contains("cluster")) {
    auto& cluster = out.cluster.emplace();
    cluster.cluster = option<std::string>(options, "cluster", cluster.cluster);
    cluster.node = option<std::string>(options, "cluster_node", "");
    cluster.secret_file = option<std::string>(options, "cluster_secret_file", "");
    cluster.listen = option<std::string>(options, "cluster_listen", "");
    cluster.share_host = option<bool>(options, "cluster_share_host", true);
    cluster.share_drives = option<bool>(options, "cluster_share_drives", false);
    cluster.nixl_library = option<std::string>(options, "cluster_nixl_library", "");
    cluster.mooncake_helper = option<std::vector<std::string>>(options, "cluster_mooncake_helper", {});
    cluster.redis.host = option<std::string>(options, "redis_host", cluster.redis.host);
    cluster.redis.port = option<int>(options, "redis_port", cluster.redis.port);
    cluster.redis.password = option<std::string>(options, "redis_password", "");
    cluster.time_to_live = option<std::int64_t>(options, "node_ttl_seconds", 30) * kSecond;
  }
  if (options.contains("engine_listen")) {
    auto& door = out.door.emplace();
    door.listen = option<std::string>(options, "engine_listen", "");
    door.secret_file = option<std::string>(options, "engine_secret_file", "");
    door.cluster = option<std::string>(options, "engine_cluster", door.cluster);
  }
  if (options.contains("remote_url")) out.remote = remote_options(options);
  return out;
}

void set_log_level_by_name(const std::string& level) {
  if (level == "debug") return set_log_level(LogLevel::kDebug);
  if (level == "info") return set_log_level(LogLevel::kInfo);
  if (level == "warning") return set_log_level(LogLevel::kWarning);
  set_log_level(LogLevel::kError);
}

// A node that is configured, and once it listens, running.
class PyNode {
 public:
  explicit PyNode(const nb::dict& options) : options_(server_options(options)) {
    options_.mode = option<std::string>(options, "mode", "daemon");
    set_log_level_by_name(option<std::string>(options, "log_level", "info"));
  }

  void listen(const std::string& runtime_dir, const std::string& name) {
    if (server_) throw std::runtime_error("this node listens already");
    options_.runtime_dir = unwrap(ipc::runtime_dir(runtime_dir));
    options_.name = name;
    auto started = [&] {
      nb::gil_scoped_release release;
      return server::NodeServer::start(options_);
    }();
    if (!started && started.error().code == ErrorCode::kNoSpace) {
      PyErr_SetString(PyExc_MemoryError, started.error().message.c_str());
      throw nb::python_error();
    }
    server_ = unwrap(std::move(started));
  }

  void wait(int stop_fd) const {
    nb::gil_scoped_release release;
    pollfd stop{stop_fd, POLLIN, 0};
    (void)::poll(&stop, 1, -1);
  }

  bool drain(double timeout_s) const {
    const auto server = running();
    nb::gil_scoped_release release;
    server->drain(nanos(timeout_s));
    return server->wait_drained();
  }

  void stop() {
    auto ended = std::move(server_);  // a client that still holds it keeps it alive
    nb::gil_scoped_release release;
    ended.reset();
  }

  std::shared_ptr<server::NodeServer> running() const {
    if (!server_) throw std::runtime_error("this node does not listen");
    return server_;
  }

 private:
  server::NodeServerOptions options_;
  std::shared_ptr<server::NodeServer> server_;
};

proto::ClientHello client_hello(const std::string& engine_id, std::uint32_t rank_count, const std::string& model,
                                const nb::bytes& fingerprint, std::uint32_t block_tokens) {
  proto::ClientHello hello;
  hello.engine_id = engine_id;
  hello.rank_count = rank_count;
  hello.model = model;
  hello.block_tokens = block_tokens;
  if (fingerprint.size() != hello.fingerprint.size()) throw nb::value_error("the fingerprint must have 32 bytes");
  std::memcpy(hello.fingerprint.data(), fingerprint.c_str(), hello.fingerprint.size());
  return hello;
}

class PyClient {
 public:
  PyClient(std::shared_ptr<server::NodeServer> node, std::unique_ptr<client::Client> client)
      : node_(std::move(node)), client_(std::move(client)) {}

  client::Client& get() {
    if (!client_) throw std::runtime_error("this client is closed");
    return *client_;
  }
  void close() {
    client_.reset();
    node_.reset();
  }

  // How many hashes the client knows, and views of the others.
  std::pair<std::uint32_t, std::vector<std::span<const std::byte>>> unknown(proto::SequenceId sequence,
                                                                            const nb::object& hashes) {
    const std::uint32_t known = get().known_hashes(sequence);
    return {known, hash_views(hashes, known)};
  }

  std::tuple<std::uint32_t, const char*, std::uint32_t> lookup(proto::SequenceId sequence, const nb::object& hashes,
                                                               std::uint32_t engine_blocks) {
    const auto reply = look_up(sequence, hashes, engine_blocks);
    return {reply.matched_blocks, proto::reason_name(reply.reason), reply.disk_blocks};
  }

  std::pair<std::uint32_t, std::uint32_t> lookup_in_host_memory(proto::SequenceId sequence, const nb::object& hashes,
                                                                std::uint32_t engine_blocks) {
    const auto reply = look_up(sequence, hashes, engine_blocks);
    return {reply.host_blocks, reply.matched_blocks};
  }

  std::tuple<std::uint32_t, const char*, std::uint32_t> lookup_last(proto::SequenceId sequence,
                                                                    const nb::object& hashes) {
    const auto views = hash_views(hashes, 0);
    nb::gil_scoped_release release;  // as in look_up()
    const auto reply = get().lookup_last(sequence, views);
    return {reply.matched_blocks, proto::reason_name(reply.reason), reply.disk_blocks};
  }

  void prefetch(proto::SequenceId sequence, const nb::object& hashes) {
    const auto [known, views] = unknown(sequence, hashes);
    get().prefetch(sequence, known, views);
  }

  proto::JobId load(proto::SequenceId sequence, std::uint32_t first_block,
                    const std::vector<std::uint32_t>& device_blocks, bool at_once) {
    return get().load(sequence, first_block, device_blocks, start(at_once));
  }

  proto::JobId save(proto::SequenceId sequence, const nb::object& hashes, std::uint32_t first_block,
                    const std::vector<std::uint32_t>& device_blocks, bool at_once) {
    const auto [known, views] = unknown(sequence, hashes);
    return get().save(sequence, known, views, first_block, device_blocks, start(at_once));
  }

  void describe(proto::SequenceId sequence, std::uint32_t first_block, const nb::object& hashes,
                const std::vector<std::uint32_t>& tokens, const std::vector<nb::bytes>& details) {
    for (auto& request : describe_requests(first_block, hash_views(hashes, 0), tokens, details)) {
      get().describe(sequence, std::move(request));
    }
  }

  bool wait_ended_jobs(double timeout_s) {
    nb::gil_scoped_release release;
    return get().wait_ended_jobs(nanos(timeout_s));
  }

  bool served(double timeout_s) {
    nb::gil_scoped_release release;
    return get().served(nanos(timeout_s));
  }

  using Result = std::tuple<proto::JobId, const char*, std::uint32_t>;
  std::vector<Result> take_results() {
    std::vector<Result> ended;
    for (const auto& result : get().take_ended_jobs()) {
      const bool complete = result.status == proto::JobStatus::kDone && result.reason == proto::Reason::kNone;
      ended.emplace_back(result.job, complete ? "" : proto::reason_name(result.reason), result.good_blocks);
    }
    return ended;
  }
  std::vector<std::pair<proto::JobId, const char*>> take_ended_jobs() {
    std::vector<std::pair<proto::JobId, const char*>> ended;
    for (const auto& [job, problem, good_blocks] : take_results()) ended.emplace_back(job, problem);
    return ended;
  }

 private:
  static client::Client::Start start(bool at_once) {
    return at_once ? client::Client::Start::kAtOnce : client::Client::Start::kWhenArmed;
  }

  proto::LookupReply look_up(proto::SequenceId sequence, const nb::object& hashes, std::uint32_t engine_blocks) {
    const auto [known, views] = unknown(sequence, hashes);
    // The caller keeps the hashes alive, and only this thread changes them.
    nb::gil_scoped_release release;
    return get().lookup(sequence, known, views, engine_blocks);
  }

  std::shared_ptr<server::NodeServer> node_;  // an embedded one outlives its client
  std::unique_ptr<client::Client> client_;
};

layout::TensorDesc tensor_desc(const nb::handle& item) {
  const auto fields = nb::cast<nb::dict>(item);
  layout::TensorDesc desc;
  desc.name = nb::cast<std::string>(fields["name"]);
  desc.address = nb::cast<std::uint64_t>(fields["address"]);
  desc.element_bytes = nb::cast<std::uint32_t>(fields["element_bytes"]);
  desc.shape = nb::cast<std::vector<std::int64_t>>(fields["shape"]);
  desc.stride = nb::cast<std::vector<std::int64_t>>(fields["stride"]);
  desc.block_axis = option<unsigned>(fields, "block_axis", 0);
  desc.kernel_blocks_per_block = option<std::uint32_t>(fields, "kernel_blocks_per_block", 1);
  return desc;
}

class PyAgent {
 public:
  // device: "host" or "cuda:N".
  PyAgent(const nb::dict& options, const nb::list& tensors, std::uint32_t block_count, const std::string& device) {
    agent::RankAgentOptions out;
    out.runtime_dir = unwrap(ipc::runtime_dir(option<std::string>(options, "runtime_dir", "")));
    out.node_name = nb::cast<std::string>(options["node_name"]);
    out.engine_id = nb::cast<std::string>(options["engine_id"]);
    out.rank = nb::cast<std::uint32_t>(options["rank"]);
    out.rank_count = nb::cast<std::uint32_t>(options["rank_count"]);
    out.shard = option<std::uint32_t>(options, "shard", out.rank);
    out.load_timeout = option<std::int64_t>(options, "load_timeout_ms", 10'000) * kMillisecond;
    out.save_timeout = option<std::int64_t>(options, "save_timeout_ms", 30'000) * kMillisecond;
    const auto stage_below = option<std::uint32_t>(options, "gpu_stage_below_bytes", device::kStageBelow);
    set_log_level_by_name(option<std::string>(options, "log_level", "info"));
    std::vector<layout::TensorDesc> descs;
    for (const nb::handle item : tensors) descs.push_back(tensor_desc(item));

    nb::gil_scoped_release release;
    auto opened = device == "host" ? device::open_host_device() : open_cuda(device, stage_below);
    auto memory = unwrap(std::move(opened));
    auto plan = unwrap(layout::BlockLayout::derive(descs, block_count, memory->efficient_copy_bytes()));
    unwrap(device::self_test(*memory, plan, descs));
    description_ = plan.describe();
    for (std::size_t i = 0; i < descs.size(); ++i) parts_.push_back(plan.part_of(i) + 1);
    agent_ = unwrap(agent::RankAgent::start(std::move(out), std::move(memory), std::move(plan)));
  }

  agent::RankAgent& get() {
    if (!agent_) throw std::runtime_error("this agent is stopped");
    return *agent_;
  }
  void stop() {
    nb::gil_scoped_release release;
    agent_.reset();
  }
  const std::string& layout() const { return description_; }
  const std::vector<std::uint32_t>& parts() const { return parts_; }

  using Load = std::tuple<std::uint64_t, bool, std::uint32_t>;
  std::vector<Load> take_loads() {
    std::vector<Load> out;
    for (const auto& load : get().take_loads()) out.emplace_back(load.job, load.ok, load.good_blocks);
    return out;
  }
  std::vector<std::pair<std::uint64_t, std::uint32_t>> wait_loads(const std::vector<std::uint64_t>& jobs) {
    nb::gil_scoped_release release;
    std::vector<std::pair<std::uint64_t, std::uint32_t>> out;
    for (const auto& load : get().wait_loads(jobs)) out.emplace_back(load.job, load.good_blocks);
    return out;
  }

  nb::dict counters() {
    const auto counters = get().counters();
    nb::dict out;
    out["attached"] = counters.attached;
    out["pool_registered"] = counters.pool_registered;
    out["attach_count"] = counters.attach_count;
    out["loaded_blocks"] = counters.loaded_blocks;
    out["saved_blocks"] = counters.saved_blocks;
    out["failed_jobs"] = counters.failed_jobs;
    out["refusal"] = counters.refusal;
    return out;
  }

 private:
  static Result<std::shared_ptr<device::Device>> open_cuda(const std::string& device, std::uint32_t stage_below) {
    if (!device.starts_with("cuda:") || device.size() > 8) {
      return Error{ErrorCode::kInvalidArgument, "unknown device '" + device + "': allowed are host and cuda:N"};
    }
    return device::open_cuda_device(std::atoi(device.c_str() + 5), stage_below);
  }

  std::unique_ptr<agent::RankAgent> agent_;
  std::string description_;
  std::vector<std::uint32_t> parts_;
};

proto::DrainRequest drain_request(double timeout_s) {
  // More than a month is no limit that anybody waits for.
  return {static_cast<std::uint32_t>(std::clamp(timeout_s, 0.0, 4e6) * 1000)};
}

// Asks the node that listens at `socket_path` one question; the answer is its status.
std::string ask(const std::string& socket_path, proto::Role role, std::vector<std::byte> question = {}) {
  nb::gil_scoped_release release;
  ipc::Hello hello;
  hello.role = static_cast<std::uint32_t>(role);
  hello.payload = std::move(question);
  auto connected = unwrap(ipc::Channel::connect(socket_path, hello, 5 * kSecond));
  return {reinterpret_cast<const char*>(connected.payload.data()), connected.payload.size()};
}

}  // namespace
}  // namespace flexkv::bind

NB_MODULE(_core, m) {
  // Engines end their processes without unloading modules; what is alive then is no leak.
  nb::set_leak_warnings(false);
  using namespace flexkv;
  using namespace flexkv::bind;

  add_token_hashes(m);
  bind_changes(m);
  m.def("build_info", [] {
    nb::dict info;
    info["version"] = FLEXKV_VERSION;
    info["compiler"] = __VERSION__;
    return info;
  });
  bind_machine(m);
  bind_cluster_checks(m);
  m.def(
      "query_status", [](const std::string& path) { return ask(path, proto::Role::kStatus); }, "socket_path"_a,
      "The status of the node that listens at this path, as JSON. RuntimeError when none answers.");
  m.def(
      "reset", [](const std::string& path) { return ask(path, proto::Role::kReset); }, "socket_path"_a,
      "Makes the node that listens at this path, and its cluster, forget all blocks. Returns its status, as JSON.");

  m.def(
      "drain",
      [](const std::string& path, double timeout_s) {
        return ask(path, proto::Role::kDrain, proto::encode(drain_request(timeout_s)));
      },
      "socket_path"_a, "timeout_s"_a,
      "Has the node that listens at this path drain, within that time, and returns at once: its status, as JSON, which "
      "says how far it is.");
  m.def(
      "scrub",
      [](const std::string& path, std::uint64_t bytes_per_second) {
        return ask(path, proto::Role::kScrub, proto::encode(proto::ScrubRequest{bytes_per_second}));
      },
      "socket_path"_a, "bytes_per_second"_a,
      "Has the node that listens at this path check all blocks on its drives, reading at most so many bytes a second; "
      "0: "
      "it is to stop. Returns its status, as JSON. RuntimeError: it has no SSD tier, or none answers.");
  m.def(
      "disk_check",
      [](const std::string& directory, std::uint64_t bytes_per_second, const nb::callable& progress) {
        const auto report = unwrap(disk::check(
            directory, bytes_per_second, [&](std::uint64_t done, std::uint64_t total) { progress(done, total); }));
        nb::dict out;
        out["blocks"] = report.blocks;
        out["bytes"] = report.bytes;
        out["bad_blocks"] = report.bad_blocks;
        out["unreadable_blocks"] = report.unreadable_blocks;
        out["problems"] = report.problems;
        return out;
      },
      "directory"_a, "bytes_per_second"_a, "progress"_a,
      "Verifies the blocks in a directory of the SSD tier that no node uses; 0: as fast as it goes. Calls "
      "progress(done, total) with bytes.");
  m.def(
      "disk_contents",
      [](const std::string& directory) {
        const auto contents = unwrap(disk::inspect(directory));
        nb::dict out;
        out["bytes"] = contents.bytes;
        out["foreign_count"] = contents.foreign_count;
        out["foreign"] = contents.foreign;
        return out;
      },
      "directory"_a,
      "What lies in a directory of the SSD tier that no node uses: bytes of blocks, and the first names that are not "
      "FlexKV's. ValueError: it is no such directory.");
  m.def(
      "disk_clear", [](const std::string& directory) { return unwrap(disk::clear(directory)); }, "directory"_a,
      "Removes the blocks in a directory of the SSD tier that no node uses; returns the bytes that this frees.");

  nb::class_<PyNode>(m, "Node", "The cache of one machine. Thread-safe.")
      .def(nb::init<nb::dict>(), "options"_a)
      .def("listen", &PyNode::listen, "runtime_dir"_a, "name"_a,
           "MemoryError: the pool does not fit. RuntimeError: another node has the name, or something else failed.")
      .def("wait", &PyNode::wait, "stop_fd"_a, "Waits, without the GIL, until the descriptor is readable.")
      .def("status", [](const PyNode& node) { return node.running()->status_json(); })
      .def("describe", [](const PyNode& node) { return node.running()->describe(); })
      .def("socket_path", [](const PyNode& node) { return node.running()->socket_path(); })
      .def("reset", [](const PyNode& node) { node.running()->reset_all(); })
      .def("drain", &PyNode::drain, "timeout_s"_a,
           "Ends its work without a loss and waits for that, without the GIL, so long at most; False: something is "
           "left.")
      .def(
          "follow", [](const PyNode& node) { return follow_node(node.running()); },
          "Changes, from now on. Not more than once for a node.")
      .def("stop", &PyNode::stop);

  nb::class_<PyClient>(m, "Client", "The scheduler's side of one engine. Owned by one thread.")
      .def_static(
          "embedded",
          [](const PyNode& node, const std::string& engine_id, std::uint32_t rank_count, const std::string& model,
             const nb::bytes& fingerprint, std::uint32_t block_tokens) {
            const auto hello = client_hello(engine_id, rank_count, model, fingerprint, block_tokens);
            auto server = node.running();
            auto port = unwrap(client::open_embedded_port(*server, hello));
            return std::make_unique<PyClient>(
                server, std::make_unique<client::Client>(std::move(port), hello, client::random_first_job()));
          },
          "node"_a, "engine_id"_a, "rank_count"_a, "model"_a, "fingerprint"_a, "block_tokens"_a)
      .def_static(
          "remote",
          [](const std::string& runtime_dir, const std::string& node_name, const std::string& engine_id,
             std::uint32_t rank_count, const std::string& model, const nb::bytes& fingerprint,
             std::uint32_t block_tokens) {
            const auto hello = client_hello(engine_id, rank_count, model, fingerprint, block_tokens);
            auto port = unwrap(client::open_remote_port(unwrap(ipc::runtime_dir(runtime_dir)), node_name, hello));
            return std::make_unique<PyClient>(
                nullptr, std::make_unique<client::Client>(std::move(port), hello, client::random_first_job()));
          },
          "runtime_dir"_a, "node_name"_a, "engine_id"_a, "rank_count"_a, "model"_a, "fingerprint"_a, "block_tokens"_a)
      .def_static(
          "of_machines",
          [](const std::string& runtime_dir, const std::string& node_name, const std::vector<std::string>& others,
             const std::string& secret_file, const std::string& cluster, const std::string& engine_id,
             std::uint32_t rank_count, const std::string& model, const std::vector<nb::bytes>& fingerprints,
             std::uint32_t block_tokens) {
            if (fingerprints.size() != others.size() + 1) throw nb::value_error("one fingerprint for each machine");
            const auto tls = unwrap(
                net::TlsContext::create(unwrap(net::Secret::from_file(secret_file)), proto::kHostPurpose + cluster));
            const auto hello = client_hello(engine_id, rank_count, model, fingerprints[0], block_tokens);
            std::vector<std::unique_ptr<client::HostPort>> hosts;
            hosts.push_back(unwrap(client::open_unix_port(unwrap(ipc::runtime_dir(runtime_dir)), node_name, hello)));
            for (std::size_t i = 0; i < others.size(); ++i) {
              hosts.push_back(unwrap(client::open_tls_port(
                  tls, others[i], client_hello(engine_id, rank_count, model, fingerprints[i + 1], block_tokens))));
            }
            return std::make_unique<PyClient>(
                nullptr, std::make_unique<client::Client>(client::join_ports(std::move(hosts)), hello,
                                                          client::random_first_job()));
          },
          "runtime_dir"_a, "node_name"_a, "others"_a, "secret_file"_a, "cluster"_a, "engine_id"_a, "rank_count"_a,
          "model"_a, "fingerprints"_a, "block_tokens"_a,
          "Of an engine on several machines: the daemon of this one, and those of the others at HOST:PORT. "
          "`rank_count`: on "
          "each; `fingerprints`: of each.")
      .def("open_sequence", [](PyClient& client) { return client.get().open_sequence(); })
      .def("close_sequence", [](PyClient& client, proto::SequenceId id) { client.get().close_sequence(id); })
      .def("lookup", &PyClient::lookup, "sequence"_a, "hashes"_a, "engine_blocks"_a = 0,
           "(leading blocks to load, why the next one is not, how many of them are to be read from drives). "
           "`engine_blocks`: so many of them the engine has itself, and will not load.")
      .def("lookup_last", &PyClient::lookup_last, "sequence"_a, "hashes"_a,
           "Of blocks that need none of the others: (the number, from 1, of the last one that can be loaded, or 0; why "
           "there is none; 1 if it is to be read from drives). The sequence is then that block alone, its block 0.")
      .def("prefetch", &PyClient::prefetch, "sequence"_a, "hashes"_a)
      .def("observe_step",
           [](PyClient& client, std::uint32_t tokens, double pairs, double seconds) {
             client.get().observe_step(tokens, pairs, static_cast<Nanos>(seconds * kSecond));
           })
      .def("lookup_in_host_memory", &PyClient::lookup_in_host_memory, "sequence"_a, "hashes"_a, "engine_blocks"_a = 0,
           "(leading blocks for which no drive is needed, leading blocks to load from anywhere). `engine_blocks`: as "
           "above.")
      .def("load", &PyClient::load, "sequence"_a, "first_block"_a, "device_blocks"_a, "at_once"_a = false,
           "The job, to be armed on every rank; `at_once`: by nobody, and 0: there is no node.")
      .def("save", &PyClient::save, "sequence"_a, "hashes"_a, "first_block"_a, "device_blocks"_a, "at_once"_a = false)
      .def(
          "describe", &PyClient::describe, "sequence"_a, "first_block"_a, "hashes"_a, "tokens"_a, "details"_a,
          "What events call blocks [first_block, len(hashes)): their hashes, as all blocks', their tokens, and details "
          "that come back with the changes, of each block or one for all. Before they are saved, or when found.")
      .def("first_undescribed",
           [](PyClient& client, proto::SequenceId id) { return client.get().first_undescribed(id); })
      .def(
          "take_changes", [](PyClient& client) { return change_list(client.get().take_changes()); },
          "As Changes.take(), of this client's model, and never 'cleared'.")
      .def(
          "told", [](PyClient& client) { return change_list(client.get().told()); }, "As Changes.told().")
      .def("cancel", [](PyClient& client, proto::JobId job) { client.get().cancel(job); })
      .def("take_ended_jobs", &PyClient::take_ended_jobs,
           "[(job, why it failed or is incomplete; empty: it did all it was to do)]")
      .def("take_results", &PyClient::take_results,
           "The same, and of a load the number of leading blocks that all ranks have, also when it has failed.")
      .def("wait_ended_jobs", &PyClient::wait_ended_jobs, "timeout_s"_a,
           "Waits, without the GIL, until jobs have ended; False: none have in time, or the node is gone.")
      .def(
          "generation", [](PyClient& client) { return client.get().generation(); },
          "Changes whenever jobs may have been forgotten and kept blocks be gone. 0: no node now.")
      .def("reset", [](PyClient& client) { client.get().reset(); })
      .def("ready", [](PyClient& client) { return client.get().ready(); })
      .def("served", &PyClient::served, "timeout_s"_a,
           "Whether all ranks are there; an embedded node's client waits for them that long, without the GIL.")
      .def("close", &PyClient::close, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<PyAgent>(m, "RankAgent", "Copies blocks between one rank's device memory and its node. Thread-safe.")
      .def(nb::init<nb::dict, nb::list, std::uint32_t, std::string>(), "options"_a, "tensors"_a, "block_count"_a,
           "device"_a)
      .def("arm_loads", [](PyAgent& agent, const std::vector<std::uint64_t>& jobs,
                           std::uintptr_t stream) { agent.get().arm_loads(jobs, stream); })
      .def("arm_loads_in_parts", [](PyAgent& agent, const std::vector<std::uint64_t>& jobs,
                                    std::uintptr_t stream) { agent.get().arm_loads_in_parts(jobs, stream); })
      .def(
          "hold_engine",
          [](PyAgent& agent, const std::vector<std::uint64_t>& jobs, std::uint32_t parts, std::uintptr_t stream) {
            nb::gil_scoped_release release;
            agent.get().hold_engine(jobs, parts, stream);
          },
          "jobs"_a, "parts"_a, "stream"_a)
      .def("parts", &PyAgent::parts,
           "For each tensor given at the start, after how many parts of a load its blocks are complete.")
      .def("arm_saves", [](PyAgent& agent, const std::vector<std::uint64_t>& jobs,
                           std::uintptr_t stream) { agent.get().arm_saves(jobs, stream); })
      .def("take_loads", &PyAgent::take_loads,
           "[(job, whether all its blocks are there, leading blocks that are)], each once.")
      .def("wait_loads", &PyAgent::wait_loads, "jobs"_a,
           "Waits, without the GIL, until the loads have ended: [(job, leading blocks that are there)] of those that "
           "are "
           "not complete.")
      .def("fence",
           [](PyAgent& agent, const std::vector<std::uint64_t>& jobs, std::int64_t patience_ms) {
             nb::gil_scoped_release release;
             agent.get().fence(jobs, patience_ms * kMillisecond);
           })
      .def("cancel", [](PyAgent& agent, const std::vector<std::uint64_t>& jobs) { agent.get().cancel(jobs); })
      .def(
          "wait_attached",
          [](PyAgent& agent, double timeout_s) {
            nb::gil_scoped_release release;
            return agent.get().wait_attached(nanos(timeout_s));
          },
          "timeout_s"_a)
      .def("layout", &PyAgent::layout)
      .def("counters", &PyAgent::counters)
      .def("stop", &PyAgent::stop);
}
