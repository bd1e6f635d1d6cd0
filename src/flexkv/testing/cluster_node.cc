#include "flexkv/testing/cluster_node.h"

#include <utility>

#include "flexkv/base/assert.h"

namespace flexkv::testing {
namespace {

constexpr std::size_t kChangesAtOnce = 4096;
constexpr std::uint32_t kDeviceBlocks = 1U << 20;

proto::JobId load_of(std::uint64_t id) { return id * 2; }
proto::JobId save_of(std::uint64_t id) { return id * 2 + 1; }

}  // namespace

ServedBlocks& ServedBlocks::operator+=(const ServedBlocks& other) {
  requests += other.requests;
  asked += other.asked;
  own += other.own;
  remote += other.remote;
  undelivered += other.undelivered;
  return *this;
}

// ---- the node and its engine ---------------------------------------------------------------------------------------

SimCache::SimCache(std::uint64_t blocks, std::uint64_t slot_bytes, node::RemotePort* remote) {
  node::NodeOptions options;
  options.pool_bytes = blocks * slot_bytes;
  node_ = std::make_unique<node::Node>(options, static_cast<node::Outbox&>(*this), nullptr, remote);
  engine_ = node_->attach_client({"engine", 1, "simulated", {}}).value();
  agent_ = node_->attach_agent({"engine", 0, 1, {}, slot_bytes, kDeviceBlocks, "none"}).value();
}

void SimCache::serve(std::vector<key::BlockKey> keys, Nanos now) {
  const std::uint64_t id = ++last_id_;
  const auto found = node_->lookup(engine_, id, 0, keys, now);
  Request& request = requests_[id];
  request = {static_cast<std::uint32_t>(keys.size()), found.matched_blocks, found.remote_blocks};
  ++served_.requests;
  served_.asked += keys.size();
  if (request.remote > 0) {
    proto::TransferRequest load{false, true, id, load_of(id), request.blocks, {}, 0, {}};
    load.device_blocks.resize(request.matched);
    if (node_->load(engine_, load, now) == proto::Reason::kNone) return settle(now);
    served_.undelivered += request.remote;
  }
  served_.own += request.matched - request.remote;
  save(id, now);
  settle(now);
}

void SimCache::save(std::uint64_t id, Nanos now) {
  const std::uint32_t blocks = requests_.at(id).blocks;
  proto::TransferRequest save{true, true, id, save_of(id), blocks, {}, 0, {}};
  save.device_blocks.resize(blocks);
  if (node_->save(engine_, save, now) != proto::Reason::kNone) results_.push_back({save_of(id)});
}

bool SimCache::send(node::AgentHandle, const proto::ToAgent& message) {
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

void SimCache::send(node::EngineHandle, const proto::JobResult& result) { results_.push_back(result); }

void SimCache::settle(Nanos now) {
  while (!reports_.empty() || !results_.empty()) {
    for (const proto::JobReport& report : std::exchange(reports_, {})) {
      if (copying_.erase(report.job) > 0) node_->on_report(agent_, report, now);
    }
    for (const proto::JobResult& result : std::exchange(results_, {})) job_ended(result, now);
  }
}

void SimCache::job_ended(const proto::JobResult& result, Nanos now) {
  const std::uint64_t id = result.job / 2;
  if (result.job == save_of(id)) {
    node_->close_sequence(engine_, id);
    requests_.erase(id);
    return;
  }
  const Request& request = requests_.at(id);
  const std::uint32_t own = request.matched - request.remote;
  const std::uint32_t good = std::min(result.good_blocks, request.matched);
  served_.own += std::min(good, own);
  served_.remote += good - std::min(good, own);
  served_.undelivered += request.matched - good;
  save(id, now);
}

node::Loan SimCache::take_loan() {
  FLEXKV_ASSERT(loan_.has_value());
  return *std::exchange(loan_, std::nullopt);
}

// ---- the node in its cluster ---------------------------------------------------------------------------------------

ClusterNode::ClusterNode(SimLoop& loop, SimMeta& store, const Config& config, Read read)
    : loop_(loop),
      directory_(loop, store, config.directory, config.lookups == nullptr),
      reads_(config.lookups == nullptr ? directory_.replica() : *config.lookups, config.pool,
             config.directory.incarnation,
             {[this, read = std::move(read)](const peer::ReadRequest& request) { read(*this, request); },
              // It only asks; what is on its way comes all the same.
              [](peer::RequestId) {}, [](peer::RequestId) {}}) {
  cache_ = std::make_unique<SimCache>(config.blocks, config.slot_bytes, static_cast<node::RemotePort*>(this));
  cache_->node().follow();
  settle();
}

void ClusterNode::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  space_name_ = name;
  space_ = directory_.add_space(name);
  reads_.open_space(space, space_, name, slot_bytes);
}

void ClusterNode::serve(std::vector<key::BlockKey> keys) {
  cache_->serve(std::move(keys), loop_.now());
  settle();
}

void ClusterNode::settle() {
  cache_->settle(loop_.now());
  for (bool more = true; more;) {
    changes_.clear();
    more = cache_->node().read_changes(subscription_, 0, kChangesAtOnce, changes_);
    for (const events::Change& change : changes_) {
      using Kind = cluster::Change::Kind;
      if (change.kind == events::Change::Kind::kAdded)
        directory_.apply({Kind::kAdded, change.tier, space_, change.key, change.parent});
      if (change.kind == events::Change::Kind::kRemoved) {
        directory_.apply({Kind::kRemoved, change.tier, space_, change.key});
      }
    }
  }
  directory_.pump();
}

void ClusterNode::pass_time() {
  cache_->node().on_time(loop_.now());
  settle();
}

std::vector<cluster::Tag> ClusterNode::content() {
  events::Subscription from_the_beginning;
  std::vector<events::Change> kept;
  while (cache_->node().read_changes(from_the_beginning, 0, kChangesAtOnce, kept)) {
  }
  std::vector<cluster::Tag> tags;
  for (const events::Change& change : kept) {
    if (change.kind == events::Change::Kind::kAdded) tags.push_back(cluster::tag_of(change.key));
  }
  return tags;
}

// ---- reads ---------------------------------------------------------------------------------------------------------

node::RemoteFound ClusterNode::find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                                    double block_nanos, Nanos now) {
  const Nanos begin = monotonic_now();
  const auto found = reads_.find(space, keys, first, block_nanos, now);
  lookup_times_.push_back(monotonic_now() - begin);
  return found;
}

void ClusterNode::read(node::RemoteRead read) {
  const node::RemoteOp op = read.op;
  if (reads_.read(std::move(read), loop_.now())) return;
  // The node must not be called from here.
  loop_.after(0, [this, op, alive = alive_] {
    if (!*alive) return;
    cache_->node().on_remote_end(op, node::RemoteOutcome::kMissing, loop_.now());
    settle();
  });
}

void ClusterNode::read_ended(peer::RequestId id, std::uint32_t blocks, peer::Outcome outcome) {
  const Nanos now = loop_.now();
  for (std::uint32_t i = 0; i < blocks; ++i) {
    if (const auto arrived = reads_.on_block(id, now)) cache_->node().on_remote_block(arrived->op, arrived->index, now);
  }
  if (const auto ended = reads_.on_end(id, outcome, true, now)) {
    cache_->node().on_remote_end(ended->op, ended->outcome, now);
  }
  settle();
}

node::Loan ClusterNode::lend(node::LoanId id, const peer::ReadRequest& request) {
  cache_->node().lend(id, request.space, request.slot_bytes, request.keys, request.first, request.deadline,
                      loop_.now());
  node::Loan loan = cache_->take_loan();
  settle();
  return loan;
}

void ClusterNode::end_loan(node::LoanId id) {
  cache_->node().end_loan(id, loop_.now());
  settle();
}

}  // namespace flexkv::testing
