#include "flexkv/server/cluster_bridge.h"

#include <sys/random.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/cluster/names.h"
#include "flexkv/peer/messages.h"
#include "flexkv/peer/mooncake_reads.h"
#include "flexkv/peer/nixl_reads.h"
#include "flexkv/server/damage_log.h"

namespace flexkv::server {
namespace {

constexpr std::size_t kChangesAtOnce = 4096;
constexpr std::uint8_t kHostTier = 0;  // as events number them

cluster::Incarnation random_incarnation() {
  cluster::Incarnation number = 0;
  // So few bytes after boot cannot fail or come short.
  while (number == 0) FLEXKV_ASSERT(::getrandom(&number, sizeof number, 0) == sizeof number);
  return number;
}

}  // namespace

Result<std::unique_ptr<ClusterBridge>> ClusterBridge::create(
    const ClusterOptions& options, const memory::HostRegion& pool, SourceSink& reads, Apply apply,
    std::function<void(cluster::Epoch epoch)> reset, std::function<void(std::optional<cluster::Epoch>)> current) {
  auto secret = net::Secret::from_file(options.secret_file);
  if (!secret) return secret.error();
  auto tls = net::TlsContext::create(secret.value(), options.cluster);
  if (!tls) return tls.error();
  return std::unique_ptr<ClusterBridge>(
      new ClusterBridge(options, std::move(tls).value(), secret.value().derive("block keys of " + options.cluster),
                        pool, reads, std::move(apply), std::move(reset), std::move(current)));
}

ClusterBridge::ClusterBridge(const ClusterOptions& options, net::TlsContext tls, const net::Secret::Key& key_secret,
                             const memory::HostRegion& pool, SourceSink& reads, Apply apply,
                             std::function<void(cluster::Epoch epoch)> reset,
                             std::function<void(std::optional<cluster::Epoch>)> current)
    : options_(options),
      tls_(std::move(tls)),
      key_secret_(key_secret),
      incarnation_(random_incarnation()),
      region_(pool),
      pool_(pool.data(), pool.bytes()),
      sink_(reads),
      apply_(std::move(apply)),
      reset_(std::move(reset)),
      current_(std::move(current)) {}

ClusterBridge::~ClusterBridge() { FLEXKV_ASSERT(peers_ == nullptr); }

Result<> ClusterBridge::start(const cluster::Epoch& held_epoch, bool needs_reset) {
  peer::PeerOptions peers;
  peers.node = cluster::hex(incarnation_);  // so that nobody is taken for this node before it was started anew
  peers.listen = options_.listen;
  peers.pinned_bytes_max = pool_.size();  // the node has a limit of its own, over all peers
  start_one_sided(peers.node);
  auto opened = peer::PeerLane::start(std::move(peers), tls_, *this, *this, one_sided_.get());
  if (!opened) return not_joined(opened.error());
  std::unique_ptr<peer::PeerLane> lane = std::move(opened).value();
  cluster::DirectoryLaneOptions directory;
  directory.directory.cluster = options_.cluster;
  directory.directory.name = options_.node;
  directory.directory.address = options_.told_address.empty() ? lane->address() : options_.told_address;
  directory.directory.incarnation = incarnation_;
  directory.directory.epoch = held_epoch;
  directory.directory.needs_reset = needs_reset;
  directory.directory.time_to_live = options_.time_to_live;
  directory.redis = options_.redis;
  auto started = cluster::DirectoryLane::start(
      directory, *this, [this](cluster::Epoch epoch) { enter_epoch(epoch); },
      [this](std::optional<cluster::Epoch> epoch) { know_epoch(epoch); });
  if (!started) {
    lane.reset();
    return not_joined(started.error());
  }
  // The lanes may call the node already.
  apply_([&](node::Node&) {
    peers_ = std::move(lane);
    directory_ = std::move(started).value();
    reads_.emplace(directory_->replica(), pool_, incarnation_,
                   RemoteReads::Peers{[this](peer::ReadRequest request) { peers_->read(std::move(request)); },
                                      [this](peer::RequestId id) { peers_->cancel(id); },
                                      [this](peer::RequestId id) { peers_->give_up(id); }});
  });
  return {};
}

// Nobody is to read here then.
Error ClusterBridge::not_joined(Error why) {
  if (one_sided_ != nullptr) (void)one_sided_->end();
  return why;
}

void ClusterBridge::start_one_sided(const std::string& node) {
  if (options_.nixl_library.empty() && options_.mooncake_helper.empty()) return;
  auto reads = open_one_sided(node);
  if (reads.ok()) {
    one_sided_ = std::move(reads).value();
    return;
  }
  one_sided_trouble_ = reads.error().message;
  log_warning("cluster: blocks travel over TCP: " + one_sided_trouble_);
}

Result<std::unique_ptr<peer::OneSided>> ClusterBridge::open_one_sided(const std::string& node) const {
  const auto as_one_sided = [](auto reads) -> Result<std::unique_ptr<peer::OneSided>> {
    if (!reads.ok()) return reads.error();
    return std::unique_ptr<peer::OneSided>(std::move(reads).value());
  };
  if (options_.mooncake_helper.empty()) {
    return as_one_sided(peer::NixlReads::start(options_.nixl_library, node, pool_));
  }
  const std::string host = options_.listen.substr(0, options_.listen.rfind(':'));
  return as_one_sided(peer::MooncakeReads::start(options_.mooncake_helper, host, region_));
}

void ClusterBridge::tell_drained() {
  if (directory_ != nullptr && !closing_) directory_->say(cluster::Condition::kDrained);
}

bool ClusterBridge::drain() {
  if (directory_ == nullptr || closing_) return false;
  const cluster::DirectoryStats told = directory_->status().directory;
  directory_->say(cluster::Condition::kDrains);
  return told.peers > 0 && told.blocks_told > 0;
}

void ClusterBridge::leave(Nanos patience) {
  if (directory_ != nullptr) directory_->stop(patience);
}

bool ClusterBridge::close() {
  leave(0);
  apply_([&](node::Node&) { closing_ = true; });
  peers_.reset();
  const bool quiet = one_sided_ == nullptr || one_sided_->end();
  apply_([&](node::Node& node) {
    for (const auto& [id, lending] : std::exchange(lending_, {})) node.end_loan(id, monotonic_now());
  });
  return quiet;
}

ClusterBridge::Status ClusterBridge::status() const {
  Status status;
  status.cluster = options_.cluster;
  status.node = options_.node;
  if (!reads_ || closing_) return status;
  status.address = peers_->address();
  if (one_sided_ != nullptr && one_sided_->window() != nullptr) status.one_sided = one_sided_->transport();
  status.one_sided_trouble = one_sided_ != nullptr ? one_sided_->trouble() : one_sided_trouble_;
  status.directory = directory_->status();
  const Nanos now = monotonic_now();
  for (const auto& info : status.directory.peers) {
    status.nodes.push_back({info, directory_->replica().blocks(info.node), reads_->flow(info.node, now)});
  }
  status.peers = peers_->stats();
  status.reading = reads_->reading();
  status.given_up = reads_->given_up();
  status.lending = lending_.size();
  return status;
}

void ClusterBridge::reset(node::ResetId reset) {
  if (!reads_ || closing_) return;
  resetting_ = true;
  directory_->reset_cluster(reset);
}

void ClusterBridge::enter_epoch(cluster::Epoch epoch) {
  apply_([this, epoch](node::Node& node) {
    node.reset_here(monotonic_now());
    resetting_ = false;
    reset_(epoch);
  });
}

void ClusterBridge::know_epoch(std::optional<cluster::Epoch> epoch) {
  apply_([&](node::Node&) {
    if (closing_) return;
    // The node has been reset, and the directory is yet to hear of it.
    if (directory_ != nullptr && directory_->reset_ordered()) epoch.reset();
    current_(epoch);
  });
}

void ClusterBridge::know_resets(const key::Root& marks) {
  std::uint64_t number = 0;
  std::memcpy(&number, marks.data(), sizeof number);
  if (directory_ != nullptr && !closing_) directory_->know_resets(std::max(number, std::uint64_t{1}));
}

// ---- this node's reads ---------------------------------------------------------------------------------------------

void ClusterBridge::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  if (!reads_ || slot_bytes > peer::kSlotBytesMax) return;
  auto known = indexes_.find(name);
  if (known == indexes_.end()) {
    const auto index = directory_->add_space(name);
    if (!index) {
      log_warning("cluster: blocks of more than " + std::to_string(cluster::kSpacesMax) +
                  " kinds (models and their layouts): those of the last one are not shared with other nodes");
      return;
    }
    known = indexes_.emplace(name, *index).first;
  }
  told_[space] = {known->second};
  reads_->open_space(space, known->second, name, slot_bytes);
}

void ClusterBridge::close_space(node::SpaceNumber space) {
  const auto told = told_.find(space);
  if (told == told_.end()) return;
  told->second.open = false;
  reads_->close_space(space);
}

node::RemoteFound ClusterBridge::find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                                      double block_nanos, Nanos now) {
  if (!reads_ || closing_ || resetting_ || !directory_->knows_resets()) return {};
  return reads_->find(space, keys, first, block_nanos, now);
}

void ClusterBridge::read(node::RemoteRead read) {
  if (closing_) return;
  const node::RemoteOp op = read.op;
  if (reads_ && directory_->knows_resets() && reads_->read(std::move(read), monotonic_now())) return;
  // The node must not be called from here.
  peers_->post([this, op] {
    apply_([&](node::Node& node) { sink_.on_end(node, op, node::RemoteOutcome::kMissing, monotonic_now()); });
  });
}

void ClusterBridge::cancel(node::RemoteOp op) {
  if (reads_ && !closing_) reads_->cancel(op);
}

std::optional<Nanos> ClusterBridge::next_time() const {
  return reads_ && !closing_ ? reads_->next_time() : std::nullopt;
}

void ClusterBridge::on_time(Nanos now) {
  if (reads_ && !closing_) reads_->on_time(now);
}

void ClusterBridge::on_block(peer::RequestId id, std::uint32_t) {
  apply_([&](node::Node& node) {
    const Nanos now = monotonic_now();
    if (const auto arrived = reads_->on_block(id, now)) sink_.on_block(node, arrived->op, arrived->index, now);
  });
}

void ClusterBridge::on_end(peer::RequestId id, peer::Outcome outcome) {
  apply_([&](node::Node& node) {
    const Nanos now = monotonic_now();
    if (const auto ended = reads_->on_end(id, outcome, !closing_, now)) {
      sink_.on_end(node, ended->op, ended->outcome, now);
    }
  });
}

// ---- reads of others -----------------------------------------------------------------------------------------------

void ClusterBridge::pin(const peer::SpaceName& space, std::uint64_t slot_bytes, std::span<const key::BlockKey> keys,
                        std::uint32_t first, Nanos deadline, std::function<void(peer::Pinned)> done) {
  apply_([&](node::Node& node) {
    if (!reads_ || closing_) return done({0, {}, peer::Outcome::kBusy});  // it has not begun, or ends
    const node::LoanId id = ++last_loan_;
    lending_[id] = {std::move(done), slot_bytes};
    node.lend(id, space, slot_bytes, keys, first, deadline, monotonic_now());
  });
}

void ClusterBridge::lent(const node::Loan& loan) {
  if (closing_) return;  // and ends there
  Lending& lending = lending_.at(loan.id);
  peer::Pinned pinned;
  pinned.pin = loan.id;
  pinned.outcome = to_peer(loan.limit);
  pinned.sums = loan.sums;
  for (const std::uint64_t offset : loan.host_offsets) {
    pinned.blocks.push_back(std::as_bytes(pool_.subspan(offset, lending.slot_bytes)));
  }
  // No blocks are no pin for the peers, but a loan for the node, which must not be called from here.
  if (pinned.blocks.empty()) peers_->post([this, id = loan.id] { unpin(id); });
  std::exchange(lending.answer, nullptr)(std::move(pinned));
}

void ClusterBridge::on_damaged(std::uint64_t pin, std::uint32_t block) {
  log_damaged_block("lent to another node");
  apply_([&](node::Node& node) { node.on_loan_damaged(pin, block, monotonic_now()); });
}

void ClusterBridge::unpin(std::uint64_t pin) {
  apply_([&](node::Node& node) {
    if (lending_.erase(pin) > 0) node.end_loan(pin, monotonic_now());
  });
}

// ---- what the others are told --------------------------------------------------------------------------------------

void ClusterBridge::changed() {
  if (directory_ != nullptr) directory_->wake();
}

bool ClusterBridge::read(std::vector<cluster::Change>& out) {
  bool more = false;
  apply_([&](node::Node& node) {
    changes_.clear();
    node.follow();
    more = node.read_changes(subscription_, 0, kChangesAtOnce, changes_);
    if (!more) node.want_changes();
    for (const events::Change& change : changes_) tell(change, out);
  });
  return more;
}

void ClusterBridge::tell(const events::Change& change, std::vector<cluster::Change>& out) {
  using Kind = cluster::Change::Kind;
  if (change.kind == events::Change::Kind::kRestart) {
    for (const auto& [name, index] : indexes_) out.push_back({Kind::kRestart, 0, index, {}});
    return;
  }
  const auto told = told_.find(change.space);
  if (told == told_.end()) return;
  const cluster::SpaceIndex index = told->second.index;
  const bool shared = change.tier == kHostTier ? options_.share_host : options_.share_drives;
  switch (change.kind) {
    case events::Change::Kind::kAdded:
      if (shared) out.push_back({Kind::kAdded, change.tier, index, change.key, change.parent});
      return;
    case events::Change::Kind::kRemoved:
      if (shared) out.push_back({Kind::kRemoved, change.tier, index, change.key});
      return;
    case events::Change::Kind::kCleared:
      out.push_back({Kind::kCleared, 0, index, {}});
      if (!told->second.open) told_.erase(told);
      return;
    case events::Change::Kind::kRestart:
    case events::Change::Kind::kCurrent:
      return;
  }
}

}  // namespace flexkv::server
