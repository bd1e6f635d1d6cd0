#include "flexkv/server/remote_bridge.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/key/namespace.h"
#include "flexkv/server/damage_log.h"

namespace flexkv::server {
namespace {

node::RemoteOutcome to_node(remote::Outcome outcome) {
  switch (outcome) {
    case remote::Outcome::kDone:
      return node::RemoteOutcome::kDone;
    case remote::Outcome::kMissing:
      return node::RemoteOutcome::kMissing;
    case remote::Outcome::kDamaged:
      return node::RemoteOutcome::kChecksum;
    case remote::Outcome::kCanceled:
      return node::RemoteOutcome::kCanceled;
    case remote::Outcome::kDeadline:
      return node::RemoteOutcome::kDeadline;
    case remote::Outcome::kUnavailable:
      return node::RemoteOutcome::kStoreOff;
    case remote::Outcome::kBusy:
    case remote::Outcome::kFailed:
      break;
  }
  return node::RemoteOutcome::kStoreFailed;
}

// For names, not for secrecy.
key::NamespaceBuilder hash() { return key::NamespaceBuilder(std::array<std::uint8_t, 32>{}); }

Result<net::Secret> secret_of(const RemoteOptions& options) {
  if (!options.secret_file.empty()) return net::Secret::from_file(options.secret_file);
  // Keys have to be alike at all nodes. Who may read the store sees the blocks themselves, so these need no guard.
  return net::Secret::from_text("FlexKV: blocks in a store that everybody who has them may read");
}

// The same at all nodes that know the numbers.
remote::Mark mark_of(const std::string& cluster, std::span<const std::uint64_t> numbers) {
  key::NamespaceBuilder name = hash();
  const key::Root digest =
      name.add(key::Field::kUserNamespace, cluster).add(key::Field::kWeightEpoch, std::as_bytes(numbers)).finish();
  remote::Mark mark{};
  std::copy_n(digest.begin(), mark.size(), mark.begin());
  return mark;
}

// Of a reset, which nodes hear of by the cluster or by the mark itself.
remote::Mark mark_of(const std::string& cluster, std::uint64_t reset) { return mark_of(cluster, std::span(&reset, 1)); }

// With its number: the id of an epoch may come back to Redis, by a request that was repeated late (0033).
remote::Mark mark_of(const std::string& cluster, const cluster::Epoch& epoch) {
  return mark_of(cluster, std::array<std::uint64_t, 2>{epoch.number, epoch.reset});
}

}  // namespace

Result<std::unique_ptr<RemoteBridge>> RemoteBridge::create(const RemoteOptions& options, std::span<std::byte> pool,
                                                           SourceSink& reads, Apply apply, Forgotten forgotten) {
  auto store = remote::open_store(options.url, options.s3, options.mooncake);
  if (!store.ok()) return store.error();
  auto secret = secret_of(options);
  if (!secret) return secret.error();
  return std::unique_ptr<RemoteBridge>(new RemoteBridge(options, std::move(store).value(),
                                                        secret.value().derive("block keys of " + options.cluster), pool,
                                                        reads, std::move(apply), std::move(forgotten)));
}

RemoteBridge::RemoteBridge(const RemoteOptions& options, std::unique_ptr<remote::Store> store,
                           const net::Secret::Key& key_secret, std::span<std::byte> pool, SourceSink& reads,
                           Apply apply, Forgotten forgotten)
    : options_(options),
      key_secret_(key_secret),
      pool_(pool),
      reads_(reads),
      apply_(std::move(apply)),
      forgotten_(std::move(forgotten)),
      store_(std::move(store)),
      keeps_marks_(store_->keeps()),
      source_(options.tier.engine.object_bytes) {}

RemoteBridge::~RemoteBridge() { FLEXKV_ASSERT(tier_ == nullptr); }

void RemoteBridge::start(const std::optional<key::Root>& held_marks) {
  remote::RemoteSink& sink = *this;
  apply_([&](node::Node&) {
    held_marks_ = held_marks;
    tier_ = std::make_unique<remote::RemoteTier>(options_.tier, std::move(store_), sink);
    if (keeps_marks_) {
      tier_->watch_marks();
    } else {
      unlisted_ = true;
    }
  });
}

void RemoteBridge::close() {
  apply_([&](node::Node&) { closing_ = true; });
  tier_.reset();
}

RemoteBridge::Status RemoteBridge::status() const {
  Status status;
  status.url = options_.url;
  if (closing_ || tier_ == nullptr) return status;
  status.tier = tier_->stats();
  if (!keeps_marks_ && !listed_) {
    status.tier.trouble = "nothing is read or written until Redis has told of the cluster's latest reset";
  }
  status.waiting_bytes = source_.waiting_bytes();
  status.bytes_per_second = source_.bytes_per_second();
  status.resting = source_.resting(monotonic_now());
  status.given_up = given_up_;
  status.reading = readings_.size();
  status.writing = writings_.size();
  status.read_latency = read_latency_;
  return status;
}

// ---- spaces and epochs ---------------------------------------------------------------------------------------------

void RemoteBridge::open_space(node::SpaceNumber number, const node::SpaceName& name, std::uint64_t slot_bytes) {
  Space& space = spaces_[number];
  space.name = name;
  space.slot_bytes = slot_bytes;
  if (serves()) open(space);
}

void RemoteBridge::close_space(node::SpaceNumber number) {
  const auto space = spaces_.extract(number);
  if (!space.empty() && serves()) tier_->close_space(space.mapped().there);
}

void RemoteBridge::open(Space& space) {
  if (space.slot_bytes > remote::kSlotBytesMax) return;
  // Of several clusters that share a store that keeps no marks, each has spaces of its own, as it has resets.
  key::NamespaceBuilder name = keeps_marks_ ? hash() : key::NamespaceBuilder(key_secret_);
  name.add(key::Field::kModel, std::as_bytes(std::span(space.name)));
  for (const remote::Mark& mark : marks_) name.add(key::Field::kWeightEpoch, std::as_bytes(std::span(mark)));
  space.there = name.finish();
  tier_->open_space(space.there, space.slot_bytes);
}

void RemoteBridge::reopen() {
  for (auto& [number, space] : spaces_) {
    tier_->close_space(space.there);
    open(space);
  }
}

void RemoteBridge::add_mark(const remote::Mark& mark) {
  drop_early();
  if (!marks_.insert(mark).second) return;
  tier_->put_mark(mark);
  if (!listed_) return;
  reopen();
  forgotten_(marks_);
}

// Of before a reset.
void RemoteBridge::drop_early() {
  for (const node::StoreWrite& write : std::exchange(early_, {})) {
    end_write(write.op, node::RemoteOutcome::kCanceled);
  }
}

// The node must not be called from where this is.
void RemoteBridge::end_write(node::RemoteOp op, node::RemoteOutcome outcome) {
  tier_->post(
      [this, op, outcome] { apply_([&](node::Node& node) { node.on_store_written(op, outcome, monotonic_now()); }); });
}

void RemoteBridge::reset(node::ResetId reset) {
  if (closing_ || tier_ == nullptr) return;
  if (keeps_marks_) {
    add_mark(mark_of(options_.cluster, reset));
  } else {
    leave_epoch();
  }
}

void RemoteBridge::enter_epoch(const cluster::Epoch& epoch) {
  if (closing_ || tier_ == nullptr || !keeps_marks_) return;
  add_mark(mark_of(options_.cluster, epoch.reset != 0 ? epoch.reset : epoch.number));
}

void RemoteBridge::know_epoch(const std::optional<cluster::Epoch>& epoch) {
  if (closing_ || tier_ == nullptr || keeps_marks_) return;
  leave_epoch();
  if (!epoch) return;
  marks_ = {mark_of(options_.cluster, *epoch)};
  listed_ = true;
  for (auto& [number, space] : spaces_) open(space);
}

// Reads and writes of it that are under way may end: they are of its spaces.
void RemoteBridge::leave_epoch() {
  if (!std::exchange(listed_, false)) return;
  for (const auto& [number, space] : spaces_) tier_->close_space(space.there);
}

void RemoteBridge::on_marks(const std::set<remote::Mark>& marks) {
  apply_([&](node::Node& node) {
    if (closing_) return;
    const bool first = !std::exchange(listed_, true);
    const std::size_t before = marks_.size();
    marks_.insert(marks.begin(), marks.end());
    const bool more = marks_.size() > before;
    // Of the first ones, drives may know already; without drives, what was kept before they came late may be older.
    const bool news = held_marks_ ? *held_marks_ != hash_of_marks(marks) : more && unlisted_;
    if (first ? news : more) {
      log_info("remote tier: another node has reset it; this one forgets its blocks, too");
      node.reset_here(monotonic_now());
      drop_early();
    }
    if (more || first) {
      reopen();
      forgotten_(marks_);
    }
    for (node::StoreWrite& early : std::exchange(early_, {})) write(std::move(early));
  });
}

void RemoteBridge::on_no_marks() {
  apply_([&](node::Node& node) {
    unlisted_ = true;
    for (const node::StoreWrite& early : std::exchange(early_, {})) {
      node.on_store_written(early.op, node::RemoteOutcome::kStoreOff, monotonic_now());
    }
  });
}

// ---- reads ---------------------------------------------------------------------------------------------------------

node::RemoteFound RemoteBridge::find(node::SpaceNumber number, std::span<const key::BlockKey> keys, std::uint32_t first,
                                     double /*block_nanos*/, Nanos now) {
  const auto space = spaces_.find(number);
  if (!serves() || source_.resting(now) || space == spaces_.end() || first >= keys.size()) return {};
  keys = keys.subspan(first);
  keys = keys.first(std::min(keys.size(), remote::kKeysMax));
  node::RemoteFound found;
  found.blocks = static_cast<std::uint32_t>(tier_->contains(space->second.there, keys));
  const plan::TransferTime time = source_.time(Tier::kMemory, costs_, now);
  if (time.known()) {
    found.bytes_per_second = kSecond / time.per_byte;
    found.wait = static_cast<Nanos>(time.estimate(static_cast<double>(source_.waiting_bytes())));
  }
  return found;
}

void RemoteBridge::read(node::RemoteRead read) {
  if (closing_ || tier_ == nullptr) return;
  const node::RemoteOp op = read.op;
  // The node must not be called from here.
  const auto refuse = [&](node::RemoteOutcome outcome) {
    tier_->post(
        [this, op, outcome] { apply_([&](node::Node& node) { reads_.on_end(node, op, outcome, monotonic_now()); }); });
  };
  const auto space = spaces_.find(read.space);
  if (!serves() || space == spaces_.end()) return refuse(node::RemoteOutcome::kMissing);
  remote::ReadRequest request;
  request.id = next_request_++;
  request.space = space->second.there;
  request.slot_bytes = space->second.slot_bytes;
  const auto keys = std::span(read.keys).subspan(read.first);
  const std::size_t count = std::min(keys.size(), remote::kKeysMax);
  request.keys.assign(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(count));
  for (std::size_t i = 0; i < count; ++i) {
    request.buffers.push_back(pool_.subspan(read.host_offsets[i], request.slot_bytes));
  }
  request.deadline = read.deadline;
  const Nanos now = monotonic_now();
  const remote::RequestId id = request.id;
  const std::uint64_t slot_bytes = request.slot_bytes;
  if (!tier_->read(std::move(request))) return refuse(node::RemoteOutcome::kBusy);
  Reading& reading = readings_[id];
  reading = {op, source_.begin(Tier::kMemory, slot_bytes, static_cast<std::uint32_t>(count), now), read.deadline};
  requests_.emplace(op, id);
  watch(id, reading, now);
}

// When nothing more comes of it, unless its time is over first.
void RemoteBridge::watch(remote::RequestId id, const Reading& reading, Nanos now) {
  const Nanos at = source_.stops_at(reading.there, costs_, now);
  if (at < reading.deadline) watch_.watch(id, at);
}

void RemoteBridge::on_time(Nanos now) {
  if (closing_) return;
  for (const remote::RequestId id : watch_.take_due(now)) {
    Reading& reading = readings_.at(id);
    if (now < source_.stops_at(reading.there, costs_, now)) {
      watch(id, reading, now);
      continue;
    }
    source_.stopped(reading.there, now);
    ++given_up_;
    tier_->give_up(id);
  }
}

void RemoteBridge::cancel(node::RemoteOp op) {
  const auto found = requests_.find(op);
  if (found != requests_.end() && !closing_) tier_->cancel(found->second);
}

void RemoteBridge::on_block(remote::RequestId id, std::uint32_t index) {
  apply_([&](node::Node& node) {
    const Nanos now = monotonic_now();
    Reading& reading = readings_.at(id);
    source_.came(reading.there, now);
    read_latency_.record(now - reading.there.begun);
    reads_.on_block(node, reading.op, index, now);
  });
}

void RemoteBridge::on_end(remote::RequestId id, remote::Outcome outcome) {
  apply_([&](node::Node& node) {
    const Nanos now = monotonic_now();
    const Reading reading = readings_.extract(id).mapped();
    requests_.erase(reading.op);
    watch_.forget(id);
    using End = ReadSource::End;
    const bool cut = outcome == remote::Outcome::kCanceled || outcome == remote::Outcome::kDeadline;
    const End how = reading.there.given_up ? End::kFailed : cut ? End::kCut : End::kAnswered;
    source_.end(reading.there, how, costs_, now);
    reads_.on_end(node, reading.op, to_node(outcome), now);
  });
}

// ---- writes --------------------------------------------------------------------------------------------------------

std::uint32_t RemoteBridge::write_blocks(node::SpaceNumber number) const {
  const auto space = spaces_.find(number);
  if (closing_ || tier_ == nullptr || (unlisted_ && !listed_) || space == spaces_.end()) return 0;
  if (!tier_->takes_writes() || space->second.slot_bytes > remote::kSlotBytesMax) return 0;
  return static_cast<std::uint32_t>(
      std::min(tier_->object_blocks(space->second.slot_bytes), std::uint64_t{remote::kKeysMax}));
}

bool RemoteBridge::has(node::SpaceNumber number, const key::BlockKey& key) const {
  const auto space = spaces_.find(number);
  return serves() && space != spaces_.end() && tier_->contains(space->second.there, {&key, 1}) == 1;
}

void RemoteBridge::write(node::StoreWrite write) {
  if (!listed_) {
    if (!keeps_marks_) return end_write(write.op, node::RemoteOutcome::kStoreOff);
    early_.push_back(std::move(write));
    return;
  }
  // The space as it is called now: a reset may come before the lane looks at the blocks.
  const remote::SpaceName there = spaces_.at(write.space).there;
  const bool summed = std::ranges::any_of(write.sums, [](const auto& sums) { return !sums.empty(); });
  if (!summed) return begin_write(write, there);
  tier_->post([this, write = std::move(write), there] { check_and_write(write, there); });
}

// On the lane. The blocks do not change or go meanwhile.
void RemoteBridge::check_and_write(const node::StoreWrite& write, const remote::SpaceName& there) {
  std::uint64_t slot_bytes = 0;
  apply_([&](node::Node&) { slot_bytes = spaces_.at(write.space).slot_bytes; });
  std::uint32_t right = 0;
  while (right < write.sums.size() &&
         holds_sums(pool_.subspan(write.host_offsets[right], slot_bytes), write.sums[right])) {
    ++right;
  }
  const bool damaged = right < write.sums.size();
  if (damaged) log_damaged_block("written to the remote tier");
  apply_([&](node::Node& node) {
    const Nanos now = monotonic_now();
    if (damaged) node.on_store_damaged(write.op, right, now);
    if (damaged || closing_) {
      node.on_store_written(write.op, damaged ? node::RemoteOutcome::kDamaged : node::RemoteOutcome::kCanceled, now);
    } else {
      begin_write(write, there);
    }
  });
}

void RemoteBridge::begin_write(const node::StoreWrite& write, const remote::SpaceName& there) {
  const Space& space = spaces_.at(write.space);
  remote::WriteRequest request;
  request.id = next_request_++;
  request.space = there;
  request.slot_bytes = space.slot_bytes;
  key::BlockKey parent = write.parent;
  for (std::size_t i = 0; i < write.keys.size(); ++i) {
    request.blocks.push_back({write.keys[i], parent});
    request.buffers.push_back(std::as_bytes(pool_.subspan(write.host_offsets[i], space.slot_bytes)));
    parent = write.keys[i];
  }
  request.deadline = write.deadline;
  const remote::RequestId id = request.id;
  if (tier_->write(std::move(request))) {
    writings_.emplace(id, write.op);
  } else {
    end_write(write.op, node::RemoteOutcome::kStoreFailed);
  }
}

void RemoteBridge::on_written(remote::RequestId id, remote::Outcome outcome) {
  apply_([&](node::Node& node) {
    node.on_store_written(writings_.extract(id).mapped(), to_node(outcome), monotonic_now());
  });
}

}  // namespace flexkv::server
