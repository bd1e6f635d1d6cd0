#include "flexkv/server/remote_reads.h"

#include <algorithm>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/prng.h"
#include "flexkv/cluster/names.h"
#include "flexkv/peer/messages.h"

namespace flexkv::server {
namespace {

constexpr std::size_t kKnownMax = 4096;
// Peers that have the same, of which the one with the least to send us is taken: more would not make that much less.
constexpr std::size_t kComparedMax = 16;

// Longer chains end there: a peer is asked by all keys of the chain.
std::span<const key::BlockKey> askable(std::span<const key::BlockKey> keys) {
  return keys.first(std::min(keys.size(), peer::kKeysMax));
}

node::RemoteOutcome to_node(peer::Outcome outcome) {
  switch (outcome) {
    case peer::Outcome::kDone:
      return node::RemoteOutcome::kDone;
    case peer::Outcome::kMissing:
      return node::RemoteOutcome::kMissing;
    case peer::Outcome::kBusy:
      return node::RemoteOutcome::kBusy;
    case peer::Outcome::kExpired:
    case peer::Outcome::kDeadline:
      return node::RemoteOutcome::kDeadline;
    case peer::Outcome::kCanceled:
      return node::RemoteOutcome::kCanceled;
    case peer::Outcome::kChecksum:
      return node::RemoteOutcome::kChecksum;
    case peer::Outcome::kUnreachable:
      break;
  }
  return node::RemoteOutcome::kUnreachable;
}

}  // namespace

peer::Outcome to_peer(node::Loan::Limit limit) {
  switch (limit) {
    case node::Loan::Limit::kNone:
      return peer::Outcome::kDone;
    case node::Loan::Limit::kMissing:
      return peer::Outcome::kMissing;
    case node::Loan::Limit::kBusy:
      return peer::Outcome::kBusy;
    case node::Loan::Limit::kDeadline:
      break;
  }
  return peer::Outcome::kExpired;
}

// Who has the longest beginning of `keys`; of several, who has the least to send us. Who that is, if all have nothing
// to send, differs from node to node.
const cluster::Replica::Holding* RemoteReads::choose(const Space& space, std::span<const key::BlockKey> keys,
                                                     std::span<const cluster::Incarnation> tried, Nanos now) {
  replica_.lookup(space.index, keys, now, holdings_);
  const cluster::Replica::Holding* best = nullptr;
  for (auto rest = std::span<const cluster::Replica::Holding>(holdings_); best == nullptr && !rest.empty();) {
    std::size_t equal = 1;  // the longest come first
    while (equal < rest.size() && rest[equal].blocks == rest[0].blocks) ++equal;
    std::pair<std::uint64_t, std::uint64_t> best_order;
    const std::size_t begin = Prng::mix(own_) % equal;
    for (std::size_t i = 0, compared = 0; i < equal && compared < kComparedMax; ++i) {
      const auto& holding = rest[(begin + i) % equal];
      if (std::ranges::find(tried, holding.node) != tried.end()) continue;
      const Flow now_of = flow(holding.node, now);
      if (now_of.resting) continue;
      ++compared;
      const std::pair order{now_of.waiting_bytes, Prng::mix(holding.node ^ own_)};
      if (best == nullptr || order < best_order) {
        best = &holding;
        best_order = order;
      }
    }
    rest = rest.subspan(equal);
  }
  return best;
}

node::RemoteFound RemoteReads::find(node::SpaceNumber number, std::span<const key::BlockKey> keys, std::uint32_t first,
                                    Nanos now) {
  const auto space = spaces_.find(number);
  keys = askable(keys);
  if (space == spaces_.end() || first >= keys.size()) return {};
  const auto* holding = choose(space->second, keys.subspan(first), {}, now);
  if (holding == nullptr) return {};
  peer(holding->node, now).promised_until = now + kPromise;
  node::RemoteFound found;
  found.blocks = holding->blocks;
  const Flow flow_of = flow(holding->node, now);
  found.bytes_per_second = flow_of.bytes_per_second > 0 ? flow_of.bytes_per_second : rate_.bytes_per_second();
  if (found.bytes_per_second > 0) {
    found.wait = static_cast<Nanos>(static_cast<double>(flow_of.waiting_bytes) / found.bytes_per_second * kSecond);
  }
  return found;
}

bool RemoteReads::read(node::RemoteRead asked, Nanos now) {
  FLEXKV_ASSERT(asked.keys.size() == asked.first + asked.host_offsets.size() && !asked.host_offsets.empty());
  const auto space = spaces_.find(asked.space);
  if (space == spaces_.end()) return false;
  Read read;
  read.asked = std::move(asked);
  read.space = space->second;
  return begin(std::move(read), now);
}

std::optional<RemoteReads::Source> RemoteReads::source(const Read& read, std::span<const key::BlockKey> keys,
                                                       Nanos now) {
  if (const auto* holding = choose(read.space, keys, read.tried, now)) {
    return Source{holding->node, replica_.address(holding->node, now), holding->blocks};
  }
  for (const auto& [node, one] : known_) {
    const bool promised = now < one.promised_until && now >= one.rests_until;
    if (!promised || std::ranges::find(read.tried, node) != read.tried.end()) continue;
    // It lives and tells of no block: it has left.
    if (replica_.blocks(node) > 0 || replica_.address(node, now).empty()) continue;
    return Source{node, replica_.address(node, now), static_cast<std::uint32_t>(keys.size())};
  }
  return std::nullopt;
}

bool RemoteReads::begin(Read&& read, Nanos now) {
  const std::uint32_t from = read.asked.first + read.done;
  const auto keys = askable(read.asked.keys);
  if (from >= keys.size() || now >= read.asked.deadline) return false;
  auto chosen = source(read, keys.subspan(from), now);
  if (!chosen || chosen->address.empty()) return false;
  read.from = chosen->node;
  read.begun = read.done;
  read.ordered = std::min(chosen->blocks, read.wanted() - read.done);

  peer::ReadRequest request;
  request.id = next_request_++;
  request.node = cluster::hex(read.from);
  request.address = std::move(chosen->address);
  request.space = read.space.name;
  request.slot_bytes = read.space.slot_bytes;
  request.keys.assign(keys.begin(), keys.begin() + from + read.ordered);
  request.first = from;
  for (std::uint32_t i = 0; i < read.ordered; ++i) {
    request.buffers.push_back(pool_.subspan(read.asked.host_offsets[read.done + i], read.space.slot_bytes));
  }
  request.deadline = read.asked.deadline;

  Peer& owner = peer(read.from, now);
  ++owner.reads;
  for (std::uint32_t i = 0; i < read.ordered; ++i) {
    owner.rate.begin(read.space.slot_bytes, now);
    rate_.begin(read.space.slot_bytes, now);
  }
  requests_[read.asked.op] = request.id;
  reads_.emplace(request.id, std::move(read));
  peers_.read(std::move(request));
  return true;
}

void RemoteReads::cancel(node::RemoteOp op) {
  const auto found = requests_.find(op);
  if (found == requests_.end()) return;
  reads_.at(found->second).canceled = true;
  peers_.cancel(found->second);
}

std::optional<RemoteReads::Arrived> RemoteReads::on_block(peer::RequestId request, Nanos now) {
  const auto found = reads_.find(request);
  if (found == reads_.end()) return std::nullopt;
  Read& read = found->second;
  peer(read.from, now).rate.end(read.space.slot_bytes, true, now);
  rate_.end(read.space.slot_bytes, true, now);
  return Arrived{read.asked.op, read.done++};
}

// The request under way has ended: what it did not bring does not come from this peer.
void RemoteReads::settle(Read& read, peer::Outcome outcome, Nanos now) {
  Peer& owner = peer(read.from, now);
  --owner.reads;
  const std::uint32_t came = read.done - read.begun;
  for (std::uint32_t i = came; i < read.ordered; ++i) {
    owner.rate.end(read.space.slot_bytes, false, now);
    rate_.end(read.space.slot_bytes, false, now);
  }
  const bool silent = outcome == peer::Outcome::kDeadline && came == 0;
  const bool stops = outcome == peer::Outcome::kCanceled && !read.canceled;  // by the owner, then
  if (outcome == peer::Outcome::kUnreachable || silent || stops) {
    // Reads that fail while it rests were asked before that: all together are one failure.
    if (now >= owner.rests_until) {
      owner.rests_until = now + owner.next_rest;
      owner.next_rest = std::min(owner.next_rest * 2, kPeerRestMax);
    }
  } else if (came > 0) {
    owner.next_rest = kPeerRestMin;
  }
  // Who gives only so much at a time gives more once that has arrived.
  const bool gives_more = outcome == peer::Outcome::kDone || (outcome == peer::Outcome::kBusy && came > 0);
  if (!gives_more) read.tried.push_back(read.from);
}

std::optional<RemoteReads::Ended> RemoteReads::on_end(peer::RequestId request, peer::Outcome outcome, bool may_go_on,
                                                      Nanos now) {
  auto node = reads_.extract(request);
  if (node.empty()) return std::nullopt;
  Read read = std::move(node.mapped());
  const node::RemoteOp op = read.asked.op;
  settle(read, outcome, now);
  const bool all = read.done == read.wanted();
  if (!all && may_go_on && !read.canceled && begin(std::move(read), now)) return std::nullopt;
  requests_.erase(op);
  if (all) return Ended{op, node::RemoteOutcome::kDone};
  return Ended{op, outcome == peer::Outcome::kDone ? node::RemoteOutcome::kMissing : to_node(outcome)};
}

RemoteReads::Peer& RemoteReads::peer(cluster::Incarnation node, Nanos now) {
  if (known_.size() >= kKnownMax && !known_.contains(node)) {
    std::erase_if(known_,
                  [&](const auto& one) { return one.second.reads == 0 && replica_.address(one.first, now).empty(); });
  }
  return known_[node];
}

RemoteReads::Flow RemoteReads::flow(cluster::Incarnation node, Nanos now) const {
  const auto found = known_.find(node);
  if (found == known_.end()) return {};
  const Peer& one = found->second;
  return {one.rate.waiting_bytes(), one.rate.bytes_per_second(), now < one.rests_until};
}

}  // namespace flexkv::server
