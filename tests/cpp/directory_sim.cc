#include "directory_sim.h"

#include <algorithm>

namespace flexkv::testing {
namespace {

using cluster::Change;
using cluster::SpaceIndex;
using cluster::Tiers;

constexpr Nanos kTimeToLive = 30 * kSecond;
// As docs/decisions/0019 states it: twice the time to live, a read that waits and whose answer is lost, and a
// connection that is to be made again.
constexpr Nanos kConvergence =
    2 * kTimeToLive + kTimeToLive / 3 + SimMetaChannel::kAnswerWithin + SimMetaChannel::kRetryMax;
constexpr std::uint64_t kKeys = 300;

key::BlockKey key_of(std::uint64_t number) { return {Prng::mix(number), Prng::mix(number + 1'000'000)}; }
// Chains of a hundred blocks.
key::BlockKey parent_of(std::uint64_t number) { return number % 100 == 0 ? key::BlockKey{} : key_of(number - 1); }

cluster::SpaceId space_id(std::size_t number) {
  cluster::SpaceId id{};
  id[0] = static_cast<std::uint8_t>(number + 1);
  return id;
}

}  // namespace

struct DirectorySim::Node {
  Node(SimLoop& loop, SimMeta& store, const cluster::DirectoryOptions& options, std::function<void()> ready)
      : incarnation(options.incarnation),
        name(options.name),
        directory(options, replica),
        orders(loop, store, loop.below(1U << 30), ready),
        reads(loop, store, loop.below(1U << 30), ready) {}

  const cluster::Incarnation incarnation;
  const std::string name;
  cluster::Replica replica{1'000'000};
  cluster::Directory directory;
  SimMetaChannel orders;
  SimMetaChannel reads;
  bool uses_outliving = false;
  std::vector<std::size_t> spaces;  // by SpaceIndex
  std::array<Content, kSimSpaces> content;
  cluster::Epoch epoch;   // as it was entered,
  Nanos holds_since = 0;  // so that what the node holds, drives included, is not older,
  Nanos knows = 0;        // nor than the latest reset that it knows of
  Nanos offset = 0;       // of its clock
  Nanos wakeup = INT64_MAX;
  bool paused = false;
  std::shared_ptr<bool> alive = std::make_shared<bool>(true);
};

DirectorySim::DirectorySim(std::uint64_t seed, bool verbose) : loop_(seed, verbose), store_(loop_) {
  limits_.batch_max = 1 + loop_.below(40);
  limits_.part_max = 7 + loop_.below(60);
  limits_.snapshot_bytes_min = loop_.chance(500) ? 300 : 20'000;
  store_.faults.delay_max = loop_.delay(20 * kMillisecond) + kMicrosecond;
  if (loop_.chance(700)) {
    store_.faults.slow_permille = static_cast<unsigned>(loop_.below(30));
    store_.faults.lost_request_permille = static_cast<unsigned>(loop_.below(20));
    store_.faults.lost_answer_permille = static_cast<unsigned>(loop_.below(20));
    store_.faults.repeated_permille = static_cast<unsigned>(loop_.below(50));
  }
}

DirectorySim::~DirectorySim() {
  for (auto& node : nodes_) *node->alive = false;
}

void DirectorySim::add_node() {
  cluster::DirectoryOptions options;
  options.incarnation = next_incarnation_++;
  options.name = "node" + std::to_string(loop_.below(4));  // some have the same
  options.time_to_live = kTimeToLive;
  options.limits = limits_;
  Drive drive{{}, loop_.now(), 0};
  if (!drives_.empty() && loop_.chance(600)) {
    drive = drives_.back();
    drives_.pop_back();
  }
  options.epoch = drive.epoch;
  options.needs_reset = loop_.chance(500);
  auto alive = std::make_shared<Node*>(nullptr);
  auto node = std::make_unique<Node>(loop_, store_, options, [this, alive] { pump(**alive); });
  *alive = node.get();
  node->uses_outliving = options.needs_reset;
  node->epoch = drive.epoch;
  node->holds_since = drive.holds_since;
  node->knows = drive.knows;
  node->offset = loop_.delay(1'000'000 * kSecond);
  const Nanos now = loop_.now() + node->offset;
  const std::size_t first = loop_.below(kSimSpaces);
  for (std::size_t s = 0; s < kSimSpaces; ++s) {
    const std::size_t space = (first + s) % kSimSpaces;
    if (s > 0 && loop_.chance(300)) continue;
    SIM_CHECK(node->directory.add_space(space_id(space), now) == node->spaces.size());
    node->spaces.push_back(space);
  }
  loop_.note("node begins", node->incarnation);
  ++totals_.nodes;
  nodes_.push_back(std::move(node));
  restart_feed(*nodes_.back());
  pump(*nodes_.back());
}

void DirectorySim::count(const Node& node) {
  const auto stats = node.directory.stats();
  totals_.batches += stats.followed.batches;
  totals_.snapshots += stats.followed.snapshots;
  totals_.gaps += stats.followed.gaps;
  totals_.refused += stats.followed.refused;
}

void DirectorySim::remove_node(std::size_t at) {
  count(*nodes_[at]);
  loop_.note("node ends", nodes_[at]->incarnation);
  *nodes_[at]->alive = false;
  gone_.push_back(nodes_[at]->incarnation);
  if (loop_.chance(700)) drives_.push_back({nodes_[at]->epoch, nodes_[at]->holds_since, nodes_[at]->knows});
  nodes_.erase(nodes_.begin() + static_cast<std::ptrdiff_t>(at));
}

void DirectorySim::pump(Node& node) {
  if (node.paused) return;
  const auto now = [&] { return loop_.now() + node.offset; };
  node.directory.expire(now());
  if (node.directory.epoch_to_enter()) {
    for (SpaceIndex s = 0; s < node.spaces.size(); ++s) change(node, {Change::Kind::kCleared, 0, s, {}});
    node.epoch = *node.directory.epoch_to_enter();
    node.directory.enter_epoch(now());
    node.holds_since = loop_.now();
    if (const auto asked = asked_resets_.find(node.epoch.reset); asked != asked_resets_.end()) {
      node.knows = std::max(node.knows, asked->second);
    }
    loop_.note("node enters epoch", node.incarnation, node.directory.stats().epoch);
    ++totals_.resets;
  }
  use_outliving(node);
  const auto done = [&](auto report) {
    return [this, &node, alive = node.alive, report](Result<meta::Answers> answers) {
      if (!*alive) return;
      (node.directory.*report)(answers, loop_.now() + node.offset);
      pump(node);
    };
  };
  if (node.orders.ready()) {
    if (auto request = node.directory.next_order(now())) {
      node.orders.submit(*request, done(&cluster::Directory::order_done));
    }
  }
  if (node.reads.ready()) {
    if (auto request = node.directory.next_read(now())) {
      node.reads.submit(*request, done(&cluster::Directory::read_done));
    }
  }
  Nanos due = INT64_MAX;
  if (node.orders.ready()) due = node.directory.order_due(now());
  if (node.reads.ready()) due = std::min(due, node.directory.read_due(now()));
  if (due == INT64_MAX || (node.wakeup <= due && node.wakeup > now())) return;
  node.wakeup = due;
  loop_.at(due - node.offset, [this, &node, alive = node.alive] {
    if (!*alive) return;
    node.wakeup = INT64_MAX;
    pump(node);
  });
}

// It stores what it holds, and may find what others have stored: nothing that it knows to be forgotten.
void DirectorySim::use_outliving(Node& node) {
  const auto epoch = node.directory.current_epoch();
  if (!node.uses_outliving || !epoch) return;
  SIM_CHECK(*epoch == node.epoch && epoch->reset != 0);
  const auto [stored, first] = outliving_.try_emplace({epoch->number, epoch->reset}, node.holds_since);
  stored->second = std::min(stored->second, node.holds_since);
  SIM_CHECK(stored->second >= node.knows);
}

void DirectorySim::change(Node& node, Change change) {
  Content& content = node.content[node.spaces[change.space]];
  Tiers& tiers = content[cluster::tag_of(change.key)];
  if (change.kind == Change::Kind::kAdded) tiers |= static_cast<Tiers>(1U << change.tier);
  if (change.kind == Change::Kind::kRemoved) tiers &= static_cast<Tiers>(~(1U << change.tier));
  if (tiers == 0) content.erase(cluster::tag_of(change.key));
  if (change.kind == Change::Kind::kCleared) content.clear();
  node.directory.apply(change, loop_.now() + node.offset);
  ++totals_.changes;
}

void DirectorySim::change_some(Node& node) {
  const auto space = static_cast<SpaceIndex>(loop_.below(node.spaces.size()));
  if (loop_.chance(3)) return change(node, {Change::Kind::kCleared, 0, space, {}});
  if (loop_.chance(3)) return restart_feed(node);
  const std::uint64_t first = loop_.below(kKeys);
  const std::uint64_t count = 1 + loop_.below(30);
  const auto tier = static_cast<std::uint8_t>(loop_.below(2));
  const auto kind = loop_.chance(600) ? Change::Kind::kAdded : Change::Kind::kRemoved;
  const bool branches = loop_.chance(200);
  for (std::uint64_t k = first; k < first + count; ++k) {
    change(node, {kind, tier, space, key_of(k), parent_of(branches && k == first ? loop_.below(kKeys) : k)});
  }
}

// The feed has lost some changes, and gives a snapshot.
void DirectorySim::restart_feed(Node& node) {
  const Nanos now = loop_.now() + node.offset;
  for (SpaceIndex s = 0; s < node.spaces.size(); ++s) {
    node.directory.apply({Change::Kind::kRestart, 0, s, {}}, now);
    Content& content = node.content[node.spaces[s]];
    content.clear();
    for (std::uint64_t k = 0; k < kKeys; ++k) {
      if (!loop_.chance(300)) continue;
      const auto tiers = static_cast<Tiers>(1 + loop_.below(3));
      content[cluster::tag_of(key_of(k))] = tiers;
      for (std::uint8_t tier = 0; tier < 2; ++tier) {
        if ((tiers >> tier & 1) == 0) continue;
        node.directory.apply({Change::Kind::kAdded, tier, s, key_of(k), parent_of(k)}, now);
      }
    }
    node.directory.apply({Change::Kind::kCurrent, 0, s, {}}, now);
  }
}

void DirectorySim::cause_fault() {
  const std::size_t at = loop_.below(nodes_.size());
  Node& node = *nodes_[at];
  switch (loop_.below(11)) {
    case 0:
      loop_.note("store stops");
      return store_.stop();
    case 1:
    case 2:
      if (store_.running()) return;
      loop_.note("store starts");
      return store_.start();
    case 3:
      if (store_.running()) return;
      loop_.note("store starts empty");
      store_.forget_all();
      return store_.start();
    case 4:
      if (store_.running()) return store_.save();
      loop_.note("store starts with what was saved");
      store_.restore();
      return store_.start();
    case 5: {
      const bool cut = loop_.chance(600);
      loop_.note("node cut off", node.incarnation, cut);
      node.orders.cut(cut && loop_.chance(800));
      node.reads.cut(cut && loop_.chance(800));
      return;
    }
    case 6:
      loop_.note("node paused", node.incarnation, !node.paused);
      node.paused = !node.paused;
      return pump(node);
    case 7:
      if (loop_.chance(500)) remove_node(at);
      if (nodes_.size() < 5) add_node();
      return;
    case 8:
      if (!loop_.chance(300)) return;
      loop_.note("cluster reset", node.incarnation);
      asked_resets_[++last_reset_] = loop_.now();
      node.directory.reset_cluster(last_reset_, loop_.now() + node.offset);
      return pump(node);
    case 9:
      loop_.note("damage");
      return store_.damage();
    default:
      return;
  }
}

void DirectorySim::heal() {
  loop_.note("all is well again");
  quiet_ = true;
  store_.faults = {};
  store_.start();
  for (auto& node : nodes_) {
    node->orders.cut(false);
    node->reads.cut(false);
    node->paused = false;
    pump(*node);
  }
}

bool DirectorySim::knows(const Node& reader, const Node& other) {
  for (SpaceIndex s = 0; s < reader.spaces.size(); ++s) {
    const std::size_t space = reader.spaces[s];
    const bool shared = std::find(other.spaces.begin(), other.spaces.end(), space) != other.spaces.end();
    Content known;
    for (const auto& [tag, tiers, before] : reader.replica.content(other.incarnation, s)) known[tag] = tiers;
    if (known != (shared ? other.content[space] : Content{})) return false;
  }
  return true;
}

bool DirectorySim::agree() {
  for (const auto& reader : nodes_) {
    for (const auto& other : nodes_) {
      if (reader != other && !knows(*reader, *other)) return false;
    }
    if (reader->replica.stats().nodes != nodes_.size() - 1) return false;
  }
  return true;
}

std::uint64_t DirectorySim::run(DirectorySimTotals& totals) {
  const std::uint64_t count_at_start = 3 + loop_.below(3);
  for (std::uint64_t i = 0; i < count_at_start; ++i) add_node();
  const Nanos changes_every = loop_.delay(400 * kMillisecond) + 20 * kMillisecond;
  const Nanos faults_every = loop_.delay(20 * kSecond) + kSecond;
  const Nanos end = 20 * kSecond + loop_.delay(120 * kSecond);
  std::function<void()> changes = [&] {
    if (quiet_) return;
    Node& node = *nodes_[loop_.below(nodes_.size())];
    change_some(node);
    pump(node);
    loop_.after(loop_.delay(changes_every), changes);
  };
  std::function<void()> faults = [&] {
    if (quiet_) return;
    cause_fault();
    loop_.after(loop_.delay(faults_every), faults);
  };
  loop_.after(0, changes);
  loop_.after(faults_every, faults);
  while (loop_.step(end)) {
  }
  heal();
  Nanos agreed = 0;
  for (Nanos waited = 0; waited <= kConvergence; waited += kSecond) {
    while (loop_.step(end + waited)) {
    }
    if (!agree()) {
      agreed = 0;
    } else if (agreed == 0) {
      agreed = waited + 1;
    }
  }
  SIM_CHECK(agree());
  // Nobody holds what somebody else knows that it was to be forgotten, whatever Redis has forgotten meanwhile.
  for (const auto& knower : nodes_) {
    for (const auto& other : nodes_) SIM_CHECK(other->holds_since >= knower->knows);
  }
  // Nor does anybody find that in what outlives them all; and who may look there, does.
  for (const auto& reader : nodes_) {
    if (!reader->uses_outliving) continue;
    const auto epoch = reader->directory.current_epoch();
    SIM_CHECK(epoch);
    for (const auto& knower : nodes_) SIM_CHECK(outliving_.at({epoch->number, epoch->reset}) >= knower->knows);
  }
  totals_.slowest = agreed - 1;
  for (const auto& node : nodes_) {
    count(*node);
    SIM_CHECK(node->directory.stats().stuck == 0);
    for (const Content& content : node->content) totals_.blocks_at_end += content.size();
  }
  totals.changes += totals_.changes;
  totals.batches += totals_.batches;
  totals.snapshots += totals_.snapshots;
  totals.gaps += totals_.gaps;
  totals.refused += totals_.refused;
  totals.resets += totals_.resets;
  totals.nodes += totals_.nodes;
  totals.blocks_at_end += totals_.blocks_at_end;
  totals.slowest = std::max(totals.slowest, totals_.slowest);
  loop_.note("end", totals_.batches, totals_.gaps, totals_.snapshots, totals_.blocks_at_end);
  return loop_.hash();
}

}  // namespace flexkv::testing
