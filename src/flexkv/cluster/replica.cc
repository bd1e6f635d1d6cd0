#include "flexkv/cluster/replica.h"

#include <algorithm>
#include <cstring>

namespace flexkv::cluster {
namespace {

// Residencies between two releases of the mutex.
constexpr std::size_t kPiece = 64;
// After a run of fewer blocks than this, so many more keys are searched for at once: the next one may be as short.
constexpr std::size_t kAhead = 32;

void prefetch(const ResidencyTable& table, std::span<const key::BlockKey> keys) {
  for (const key::BlockKey& key : keys) table.prefetch(tag_of(key));
  for (const key::BlockKey& key : keys) table.prefetch_place(tag_of(key));
}

// Adds `run` to what is counted, eight blocks at a time.
void count(std::span<const Tiers> run, Replica::Holding& holding) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;
  holding.blocks += static_cast<std::uint32_t>(run.size());
  for (std::size_t at = 0; at < run.size(); at += sizeof(std::uint64_t)) {
    std::uint64_t eight = 0;
    std::memcpy(&eight, &run[at], std::min(sizeof(eight), run.size() - at));
    for (unsigned tier = 0; tier < kTierCount; ++tier) {
      holding.in_tier[tier] += static_cast<std::uint32_t>((eight >> tier & kOnes) * kOnes >> 56);
    }
  }
}

}  // namespace

const Replica::Node* Replica::find(Incarnation node) const {
  for (const Node& candidate : nodes_) {
    if (candidate.id == node) return &candidate;
  }
  return nullptr;
}
Replica::Node* Replica::find(Incarnation node) {
  return const_cast<Node*>(static_cast<const Replica*>(this)->find(node));
}

std::uint64_t Replica::blocks_of(const Node& node) const {
  std::uint64_t blocks = 0;
  for (const auto& table : node.tables) blocks += table == nullptr ? 0 : table->size();
  return blocks;
}

// ---- the writer ----------------------------------------------------------------------------------------------------

void Replica::refresh(Incarnation id, const std::string& address, Nanos until) {
  MutexLock lock(mutex_);
  Node* node = find(id);
  if (node == nullptr) {
    node = &nodes_.emplace_back();
    node->id = id;
  }
  node->address = address;
  node->until = until;
}

void Replica::remove(Incarnation id) {
  Node gone;  // its tables are freed after the mutex
  MutexLock lock(mutex_);
  Node* node = find(id);
  if (node == nullptr) return;
  block_count_ -= blocks_of(*node);
  gone = std::move(*node);
  if (node != &nodes_.back()) *node = std::move(nodes_.back());
  nodes_.pop_back();
}

void Replica::remove_all() {
  std::vector<Node> gone;
  MutexLock lock(mutex_);
  gone.swap(nodes_);
  block_count_ = 0;
}

void Replica::clear(Incarnation id, SpaceIndex space) {
  std::unique_ptr<ResidencyTable> gone;
  MutexLock lock(mutex_);
  Node* node = find(id);
  if (node == nullptr || node->tables[space] == nullptr) return;
  gone = std::move(node->tables[space]);
  block_count_ -= gone->size();
}

void Replica::resize(Incarnation id, SpaceIndex space) {
  const ResidencyTable* old = nullptr;
  {
    MutexLock lock(mutex_);
    old = find(id)->tables[space].get();
  }
  auto table = std::make_unique<ResidencyTable>(old->resized());
  MutexLock lock(mutex_);
  find(id)->tables[space].swap(table);
}

bool Replica::apply(Incarnation id, SpaceIndex space, std::span<const Residency> residencies) {
  bool complete = true;
  bool sparse = false;
  while (!residencies.empty()) {
    bool full = false;
    {
      MutexLock lock(mutex_);
      Node* node = find(id);
      if (node == nullptr) return complete;
      auto& table = node->tables[space];
      if (table == nullptr) table = std::make_unique<ResidencyTable>();
      const std::size_t piece = std::min(kPiece, residencies.size());
      for (const Residency& residency : residencies.first(piece)) table->prefetch(residency.tag);
      for (const Residency& residency : residencies.first(piece)) table->prefetch_place(residency.tag);
      std::size_t done = 0;
      for (; done < piece && !full; ++done) {
        const auto [tag, tiers] = residencies[done];
        if (tiers == 0 || table->find(tag) != 0) {
          const std::size_t before = table->size();
          table->set(tag, tiers);
          block_count_ -= before - table->size();
        } else if (block_count_ >= blocks_max_) {
          complete = false;
          ++left_out_;
        } else if (table->full()) {
          full = true;
          break;
        } else {
          table->set(tag, tiers);
          ++block_count_;
        }
      }
      residencies = residencies.subspan(done);
      sparse = table->sparse();
    }
    if (full) resize(id, space);
  }
  if (sparse) resize(id, space);
  return complete;
}

// ---- any thread ----------------------------------------------------------------------------------------------------

void Replica::lookup(SpaceIndex space, std::span<const key::BlockKey> keys, Nanos now,
                     std::vector<Holding>& out) const {
  out.clear();
  if (keys.empty()) return;
  MutexLock lock(mutex_);
  for (const Node& node : nodes_) {
    if (node.tables[space] != nullptr) node.tables[space]->prefetch(tag_of(keys[0]));
  }
  for (const Node& node : nodes_) {
    if (node.until < now || node.tables[space] == nullptr) continue;
    const ResidencyTable& table = *node.tables[space];
    Holding holding;
    holding.node = node.id;
    for (std::size_t at = 0, fetched = 0, likely = keys.size(); at < keys.size();) {
      const std::span<const std::uint8_t> run = table.run(keys.subspan(at), likely);
      if (run.empty()) break;
      count(run, holding);
      at += run.size();
      likely = run.size();  // as a prompt that came turn by turn
      if (run.size() >= kAhead || at < fetched) continue;
      fetched = std::min(at + kAhead, keys.size());
      prefetch(table, keys.subspan(at, fetched - at));
    }
    if (holding.blocks > 0) out.push_back(holding);
  }
  std::sort(out.begin(), out.end(), [](const Holding& a, const Holding& b) { return a.blocks > b.blocks; });
}

void Replica::tiers(Incarnation id, SpaceIndex space, std::span<const key::BlockKey> keys, Nanos now,
                    std::span<Tiers> out) const {
  std::fill(out.begin(), out.end(), Tiers{0});
  MutexLock lock(mutex_);
  const Node* node = find(id);
  if (node == nullptr || node->until < now || node->tables[space] == nullptr) return;
  const ResidencyTable& table = *node->tables[space];
  auto next = out.begin();
  for (std::size_t at = 0; at < keys.size(); at += kAhead) {
    const auto piece = keys.subspan(at, std::min(kAhead, keys.size() - at));
    prefetch(table, piece);
    for (const key::BlockKey& key : piece) *next++ = table.find(tag_of(key));
  }
}

std::string Replica::address(Incarnation id, Nanos now) const {
  MutexLock lock(mutex_);
  const Node* node = find(id);
  return node == nullptr || node->until < now ? std::string() : node->address;
}

Replica::Stats Replica::stats() const {
  MutexLock lock(mutex_);
  Stats stats;
  stats.nodes = nodes_.size();
  stats.left_out = left_out_;
  for (const Node& node : nodes_) {
    stats.blocks += blocks_of(node);
    for (const auto& table : node.tables) stats.memory_bytes += table == nullptr ? 0 : table->memory_bytes();
  }
  return stats;
}

std::uint64_t Replica::blocks(Incarnation id) const {
  MutexLock lock(mutex_);
  const Node* node = find(id);
  return node == nullptr ? 0 : blocks_of(*node);
}

std::vector<Residency> Replica::content(Incarnation id, SpaceIndex space) const {
  MutexLock lock(mutex_);
  std::vector<Residency> all;
  const Node* node = find(id);
  if (node == nullptr || node->tables[space] == nullptr) return all;
  const ResidencyTable& table = *node->tables[space];
  table.walk(0, table.end(), [&](Tag tag, std::uint8_t tiers) { all.push_back({tag, tiers}); });
  return all;
}

}  // namespace flexkv::cluster
