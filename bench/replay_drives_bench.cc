// The conversation trace through the real node with drives, on virtual time, no data moved. A request looks its prompt
// up, loads what is found, and saves the rest when the load has ended; ranks copy and engines compute in no time,
// drives take the time that their bandwidth says. 128 KiB a token, as Llama 8B has in bfloat16. Sizes are in blocks of
// 512 tokens, as the trace has them; block_tokens is what the engine calls a block: 16 as vLLM does, or 512 to compare
// with admission_bench.
#include <benchmark/benchmark.h>

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <unordered_map>

#include "bench/suites.h"
#include "flexkv/agent/leading_blocks.h"
#include "flexkv/base/assert.h"
#include "flexkv/node/node.h"

namespace flexkv::bench {
namespace {

using Trace = std::vector<TraceRequest>;

constexpr std::uint64_t kTokenBytes = 128 << 10;
constexpr std::uint64_t kTraceBlockBytes = kTraceBlockTokens * kTokenBytes;
constexpr unsigned kDriveCount = 4;
constexpr std::size_t kRequestsPerDriveMax = 1024;
// What the engine tells the node for load-or-recompute: measured for the model above on one H200 (docs/benchmarks.md).
constexpr double kPrefillPerToken = 32'000;

struct Setup {
  std::uint32_t host_blocks = 0;
  std::uint32_t ssd_blocks = 0;
  std::uint32_t block_tokens = 0;
  index::PolicyKind policy{};
  bool admission = false;
  auto operator<=>(const Setup&) const = default;
};

// Drives that serve one request after the other, loads first.
class VirtualDrives final : public node::DiskPort {
 public:
  explicit VirtualDrives(double bytes_per_second) : bytes_per_second_(bytes_per_second) {}

  unsigned drive_count() const override { return kDriveCount; }
  void open_space(node::SpaceNumber number, const node::SpaceName&, std::uint64_t slot_bytes) override {
    space = number;
    slot_time_ = static_cast<Nanos>(static_cast<double>(slot_bytes) / bytes_per_second_ * kSecond);
  }
  void close_space(node::SpaceNumber) override {}
  void reset_space(node::SpaceNumber) override {}
  void reset_closed_spaces(const std::optional<node::ModelName>&) override {}
  node::DiskAdmission write(const node::DiskTransfer& transfer) override { return take(transfer, &Drive::writes); }
  node::DiskAdmission read(const node::DiskTransfer& transfer) override { return take(transfer, &Drive::reads); }
  node::DiskAdmission verify(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  void cancel(node::DiskOp) override {}  // it only asks
  bool can_read(unsigned) const override { return true; }
  double write_pressure() const override { return 0; }

  // When the next transfer ends.
  std::optional<Nanos> next() const {
    std::optional<Nanos> first;
    for (const Drive& drive : drives_) {
      if (drive.running && (!first || drive.ends < *first)) first = drive.ends;
    }
    return first;
  }
  // What ends at `time`, which is next().
  void end(Nanos time, std::vector<node::DiskResult>& results) {
    now = time;
    for (Drive& drive : drives_) {
      if (!drive.running || drive.ends > time) continue;
      results.push_back({*drive.running, node::DiskOutcome::kDone});
      drive.running.reset();
      begin(drive, results);
    }
  }

  Nanos now = 0;
  node::SpaceNumber space = 0;

 private:
  struct Drive {
    std::deque<node::DiskTransfer> reads;
    std::deque<node::DiskTransfer> writes;
    std::optional<node::DiskOp> running;
    Nanos ends = 0;
  };

  node::DiskAdmission take(const node::DiskTransfer& transfer, std::deque<node::DiskTransfer> Drive::*queue) {
    Drive& drive = drives_[transfer.slot % kDriveCount];
    if (drive.reads.size() + drive.writes.size() >= kRequestsPerDriveMax) return node::DiskAdmission::kBusy;
    (drive.*queue).push_back(transfer);
    std::vector<node::DiskResult> late;
    if (!drive.running) begin(drive, late);
    FLEXKV_ASSERT(late.empty());  // an idle drive had nothing that waited
    return node::DiskAdmission::kQueued;
  }
  void begin(Drive& drive, std::vector<node::DiskResult>& results) {
    while (!drive.running && !(drive.reads.empty() && drive.writes.empty())) {
      auto& queue = drive.reads.empty() ? drive.writes : drive.reads;
      const node::DiskTransfer transfer = queue.front();
      queue.pop_front();
      if (transfer.deadline != 0 && transfer.deadline < now) {
        results.push_back({transfer.op, node::DiskOutcome::kDeadline});
        continue;
      }
      drive.running = transfer.op;
      drive.ends = now + slot_time_;
    }
  }

  const double bytes_per_second_;
  Nanos slot_time_ = 0;
  Drive drives_[kDriveCount];
};

struct Figures {
  double tokens = 0;
  double host_hit_tokens = 0;
  double drive_hit_tokens = 0;
  double failed_load_tokens = 0;
  double first_token_nanos = 0;  // of all requests together, were there an engine for each
  node::NodeStats stats;
  double hit_tokens() const { return host_hit_tokens + drive_hit_tokens; }
};

// The node, an engine of one rank that copies at once, and what is under way.
class Replay final : public node::Outbox {
 public:
  Replay(const Setup& setup, double bytes_per_second)
      : block_tokens_(setup.block_tokens), drives_(bytes_per_second), node_(options(setup), *this, &drives_) {
    proto::ClientHello hello{"engine", 1, "bench", {}};
    hello.block_tokens = block_tokens_;
    engine_ = node_.attach_client(hello).value();
    agent_ = node_.attach_agent({"engine", 0, 1, {}, block_tokens_ * kTokenBytes, 1U << 20, "none"}).value();
    node_.set_prefill(engine_, {0, kPrefillPerToken, 0, 0});
    const std::vector<std::uint32_t> slots(kDriveCount,
                                           setup.ssd_blocks * (kTraceBlockTokens / block_tokens_) / kDriveCount);
    node_.on_disk_opened(drives_.space, slots, 0);
  }

  Figures run(const Trace& trace) {
    for (const TraceRequest& request : trace) {
      const auto now = static_cast<Nanos>(request.seconds * kSecond);
      pass_until(now);
      arrive(request, now);
    }
    while (const auto next = events_next()) pass_until(*next);
    FLEXKV_ASSERT(requests_.empty());
    figures_.stats = node_.stats();
    return figures_;
  }

 private:
  struct Request {
    std::uint32_t blocks = 0;
    std::uint32_t matched = 0;
    std::uint32_t on_drives = 0;
    std::uint32_t tokens = 0;
    Nanos arrived_at = 0;
  };

  static node::NodeOptions options(const Setup& setup) {
    node::NodeOptions options;
    options.pool_bytes = std::uint64_t{setup.host_blocks} * kTraceBlockBytes;
    options.disk_bytes = std::uint64_t{setup.ssd_blocks} * kTraceBlockBytes;
    options.policy.kind = setup.policy;
    options.disk_admission = setup.admission;
    return options;
  }

  bool send(node::AgentHandle, const proto::ToAgent& message) override {
    if (const auto* copy = std::get_if<proto::CopyCommand>(&message)) {
      agent::LeadingBlocks& copied = copying_[copy->job];
      for (const proto::BlockSpan& span : copy->spans) copied.add(span);
      if (copy->last) reports_.push_back({copy->job, proto::JobStatus::kDone, copied.count()});
    } else {
      const proto::JobId job = std::get<proto::CancelCommand>(message).job;
      reports_.push_back({job, proto::JobStatus::kCanceled, copying_[job].count()});
    }
    return true;
  }
  void send(node::EngineHandle, const proto::JobResult& result) override { results_.push_back(result); }

  std::optional<Nanos> events_next() const {
    const auto disk = drives_.next();
    const auto deadline = node_.next_deadline();
    if (!disk || !deadline) return disk ? disk : deadline;
    return std::min(*disk, *deadline);
  }

  void pass_until(Nanos now) {
    for (auto next = events_next(); next && *next <= now; next = events_next()) {
      if (drives_.next() == next) {
        ended_.clear();
        drives_.end(*next, ended_);
        node_.on_disk_done(ended_, *next);
      } else {
        drives_.now = *next;
        node_.on_time(*next);
      }
      settle(*next);
    }
    drives_.now = now;
  }

  void arrive(const TraceRequest& request, Nanos now) {
    const std::uint64_t id = ++last_id_;
    Request& waiting = requests_[id];
    waiting.blocks = request.tokens / block_tokens_;
    keys_.clear();
    for (std::uint32_t block = 0; block < waiting.blocks; ++block) {
      const std::uint32_t token = block * block_tokens_;
      const std::uint64_t content =
          std::uint64_t{request.blocks[token / kTraceBlockTokens]} << 16 | token % kTraceBlockTokens;
      keys_.push_back({Prng::mix(content + 1), Prng::mix(~content)});
    }
    const auto found = node_.lookup(engine_, id, 0, keys_, now);
    figures_.tokens += request.tokens;
    waiting.tokens = request.tokens;
    waiting.arrived_at = now;
    waiting.matched = found.matched_blocks;
    waiting.on_drives = found.disk_blocks;
    if (waiting.matched == 0) {
      figures_.first_token_nanos += kPrefillPerToken * waiting.tokens;
      save(id, now);
    } else {
      proto::TransferRequest load{false, true, id, load_of(id), waiting.blocks, {}, 0, {}};
      load.device_blocks.resize(waiting.matched);
      (void)node_.load(engine_, load, now);
    }
    settle(now);
  }

  void save(std::uint64_t id, Nanos now) {
    const std::uint32_t blocks = requests_.at(id).blocks;
    proto::TransferRequest save{true, true, id, save_of(id), blocks, {}, 0, {}};
    save.device_blocks.resize(blocks);
    (void)node_.save(engine_, save, now);
  }

  // What the ranks and the engine do with what the node has told them.
  void settle(Nanos now) {
    while (!reports_.empty() || !results_.empty()) {
      for (const proto::JobReport& report : std::exchange(reports_, {})) {
        if (copying_.erase(report.job) > 0) node_.on_report(agent_, report, now);
      }
      for (const proto::JobResult& result : std::exchange(results_, {})) job_ended(result, now);
    }
  }

  void job_ended(const proto::JobResult& result, Nanos now) {
    const std::uint64_t id = result.job / 2;
    if (result.job == save_of(id)) {
      node_.close_sequence(engine_, id);
      requests_.erase(id);
      return;
    }
    const Request& request = requests_.at(id);
    const std::uint32_t loaded = result.good_blocks;
    figures_.first_token_nanos +=
        static_cast<double>(now - request.arrived_at) + kPrefillPerToken * (request.tokens - loaded * block_tokens_);
    const std::uint32_t from_host = std::min(loaded, request.matched - request.on_drives);
    figures_.drive_hit_tokens += (loaded - from_host) * block_tokens_;
    figures_.host_hit_tokens += from_host * block_tokens_;
    figures_.failed_load_tokens += (request.matched - loaded) * block_tokens_;
    save(id, now);
  }

  static proto::JobId load_of(std::uint64_t id) { return 2 * id; }
  static proto::JobId save_of(std::uint64_t id) { return 2 * id + 1; }

  const std::uint32_t block_tokens_;
  VirtualDrives drives_;
  std::vector<proto::JobReport> reports_;
  std::vector<proto::JobResult> results_;
  std::unordered_map<proto::JobId, agent::LeadingBlocks> copying_;
  node::Node node_;
  node::EngineHandle engine_ = 0;
  node::AgentHandle agent_ = 0;
  std::unordered_map<std::uint64_t, Request> requests_;
  std::uint64_t last_id_ = 0;
  Figures figures_;
  Keys keys_;                            // scratch
  std::vector<node::DiskResult> ended_;  // scratch
};

class Results {
 public:
  Results(std::shared_ptr<const Trace> trace, double bytes_per_second)
      : trace_(std::move(trace)), bytes_per_second_(bytes_per_second) {}
  const Figures& of(const Setup& setup) {
    const auto found = known_.find(setup);
    if (found != known_.end()) return found->second;
    return known_[setup] = Replay(setup, bytes_per_second_).run(*trace_);
  }

 private:
  const std::shared_ptr<const Trace> trace_;
  const double bytes_per_second_;
  std::map<Setup, Figures> known_;
};

void bm_drives(benchmark::State& state, Results& results, index::PolicyKind policy, bool admission) {
  Setup setup{static_cast<std::uint32_t>(state.range(0)), static_cast<std::uint32_t>(state.range(1)),
              static_cast<std::uint32_t>(state.range(2)), policy, admission};
  for (auto _ : state) benchmark::DoNotOptimize(&results.of(setup));
  const Figures& figures = results.of(setup);
  const auto& stats = figures.stats;
  const auto percent = [](double part, double whole) { return whole == 0 ? 0 : 100 * part / whole; };
  const auto terabytes = [](std::uint64_t bytes) { return static_cast<double>(bytes) / 1e12; };
  state.counters["hit_%"] = percent(figures.hit_tokens(), figures.tokens);
  state.counters["host_%"] = percent(figures.host_hit_tokens, figures.tokens);
  state.counters["drive_%"] = percent(figures.drive_hit_tokens, figures.tokens);
  if (figures.failed_load_tokens > 0) {
    state.counters["failed_loads_%"] = percent(figures.failed_load_tokens, figures.tokens);
  }
  const auto reasons = [&](const std::string& what, const auto& blocks) {
    for (std::size_t reason = 1; reason < proto::kReasonCount; ++reason) {
      if (blocks[reason] == 0) continue;
      const std::string name = proto::reason_name(static_cast<proto::Reason>(reason));
      state.counters[what + ":" + name + "_%"] =
          percent(static_cast<double>(blocks[reason]), static_cast<double>(stats.blocks_queried));
    }
  };
  reasons("missed", stats.missed_blocks);
  reasons("unwritten", stats.unwritten_blocks);
  reasons("unfetched", stats.unfetched_blocks);
  state.counters["first_token_ms"] = figures.first_token_nanos / static_cast<double>(stats.lookups) / kMillisecond;
  state.counters["written_TB"] = terabytes(stats.to_disk.bytes);
  state.counters["read_TB"] = terabytes(stats.from_disk.bytes);
  if (!admission) return;
  setup.admission = false;
  const Figures& all = results.of(setup);
  state.counters["saved_%"] =
      100 - percent(static_cast<double>(stats.to_disk.bytes), static_cast<double>(all.stats.to_disk.bytes));
  state.counters["lost_hits_%"] = 100 - percent(figures.hit_tokens(), all.hit_tokens());
}

}  // namespace

Status register_replay_drives(std::shared_ptr<const Trace> trace, const DriveReplay& options) {
  for (const auto& [host, ssd] : options.sizes) {
    if (host == 0 || ssd < kDriveCount) {
      return Error{ErrorCode::kInvalidArgument, "sizes of host memory and SSD must be at least 1 and " +
                                                    std::to_string(kDriveCount) + " blocks of 512 tokens"};
    }
  }
  const auto results = std::make_shared<Results>(std::move(trace), options.drive_gbs * 1e9);
  constexpr std::pair<const char*, index::PolicyKind> kPolicies[] = {{"adaptive", index::PolicyKind::kAdaptive},
                                                                     {"lru", index::PolicyKind::kLru}};
  for (const auto& [name, policy] : kPolicies) {
    for (const bool admission : {false, true}) {
      auto* const added = benchmark::RegisterBenchmark(
          (std::string("drives/") + name + (admission ? "/admission" : "/all_written")).c_str(),
          [=](auto& state) { bm_drives(state, *results, policy, admission); });
      added->ArgNames({"host", "ssd", "block_tokens"})->Iterations(1)->Unit(benchmark::kMillisecond);
      for (const auto& [host, ssd] : options.sizes) {
        for (const std::uint32_t block_tokens : {16U, kTraceBlockTokens}) added->Args({host, ssd, block_tokens});
      }
    }
  }
  return {};
}

}  // namespace flexkv::bench
