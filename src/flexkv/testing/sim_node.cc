#include "flexkv/testing/sim_node.h"

#include <algorithm>
#include <limits>

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kPage = node::kExtentAlignment;
constexpr Nanos kNever = std::numeric_limits<Nanos>::max();

}  // namespace

SimNode::SimNode(SimLoop& loop, const SimPlan& plan, SimStore& store, SimElsewhere& elsewhere, std::uint64_t epoch)
    : loop_(loop),
      plan_(plan),
      pool_(std::make_shared<Bytes>(plan.node.pool_bytes)),
      timer_(kNever),
      disk_(plan.drives == 0 ? nullptr : std::make_unique<SimDisk>(loop, plan, store, disk_callbacks())),
      remote_(plan.remote ? std::make_unique<SimRemote>(loop, plan, elsewhere, remote_callbacks()) : nullptr),
      node_(plan.node, *this, disk_.get(), remote_.get(), plan.stores ? remote_.get() : nullptr) {
  // What lies on drives, or with others, is found again with the same secret only.
  const bool lasting = disk_ != nullptr || remote_ != nullptr;
  for (auto& byte : key_secret_) byte = static_cast<std::uint8_t>(Prng::mix(lasting ? 1 : epoch));
  for (auto& byte : *pool_) byte = static_cast<std::byte>(epoch * 37 + 11);  // garbage
}

SimNode::~SimNode() {
  *alive_ = false;
  const auto die = [&](auto& link, auto& pipe_out, auto& pipe_in) {
    pipe_in->close();
    pipe_out->close();
    loop_.after(loop_.delay(plan_.message_delay), [link] { link->lost(); });
  };
  for (auto& [handle, link] : agents_) die(link, link->to_agent, link->to_node);
  for (auto& [handle, link] : clients_) die(link, link->to_client, link->to_node);
}

std::shared_ptr<AgentLink> SimNode::attach_agent(const proto::AgentHello& hello) {
  const auto attached = node_.attach_agent(hello);
  loop_.note("node: attach agent", hello.rank, attached.ok() ? attached.value() : 0);
  if (!attached.ok()) return nullptr;
  auto link = std::make_shared<AgentLink>();
  link->handle = attached.value();
  link->to_agent = std::make_shared<SimPipe>(loop_, plan_.message_delay, nullptr);
  link->to_node = std::make_shared<SimPipe>(loop_, plan_.message_delay, paused_until_);
  link->pool = pool_;
  link->shard_bytes = hello.shard_bytes;
  agents_.emplace(link->handle, link);
  all_links_.push_back(link);
  after_call();
  return link;
}

std::shared_ptr<ClientLink> SimNode::attach_client(const proto::ClientHello& hello) {
  const auto attached = node_.attach_client(hello);
  loop_.note("node: attach client", attached.ok() ? attached.value() : 0);
  if (!attached.ok()) return nullptr;
  auto link = std::make_shared<ClientLink>();
  link->handle = attached.value();
  link->to_node = std::make_shared<SimPipe>(loop_, plan_.message_delay, paused_until_);
  link->to_client = std::make_shared<SimPipe>(loop_, plan_.message_delay, nullptr);
  clients_.emplace(link->handle, link);
  after_call();
  return link;
}

void SimNode::drop(const std::shared_ptr<AgentLink>& link) {
  if (agents_.erase(link->handle) == 0) return;
  loop_.note("node: detach agent", link->handle);
  // What the node sent after the rank had closed its end never arrived.
  for (const auto& [job, live] : link->live) SIM_CHECK(!live.delivered);
  link->live.clear();
  link->to_agent->close();
  link->to_node->close();
  node_.detach_agent(link->handle, loop_.now());
  after_call();
}

void SimNode::drop(const std::shared_ptr<ClientLink>& link) {
  if (clients_.erase(link->handle) == 0) return;
  loop_.note("node: detach client", link->handle);
  link->to_client->close();
  link->to_node->close();
  node_.detach_client(link->handle);
  after_call();
}

proto::LookupReply SimNode::lookup(node::EngineHandle engine, const proto::LookupRequest& request) {
  const auto found = node_.lookup(engine, request, loop_.now());
  loop_.note("node: lookup", engine, request.sequence, found.matched_blocks, static_cast<std::uint64_t>(found.reason));
  after_call();
  return {request.request, found.matched_blocks, found.reason, found.disk_blocks, found.host_blocks};
}

proto::Reason SimNode::apply(node::EngineHandle engine, const proto::FromClient& message) {
  auto reason = proto::Reason::kNone;
  if (const auto* lookup_request = std::get_if<proto::LookupRequest>(&message)) {
    (void)lookup(engine, *lookup_request);
  } else if (const auto* transfer = std::get_if<proto::TransferRequest>(&message)) {
    reason = transfer->save ? node_.save(engine, *transfer, loop_.now()) : node_.load(engine, *transfer, loop_.now());
    loop_.note(transfer->save ? "node: save" : "node: load", engine, transfer->job, transfer->device_blocks.size(),
               static_cast<std::uint64_t>(reason));
  } else if (const auto* wanted = std::get_if<proto::PrefetchRequest>(&message)) {
    reason = node_.prefetch(engine, *wanted, loop_.now());
    loop_.note("node: prefetch", engine, wanted->sequence, static_cast<std::uint64_t>(reason));
  } else if (const auto* speed = std::get_if<proto::PrefillSpeed>(&message)) {
    node_.set_prefill(engine, speed->time);
  } else if (const auto* closed = std::get_if<proto::CloseSequence>(&message)) {
    node_.close_sequence(engine, closed->sequence);
  } else if (const auto* cancel = std::get_if<proto::CancelRequest>(&message)) {
    loop_.note("node: cancel", engine, cancel->job);
    node_.cancel(engine, cancel->job);
  } else if (const auto* commit = std::get_if<proto::CommitRequest>(&message)) {
    loop_.note("node: commit", engine, commit->job);
    node_.commit(engine, commit->job, loop_.now());
  } else {
    loop_.note("node: reset", engine);
    node_.reset(engine, loop_.now());
  }
  after_call();
  return reason;
}

void SimNode::report(node::AgentHandle agent, const proto::JobReport& report) {
  // As NodeServer::hear_client_of().
  if (const auto client = clients_.find(node_.engine_of(agent)); client != clients_.end()) {
    const std::shared_ptr<ClientLink> link = client->second;
    link->to_node->flush();
    if (link->hung_up) drop(link);
  }
  loop_.note("node: report", agent, report.job, static_cast<std::uint64_t>(report.status));
  node_.on_report(agent, report, loop_.now());
  after_call();
}

void SimNode::scrub(std::uint64_t bytes_per_second) {
  loop_.note("node: scrub", bytes_per_second);
  if (bytes_per_second > 0) {
    node_.begin_scrub(bytes_per_second, loop_.now());
  } else {
    node_.stop_scrub(loop_.now());
  }
  after_call();
}

void SimNode::drain(Nanos until) {
  loop_.note("node: drains");
  node_.drain(loop_.now(), until);
  node_.stop_lending();
  after_call();
}

void SimNode::after_call() {
  node_.check_invariants();
  const Nanos deadline = node_.next_deadline().value_or(kNever);
  if (deadline >= timer_) return;
  timer_ = deadline;
  loop_.at(deadline + loop_.delay(kMillisecond), [this, alive = alive_] {
    if (!*alive) return;
    if (paused()) {
      timer_ = kNever;
      loop_.at(*paused_until_, [this, alive] {
        if (*alive) after_call();
      });
      return;
    }
    timer_ = kNever;
    node_.on_time(loop_.now());
    after_call();
  });
}

bool SimNode::send(node::AgentHandle agent, const proto::ToAgent& message) {
  const auto found = agents_.find(agent);
  if (found == agents_.end()) return false;
  if (loop_.chance(plan_.ring_full)) {
    loop_.note("node: ring full", agent);
    return false;
  }
  const std::shared_ptr<AgentLink>& link = found->second;
  if (const auto* command = std::get_if<proto::CopyCommand>(&message)) check_and_claim(*link, *command);
  link->to_agent->send([link, message] { link->deliver(message); });
  return true;
}

void SimNode::send(node::EngineHandle engine, const proto::JobResult& result) {
  loop_.note("node: result", engine, result.job, static_cast<std::uint64_t>(result.status),
             static_cast<std::uint64_t>(result.reason));
  const auto found = clients_.find(engine);
  if (found == clients_.end() || loop_.chance(plan_.ring_full)) return;
  const std::shared_ptr<ClientLink>& link = found->second;
  link->to_client->send([link, result] { link->deliver(result); });
}

SimDisk::Callbacks SimNode::disk_callbacks() {
  SimDisk::Callbacks callbacks;
  callbacks.recovered = [this](node::SpaceNumber space, std::span<const node::RecoveredChain> chains) {
    node_.on_disk_recovered(space, chains, loop_.now());
    after_call();
  };
  callbacks.opened = [this](node::SpaceNumber space, std::span<const std::uint32_t> slots) {
    node_.on_disk_opened(space, slots, loop_.now());
    after_call();
  };
  callbacks.done = [this](const node::DiskResult& result) {
    node_.on_disk_done({&result, 1}, loop_.now());
    after_call();
  };
  callbacks.overdue = [this](node::DiskOp op) {
    node_.on_disk_overdue(op, loop_.now());
    after_call();
  };
  callbacks.ready = [this] {
    node_.on_disk_ready(loop_.now());
    after_call();
  };
  callbacks.pool = [this](std::uint64_t offset, std::uint64_t bytes) {
    SIM_CHECK(offset + bytes <= pool_->size());
    return std::span(*pool_).subspan(offset, bytes);
  };
  callbacks.claim = [this](node::DiskOp op, bool writes_host, std::uint64_t offset, std::uint64_t bytes) {
    disk_live_.emplace(op, claimed(writes_host, offset, bytes));
  };
  callbacks.release = [this](node::DiskOp op) { SIM_CHECK(disk_live_.erase(op) == 1); };
  return callbacks;
}

AgentLink::Live SimNode::claimed(bool writes_host, std::uint64_t offset, std::uint64_t bytes) {
  AgentLink::Live live{true, writes_host, {}};
  for (std::uint64_t at = 0; at < bytes; at += kPage) live.pages.push_back((offset + at) / kPage);
  check_free(live);
  return live;
}

SimRemote::Callbacks SimNode::remote_callbacks() {
  SimRemote::Callbacks callbacks;
  callbacks.block = [this](node::RemoteOp op, std::uint32_t index) {
    node_.on_remote_block(op, index, loop_.now());
    after_call();
  };
  callbacks.end = [this](node::RemoteOp op, node::RemoteOutcome outcome) {
    node_.on_remote_end(op, outcome, loop_.now());
    after_call();
  };
  callbacks.lend = [this](node::LoanId id, const node::SpaceName& space, std::uint64_t slot_bytes,
                          std::span<const key::BlockKey> keys, std::uint32_t first, Nanos deadline) {
    node_.lend(id, space, slot_bytes, keys, first, deadline, loop_.now());
    after_call();
  };
  callbacks.damaged = [this](node::LoanId id, std::uint32_t index) {
    node_.on_loan_damaged(id, index, loop_.now());
    after_call();
  };
  callbacks.end_loan = [this](node::LoanId id) {
    node_.end_loan(id, loop_.now());
    after_call();
  };
  callbacks.store_damaged = [this](node::RemoteOp op, std::uint32_t index) {
    node_.on_store_damaged(op, index, loop_.now());
    after_call();
  };
  callbacks.written = [this](node::RemoteOp op, node::RemoteOutcome outcome) {
    node_.on_store_written(op, outcome, loop_.now());
    after_call();
  };
  callbacks.pool = [this](std::uint64_t offset, std::uint64_t bytes) {
    SIM_CHECK(offset + bytes <= pool_->size());
    return std::span(*pool_).subspan(offset, bytes);
  };
  callbacks.claim = [this](bool writes_host, std::uint64_t offset, std::uint64_t bytes) {
    remote_live_.emplace(next_claim_, claimed(writes_host, offset, bytes));
    return next_claim_++;
  };
  callbacks.release = [this](std::uint64_t claim) { SIM_CHECK(remote_live_.erase(claim) == 1); };
  return callbacks;
}

void SimNode::check_and_claim(AgentLink& link, const proto::CopyCommand& command) {
  AgentLink::Live live;
  live.writes_host = command.direction == device::Direction::kToHost;
  for (const auto& block : command.blocks()) {
    SIM_CHECK(block.host_offset + link.shard_bytes <= pool_->size());
    for (std::uint64_t at = 0; at < link.shard_bytes; at += kPage)
      live.pages.push_back(block.host_offset / kPage + at / kPage);
  }
  check_free(live);
  const auto known = link.live.find(command.job);
  if (command.piece == 0) {
    SIM_CHECK(link.live.emplace(command.job, std::move(live)).second);
  } else if (known != link.live.end()) {  // else the rank has ended the job: it will not touch this piece
    known->second.pages.insert(known->second.pages.end(), live.pages.begin(), live.pages.end());
  }
}

// NEVER two writers of one page, nor a writer beside readers, over all drives and all ranks that ever attached and may
// still copy.
void SimNode::check_free(const AgentLink::Live& live) {
  const auto check = [&](const AgentLink::Live& claimed, std::uint64_t who, std::uint64_t what) {
    if (!live.writes_host && !claimed.writes_host) return;
    for (const std::uint64_t page : claimed.pages) {
      const bool shared = std::find(live.pages.begin(), live.pages.end(), page) != live.pages.end();
      if (shared) loop_.note("PAGE IN USE", page, who, what);
      SIM_CHECK(!shared);
    }
  };
  std::erase_if(all_links_, [&](const auto& other) { return other->live.empty() && !agents_.contains(other->handle); });
  for (const auto& other : all_links_) {
    for (const auto& [job, claimed] : other->live) check(claimed, other->handle, job);
  }
  for (const auto& [op, claimed] : disk_live_) check(claimed, 0, op);
  for (const auto& [id, claimed] : remote_live_) check(claimed, 0, id);
}

}  // namespace flexkv::testing
