#include "flexkv/testing/cluster_sim.h"

#include <sys/mman.h>

#include <algorithm>

#include "flexkv/cluster/names.h"

namespace flexkv::testing {
namespace {

constexpr Nanos kPatience = 300 * kSecond;
constexpr Nanos kPoll = 10 * kMillisecond;
constexpr Nanos kOutage = 5 * kSecond;
constexpr Nanos kNodeTick = 500 * kMillisecond;
constexpr Nanos kSweep = 30 * kSecond;
// Of a message to Redis or between nodes, one way; at random up to twice that to Redis.
constexpr Nanos kLatency = 250 * kMicrosecond;
constexpr double kLinkBytesPerSecond = 5e9;  // of each node, in each direction
constexpr std::uint64_t kTokenBytes = 128 << 10;
constexpr std::uint32_t kTraceBlockTokens = 512;
constexpr std::size_t kRoutedBlocks = 2;

// Of a set of blocks, whatever their order.
struct Fingerprint {
  std::uint64_t count = 0;
  std::uint64_t sum = 0;
  void add(cluster::Tag tag, cluster::Tiers tiers) {
    ++count;
    sum += Prng::mix(tag ^ Prng::mix(tiers));
  }
  friend bool operator==(const Fingerprint&, const Fingerprint&) = default;
};

std::uint64_t slot_bytes(const ClusterShape& shape) { return shape.block_tokens * kTokenBytes; }

}  // namespace

// ---- the load ------------------------------------------------------------------------------------------------------

ClusterLoad::ClusterLoad(const std::vector<TracedPrompt>& trace, std::uint32_t copies, std::uint64_t seed)
    : trace_(trace) {
  Prng random(Prng::mix(seed));
  requests_.reserve(trace.size() * copies);
  for (std::size_t first = 0, end = 0; first < trace.size(); first = end) {
    while (end < trace.size() && trace[end].at == trace[first].at) ++end;
    const Nanos gap = (end < trace.size() ? trace[end].at : trace[first].at + kSecond) - trace[first].at;
    for (std::uint32_t copy = 0; copy < copies; ++copy) {
      for (std::size_t r = first; r < end; ++r) {
        const auto late = static_cast<Nanos>(random.below(static_cast<std::uint64_t>(gap)));
        requests_.push_back({trace[r].at + late, copy, static_cast<std::uint32_t>(r)});
      }
    }
  }
  std::ranges::stable_sort(requests_, {}, &Request::at);
}

std::vector<key::BlockKey> ClusterLoad::keys(const Request& request, std::uint32_t block_tokens) const {
  const TracedPrompt& prompt = trace_[request.number];
  std::vector<key::BlockKey> keys;
  keys.reserve(prompt.tokens / block_tokens);
  for (std::uint32_t token = 0; token + block_tokens <= prompt.tokens; token += block_tokens) {
    const std::uint64_t block = std::uint64_t{request.copy} << 32 | prompt.blocks[token / kTraceBlockTokens];
    const std::uint64_t low = Prng::mix(Prng::mix(block + 1) + token % kTraceBlockTokens);
    keys.push_back({Prng::mix(~low), low});
  }
  return keys;
}

std::uint32_t ClusterLoad::node_for(ClusterRouter router, std::size_t request, std::uint32_t nodes) const {
  if (router == ClusterRouter::kRoundRobin) return static_cast<std::uint32_t>(request % nodes);
  const Request& one = requests_[request];
  const std::vector<std::uint32_t>& blocks = trace_[one.number].blocks;
  std::uint64_t hash = one.copy;
  for (std::size_t i = 0; i < std::min(kRoutedBlocks, blocks.size()); ++i) hash = Prng::mix(hash + blocks[i]);
  return static_cast<std::uint32_t>(hash % nodes);
}

ServedBlocks serve_apart(const ClusterLoad& load, const ClusterShape& shape, std::uint32_t nodes) {
  const std::uint64_t blocks = std::uint64_t{shape.blocks} * shape.nodes / nodes;
  ServedBlocks served;
  for (std::uint32_t node = 0; node < nodes; ++node) {
    SimCache cache(blocks, slot_bytes(shape), nullptr);
    for (std::size_t r = 0; r < load.requests().size(); ++r) {
      if (load.node_for(shape.router, r, nodes) != node) continue;
      const ClusterLoad::Request& request = load.requests()[r];
      cache.serve(load.keys(request, shape.block_tokens), request.at);
    }
    served += cache.served();
  }
  return served;
}

// ---- the cluster ---------------------------------------------------------------------------------------------------

ClusterSim::ClusterSim(const ClusterShape& shape, const ClusterLoad& load)
    : shape_(shape), load_(load), loop_(shape.seed, false), store_(loop_), asked_(shape.nodes) {
  store_.faults.delay_max = 2 * kLatency;
  // Where blocks would lie; nothing is read or written there.
  const std::uint64_t pool_bytes = shape.blocks * slot_bytes(shape);
  void* pool = ::mmap(nullptr, pool_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  SIM_CHECK(pool != MAP_FAILED);
  pool_ = {static_cast<std::byte*>(pool), pool_bytes};
  cluster::DirectoryOptions options;
  if (shape.replicas < shape.nodes) {
    options.name = "observer";
    options.incarnation = Prng::mix(shape.seed);
    observer_ = std::make_unique<SimDirectory>(loop_, store_, options, true);
  }
  for (std::uint32_t n = 0; n < shape.nodes; ++n) {
    options.name = "node" + std::to_string(n);
    options.address = "192.168.100.100:" + std::to_string(10'000 + n);
    options.incarnation = Prng::mix(shape.seed + n + 1);
    const bool follows = n < shape.replicas;
    const ClusterNode::Config config{options, shape.blocks, slot_bytes(shape), pool_,
                                     follows ? nullptr : &observer_->replica()};
    nodes_.push_back(std::make_unique<ClusterNode>(
        loop_, store_, config,
        [this](ClusterNode& reader, const peer::ReadRequest& request) { transfer(reader, request); }));
  }
}

ClusterSim::~ClusterSim() {
  nodes_.clear();
  ::munmap(pool_.data(), pool_.size());
}

ClusterNode* ClusterSim::find(const std::string& incarnation) {
  const auto found = std::ranges::find_if(
      nodes_, [&](const auto& node) { return cluster::hex(node->directory().incarnation()) == incarnation; });
  return found == nodes_.end() ? nullptr : found->get();
}

// All blocks of a read come at its end.
void ClusterSim::transfer(ClusterNode& reader, const peer::ReadRequest& request) {
  loop_.after(kLatency, [this, &reader, request] {
    ClusterNode* owner = find(request.node);
    const auto end_at = [&](Nanos time, std::uint32_t blocks, peer::Outcome outcome) {
      loop_.at(time, [&reader, id = request.id, blocks, outcome] { reader.read_ended(id, blocks, outcome); });
    };
    if (owner == nullptr) return end_at(loop_.now() + kLatency, 0, peer::Outcome::kUnreachable);
    const node::LoanId id = ++last_loan_;
    const node::Loan loan = owner->lend(id, request);
    // One read after the other leaves the owner, and one after the other enters the reader, as far as it has time.
    const double bytes = static_cast<double>(request.slot_bytes);
    const auto block_time = static_cast<Nanos>(bytes / kLinkBytesPerSecond * static_cast<double>(kSecond));
    const Nanos sent = std::max(loop_.now(), owner->sends_until);
    const Nanos begin = std::max(sent, reader.receives_until);
    const Nanos left = std::max<Nanos>(0, request.deadline - kLatency - begin);
    const auto blocks = std::min<Nanos>(static_cast<Nanos>(loan.host_offsets.size()), left / block_time);
    const bool late = static_cast<std::size_t>(blocks) < loan.host_offsets.size();
    const Nanos end = begin + blocks * block_time;
    owner->sends_until = sent + blocks * block_time;
    reader.receives_until = std::max(reader.receives_until, end);
    loop_.at(end, [owner, id] { owner->end_loan(id); });
    end_at(late ? request.deadline : end + kLatency, static_cast<std::uint32_t>(blocks),
           late ? peer::Outcome::kDeadline : server::to_peer(loan.limit));
  });
}

void ClusterSim::wait(Nanos time) {
  const Nanos end = loop_.now() + time;
  while (loop_.step(end)) {
  }
}

template <typename Condition>
std::optional<Nanos> ClusterSim::time_until(Condition condition) {
  const Nanos begin = loop_.now();
  while (!condition()) {
    if (loop_.now() - begin > kPatience) return std::nullopt;
    wait(kPoll);
  }
  return loop_.now() - begin;
}

std::vector<const SimDirectory*> ClusterSim::followers() const {
  std::vector<const SimDirectory*> all;
  if (observer_ != nullptr) all.push_back(observer_.get());
  for (const auto& node : nodes_) {
    if (node->directory().follows()) all.push_back(&node->directory());
  }
  return all;
}

void ClusterSim::join() {
  if (observer_ != nullptr) {
    (void)observer_->add_space(nodes_.front()->space_name());
    observer_->pump();
  }
  const std::size_t others = nodes_.size() + (observer_ != nullptr ? 1 : 0) - 1;
  const auto joined = time_until(
      [&] { return std::ranges::all_of(followers(), [&](const auto* one) { return one->stats().peers == others; }); });
  SIM_CHECK(joined.has_value());
  figures_.joined = *joined;
}

// ---- serving -------------------------------------------------------------------------------------------------------

void ClusterSim::serve_one(const ClusterLoad::Request& request, std::uint32_t node) {
  std::vector<key::BlockKey> keys = load_.keys(request, shape_.block_tokens);
  asked_[node] += keys.size();
  nodes_[node]->serve(std::move(keys));
}

void ClusterSim::arrive(std::size_t request) {
  const auto& requests = load_.requests();
  serve_one(requests[request], load_.node_for(shape_.router, request, shape_.nodes));
  --left_;
  if (request + 1 == requests.size()) return;
  loop_.at(begun_ + requests[request + 1].at, [this, request] { arrive(request + 1); });
}

void ClusterSim::serve() {
  begun_ = loop_.now();
  const DirectoryTraffic before = traffic();
  DirectoryTraffic followed_before;
  for (const SimDirectory* one : followers()) followed_before += one->traffic();
  left_ = load_.requests().size();
  if (left_ > 0) loop_.at(begun_ + load_.requests()[0].at, [this] { arrive(0); });
  Nanos swept = begun_;
  for (;;) {
    const auto busy = [](const auto& node) { return node->under_way() > 0; };
    if (left_ == 0 && std::ranges::none_of(nodes_, busy)) break;
    wait(left_ > 0 ? kNodeTick : kPoll);
    for (auto& node : nodes_) node->pass_time();
    if (loop_.now() < swept + kSweep) continue;
    store_.drop_lapsed();
    swept = loop_.now();
  }
  figures_.served = loop_.now() - begun_;
  figures_.all = traffic() - before;
  for (const SimDirectory* one : followers()) figures_.follower += one->traffic();
  figures_.follower = figures_.follower - followed_before;
  figures_.followers = static_cast<std::uint32_t>(followers().size());
  store_.drop_lapsed();
  figures_.store_bytes = store_.value_bytes();
  figures_.busiest_node = *std::ranges::max_element(asked_);
  figures_.batches = batches();
  for (auto& node : nodes_) {
    figures_.blocks += node->served();
    for (std::size_t i = 0; i < proto::kReasonCount; ++i) figures_.unimported[i] += node->stats().unimported_blocks[i];
    figures_.changes += node->directory().changes();
    auto& times = node->lookup_times();
    figures_.lookups.insert(figures_.lookups.end(), times.begin(), times.end());
    times = {};
  }
  const Nanos changed = last_change();
  (void)time_until([&] { return may_agree() && agree(); });
  if (agree()) figures_.converged = loop_.now() - changed;
  figures_.replica = followers().front()->replica().stats();
}

// ---- what must be so in the end ------------------------------------------------------------------------------------

Nanos ClusterSim::last_change() const {
  Nanos last = 0;
  for (const auto& node : nodes_) last = std::max(last, node->directory().changed_at());
  return last;
}

bool ClusterSim::may_agree() const {
  for (const SimDirectory* reader : followers()) {
    for (const auto& node : nodes_) {
      const cluster::Incarnation id = node->directory().incarnation();
      if (reader->incarnation() == id) continue;
      if (reader->replica().blocks(id) != node->directory().stats().blocks_told) return false;
    }
  }
  return true;
}

bool ClusterSim::agree() {
  for (const auto& node : nodes_) {
    Fingerprint is;
    for (const cluster::Tag tag : node->content()) is.add(tag, 1);
    for (const SimDirectory* reader : followers()) {
      const cluster::Incarnation id = node->directory().incarnation();
      if (reader->incarnation() == id) continue;
      Fingerprint known;
      for (const auto& [tag, tiers, before] : reader->replica().content(id, 0)) known.add(tag, tiers);
      if (known != is) return false;
    }
  }
  return std::ranges::all_of(
      followers(), [&](const SimDirectory* one) { return one->stats().stuck == 0 && one->stats().loading == 0; });
}

void ClusterSim::kill_one() {
  SIM_CHECK(nodes_.size() > 1);
  const cluster::Incarnation id = nodes_.back()->directory().incarnation();
  nodes_.pop_back();
  figures_.death_seen = time_until([&] {
    return std::ranges::all_of(followers(),
                               [&](const auto* one) { return one->replica().address(id, loop_.now()).empty(); });
  });
}

void ClusterSim::empty_store() {
  store_.stop();
  store_.forget_all();
  // Something to miss: the first requests of the load, of another copy of it.
  const auto& requests = load_.requests();
  const std::size_t count = std::min<std::size_t>(requests.size(), 4 * nodes_.size());
  for (std::size_t r = 0; r < count; ++r) {
    loop_.after(kOutage * static_cast<Nanos>(r) / static_cast<Nanos>(count),
                [this, r, request = requests[r]]() mutable {
                  request.copy += shape_.nodes;
                  serve_one(request, static_cast<std::uint32_t>(r % nodes_.size()));
                });
  }
  wait(kOutage);
  store_.start();
  figures_.emptied_and_converged = time_until([&] { return may_agree() && agree(); });
}

DirectoryTraffic ClusterSim::traffic() const {
  DirectoryTraffic all;
  if (observer_ != nullptr) all += observer_->traffic();
  for (const auto& node : nodes_) all += node->directory().traffic();
  return all;
}

std::uint64_t ClusterSim::batches() const {
  std::uint64_t all = 0;
  for (const auto& node : nodes_) all += node->directory().stats().batches;
  return all;
}

const ClusterFigures& ClusterSim::figures() {
  loop_.note("end", figures_.blocks.own, figures_.blocks.remote, figures_.changes, figures_.batches);
  figures_.trace_hash = loop_.hash();
  return figures_;
}

}  // namespace flexkv::testing
