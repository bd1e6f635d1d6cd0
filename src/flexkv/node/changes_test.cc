// Whatever the node does, a reader of the changes knows what its indexes hold; of one that drains, nothing.
#include <rapidcheck.h>

#include <map>
#include <set>
#include <tuple>

#include "flexkv/events/follower.h"
#include "flexkv/node/node_fixture.h"

namespace flexkv::node {
namespace {

using events::Change;
using Kind = events::Change::Kind;
// (space, tier, key, parent); and of those that are described, (tier, hash).
using Places = std::multiset<std::tuple<events::SpaceNumber, int, std::uint64_t, std::uint64_t>>;
using Names = std::multiset<std::pair<int, std::string>>;

class QueueDrives : public DiskPort {
 public:
  unsigned drive_count() const override { return 2; }
  void open_space(SpaceNumber space, const SpaceName&, std::uint64_t) override { opening.push_back(space); }
  void close_space(SpaceNumber) override {}
  void reset_space(SpaceNumber) override {}
  void reset_closed_spaces(const std::optional<ModelName>&) override {}
  DiskAdmission write(const DiskTransfer& transfer) override { return take(transfer); }
  DiskAdmission read(const DiskTransfer& transfer) override { return take(transfer); }
  DiskAdmission verify(const DiskTransfer&) override { return DiskAdmission::kUnavailable; }
  void cancel(DiskOp) override {}
  bool can_read(unsigned) const override { return true; }
  double write_pressure() const override { return 0; }

  DiskAdmission take(const DiskTransfer& transfer) {
    if (queue.size() == 8) return DiskAdmission::kBusy;
    queue.push_back(transfer);
    return DiskAdmission::kQueued;
  }
  std::vector<SpaceNumber> opening;
  std::vector<DiskTransfer> queue;
};

// Chained, and no two models have a key in common. Prompts share their first `shared` blocks.
Keys some_keys(std::uint64_t model, std::uint64_t prompt, std::uint64_t count, std::uint64_t shared) {
  Keys keys;
  std::uint64_t last = 1 + model;
  for (std::uint64_t i = 0; i < count; ++i) {
    last = Prng::mix(last * 31 + (i < shared ? 0 : prompt));
    keys.push_back({i + 1, last});
  }
  return keys;
}

std::string hash_of(const key::BlockKey& key) { return std::to_string(key.high) + "/" + std::to_string(key.low); }

// A reader that keeps all it hears, and a router behind a follower.
class Reader {
 public:
  // A few at a time, and maybe not all.
  void read(Node& node, std::size_t most) {
    std::vector<Change> changes;
    more_ = node.read_changes(subscription_, 0, most, changes);
    for (const Change& change : changes) {
      apply(change);
      std::vector<Change> news;
      follower_.apply(change, news);
      for (const Change& told : news) route(told);
    }
  }
  void read_all(Node& node) {
    do {
      read(node, 5);
    } while (more_);
  }
  // As after a connection that was lost.
  void forget_place() { subscription_ = {}; }

  std::size_t block_count() const { return blocks_.size(); }
  Places places() const {
    Places out;
    for (const auto& [at, what] : blocks_) {
      out.insert({std::get<0>(at), std::get<1>(at), std::get<2>(at), what.parent});
    }
    return out;
  }
  Names names() const {
    Names out;
    for (const auto& [at, what] : blocks_) {
      if (!what.hash.empty()) out.insert({std::get<1>(at), what.hash});
    }
    return out;
  }
  const Names& routed() const { return routed_; }

 private:
  using Place = std::tuple<events::SpaceNumber, int, std::uint64_t>;  // space, tier, key
  struct Block {
    std::uint64_t parent = 0;
    std::string hash;
  };

  void apply(const Change& change) {
    const Place at{change.space, change.tier, change.key.low};
    switch (change.kind) {
      case Kind::kAdded:
        blocks_[at] = {change.parent.low, change.description ? change.description->hash : ""};
        break;
      case Kind::kRemoved:
        RC_ASSERT(blocks_.erase(at) == 1U);
        break;
      case Kind::kCleared:
        std::erase_if(blocks_, [&](const auto& entry) { return std::get<0>(entry.first) == change.space; });
        break;
      case Kind::kRestart:
        blocks_.clear();
        break;
      case Kind::kCurrent:
        break;
    }
  }
  void route(const Change& told) {
    if (told.kind == Kind::kCleared) {
      RC_ASSERT(!routed_.empty());
      routed_.clear();
      return;
    }
    const std::pair<int, std::string> name{told.tier, told.description->hash};
    if (told.kind == Kind::kAdded) {
      RC_ASSERT(!routed_.contains(name));
      routed_.insert(name);
    } else {
      RC_ASSERT(routed_.erase(name) == 1U);
    }
  }

  events::Subscription subscription_;
  events::Follower follower_{true};
  bool more_ = false;
  std::map<Place, Block> blocks_;
  Names routed_;
};

class World : public Outbox {
 public:
  explicit World(bool with_drives) {
    NodeOptions options;
    options.pool_bytes = 24 * kExtentAlignment;
    options.disk_admission = false;
    options.always_load = true;
    node_ = std::make_unique<Node>(options, *this, with_drives ? &drives_ : nullptr);
    for (int i = 0; i < 2; ++i) attach(i);
  }

  void follow() { node_->follow(); }
  void drain() { node_->drain(now_, now_ + kSecond); }

  void step(std::uint32_t what) {
    Prng prng(what);
    now_ += kMillisecond;
    const auto which = static_cast<std::size_t>(prng.below(2));
    const EngineHandle engine = engines_[which];
    const Keys keys = some_keys(which, 1 + prng.below(5), 1 + prng.below(9), prng.below(4));
    switch (prng.below(16)) {
      case 0:
      case 1:
      case 2:
      case 3:
        (void)node_->lookup(engine, ++next_sequence_, 0, keys, now_);
        if (prng.below(3) > 0) describe(engine, next_sequence_, keys, prng.below(keys.size()));
        if (prng.below(4) > 0) transfer(engine, next_sequence_, keys, prng.below(3) > 0);
        if (prng.below(2) > 0) node_->close_sequence(engine, next_sequence_);
        break;
      case 4:
      case 5:
      case 6:
      case 7:
        report(prng.below(8) == 0 ? JobStatus::kFailed : JobStatus::kDone);
        break;
      case 8:
      case 9:
      case 10:
      case 11:
        end_disk(prng.below(4) == 0 ? DiskOutcome::kChecksum : DiskOutcome::kDone);
        break;
      case 12:
        node_->close_sequence(engine, next_sequence_ - prng.below(4));
        break;
      case 13:
        if (prng.below(3) == 0) node_->reset(engine, now_);
        break;
      case 14:
        if (prng.below(3) == 0) node_->reset_all(1, now_);
        break;
      default:
        // Its blocks stay; when the other engine needs the room, all of them go at once.
        if (prng.below(2) == 0) {
          node_->detach_client(engine);
          node_->detach_agent(agents_[which], now_);
          attach(static_cast<int>(which));
        }
        break;
    }
    if (!drives_.opening.empty()) open(drives_.opening.back(), prng.below(2) == 0);
    node_->check_invariants();
  }

  // The index itself says what it holds; nothing of that comes from the changes.
  void compare(const Reader& reader) {
    Reader fresh;
    fresh.read_all(*node_);
    RC_ASSERT(reader.places() == fresh.places());
    RC_ASSERT(reader.names() == fresh.names());
    RC_ASSERT(reader.routed() == fresh.names());
    if (node_->draining()) RC_ASSERT(fresh.block_count() == 0U);
    std::size_t host = 0;
    std::size_t disk = 0;
    for (const auto& space : node_->spaces()) {
      host += space.used - space.reserved;
      disk += space.disk_used;
    }
    std::size_t seen[2] = {};
    for (const auto& place : fresh.places()) ++seen[std::get<1>(place)];
    // Slots on their way, and of cleared blocks that are still pinned, are in use and found by nobody.
    RC_ASSERT(seen[0] <= host);
    RC_ASSERT(seen[1] <= disk);
  }

  Node& node() { return *node_; }

  bool send(AgentHandle agent, const proto::ToAgent& message) override {
    if (const auto* copy = std::get_if<proto::CopyCommand>(&message)) {
      if (copy->last) running_.emplace_back(agent, copy->job);
    }
    return true;
  }
  void send(EngineHandle, const proto::JobResult&) override {}

 private:
  void attach(int which) {
    const std::string id = "engine " + std::to_string(which);
    proto::ClientHello client;
    client.engine_id = id;
    client.fingerprint[0] = std::byte{static_cast<std::uint8_t>(which)};
    client.block_tokens = 2;
    proto::AgentHello agent;
    agent.engine_id = id;
    agent.shard_bytes = 1000;
    engines_[which] = node_->attach_client(client).value();
    agents_[which] = node_->attach_agent(agent).value();
    if (!drives_.opening.empty()) open(drives_.opening.back(), true);
  }

  // Sometimes with blocks of an earlier run, which nobody has described.
  void open(SpaceNumber space, bool with_blocks) {
    drives_.opening.pop_back();
    if (with_blocks) {
      const Keys keys = some_keys(space % 2, 1, 3, 0);
      const index::Slot slots[] = {0, 1, 2};
      const RecoveredChain chain{{}, keys, slots};
      node_->on_disk_recovered(space, {&chain, 1}, now_);
    }
    const std::uint32_t slots[] = {10, 10};
    node_->on_disk_opened(space, slots, now_);
  }

  void describe(EngineHandle engine, SequenceId sequence, const Keys& keys, std::size_t first) {
    proto::DescribeRequest request;
    request.sequence = sequence;
    request.first_block = static_cast<std::uint32_t>(first);
    if (first > 0) request.parent_hash = hash_of(keys[first - 1]);
    for (std::size_t i = first; i < keys.size(); ++i) request.hashes.push_back(hash_of(keys[i]));
    request.tokens.resize(request.hashes.size() * 2);
    request.details = {"details"};
    RC_ASSERT(proto::valid(request));
    node_->describe(engine, request);
  }

  void transfer(EngineHandle engine, SequenceId sequence, const Keys& keys, bool save) {
    proto::TransferRequest request{save, false, sequence, ++next_job_, 0, keys, 0, {}};
    request.device_blocks.resize(keys.size());
    (void)(save ? node_->save(engine, request, now_) : node_->load(engine, request, now_));
  }

  void report(JobStatus status) {
    if (running_.empty()) return;
    const auto [agent, job] = running_.front();
    running_.erase(running_.begin());
    node_->on_report(agent, {job, status}, now_);
  }

  void end_disk(DiskOutcome outcome) {
    if (drives_.queue.empty()) return;
    const DiskResult result{drives_.queue.front().op, outcome};
    drives_.queue.erase(drives_.queue.begin());
    node_->on_disk_done({&result, 1}, now_);
  }

  QueueDrives drives_;
  std::unique_ptr<Node> node_;
  EngineHandle engines_[2] = {};
  AgentHandle agents_[2] = {};
  std::vector<std::pair<AgentHandle, JobId>> running_;
  SequenceId next_sequence_ = 10;
  JobId next_job_ = 0;
  Nanos now_ = kSecond;
};

void check(bool with_drives) {
  EXPECT_TRUE(rc::check("the changes lead to what the indexes hold", [&](const std::vector<std::uint32_t>& seeds) {
    World world(with_drives);
    Reader reader;
    Reader lazy;
    const auto follow_from = *rc::gen::inRange<std::size_t>(0, 30);
    const auto rounds = *rc::gen::inRange(1, 12);
    const auto drain_from = *rc::gen::inRange<std::size_t>(0, 1000);
    std::size_t done = 0;
    for (int round = 0; round < rounds; ++round) {
      for (const std::uint32_t seed : seeds) {
        if (done++ == follow_from) world.follow();
        if (done == drain_from) world.drain();
        world.step(seed + static_cast<std::uint32_t>(round) * 7919);
        if (done <= follow_from) continue;
        reader.read(world.node(), 3);
        if (seed % 16 == 1) lazy.read(world.node(), 2);
        if (seed % 64 == 2) reader.forget_place();
      }
      if (done <= follow_from) continue;
      reader.read_all(world.node());
      world.compare(reader);
    }
    if (done <= follow_from) return;
    lazy.read_all(world.node());
    world.compare(lazy);
    RC_CLASSIFY(world.node().draining());
    RC_CLASSIFY(!reader.routed().empty());
    RC_CLASSIFY(reader.block_count() > 20);
  }));
}

TEST(NodeChangesTest, ReplicaEqualsTheIndexInHostMemory) { check(false); }
TEST(NodeChangesTest, ReplicaEqualsTheIndexesOfBothTiers) { check(true); }

}  // namespace
}  // namespace flexkv::node
