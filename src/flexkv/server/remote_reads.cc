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
constexpr std::size_t kPlacesMax = 32;  // looked at for a choice

// Longer chains end there: a peer is asked by all keys of the chain.
std::span<const key::BlockKey> askable(std::span<const key::BlockKey> keys) {
  return keys.first(std::min(keys.size(), peer::kKeysMax));
}

// What is on drives is read there before any of it comes.
Tier tier_of(const cluster::Replica::Holding& holding) {
  return holding.in_tier[0] < holding.blocks ? Tier::kDrives : Tier::kMemory;
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

// Who to read a beginning of `keys` from; see choose_read(). Those who are as good have their turns.
std::optional<RemoteReads::Choice> RemoteReads::choose(const Space& space, std::span<const key::BlockKey> keys,
                                                       std::span<const cluster::Incarnation> tried, double block_nanos,
                                                       Nanos now) {
  replica_.lookup(space.index, keys, now, holdings_);
  std::erase_if(holdings_, [&](const auto& holding) {
    return std::ranges::find(tried, holding.node) != tried.end() || flow(holding.node, now).resting;
  });
  if (holdings_.empty()) return std::nullopt;
  const std::uint64_t turn = Prng::mix(own_ + ++choices_);
  if (holdings_.size() > kPlacesMax) {  // the longest come first; of many that have as much, some
    const std::uint32_t most = holdings_.front().blocks;
    const auto shorter = std::ranges::find_if(holdings_, [&](const auto& one) { return one.blocks < most; });
    const auto alike = static_cast<std::size_t>(shorter - holdings_.begin());
    const std::size_t skipped = alike > kPlacesMax ? turn % (alike - kPlacesMax + 1) : 0;
    holdings_.erase(holdings_.begin(), holdings_.begin() + static_cast<std::ptrdiff_t>(skipped));
    holdings_.resize(kPlacesMax);
  }
  const auto slot_bytes = static_cast<double>(space.slot_bytes);
  bool known = true;
  places_.clear();
  for (const auto& holding : holdings_) {
    const auto peer = known_.find(holding.node);
    const ReadSource& source = peer == known_.end() ? unknown_ : peer->second.source;
    plan::TransferTime time = source.time(tier_of(holding), costs_, now);
    known &= time.known();
    // Nothing has come from anybody: then only what they have to send counts.
    if (!time.known()) time.per_byte = 1;
    places_.push_back({holding.blocks, time.estimate(static_cast<double>(source.waiting_bytes())),
                       time.per_byte * slot_bytes, Prng::mix(holding.node ^ turn)});
  }
  return Choice{choose_read(places_, known ? block_nanos : 0), known};
}

node::RemoteFound RemoteReads::find(node::SpaceNumber number, std::span<const key::BlockKey> keys, std::uint32_t first,
                                    double block_nanos, Nanos now) {
  const auto space = spaces_.find(number);
  keys = askable(keys);
  if (space == spaces_.end() || first >= keys.size()) return {};
  const auto choice = choose(space->second, keys.subspan(first), {}, block_nanos, now);
  if (!choice) return {};
  for (const std::size_t place : {choice->first, choice->then.value_or(choice->first)}) {
    peer(holdings_[place].node, now).promised_until = now + kPromise;
  }
  node::RemoteFound found;
  found.blocks = choice->blocks;
  if (choice->known) {
    const double bytes = static_cast<double>(space->second.slot_bytes) * choice->blocks;
    found.bytes_per_second = bytes / choice->reading * kSecond;
    found.wait = static_cast<Nanos>(choice->wait);
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
  // All that was found is wanted.
  if (const auto choice = choose(read.space, keys, read.tried, 0, now)) {
    const auto& holding = holdings_[choice->first];
    return Source{holding.node, replica_.address(holding.node, now), holding.blocks, tier_of(holding)};
  }
  for (const auto& [node, one] : known_) {
    const bool promised = now < one.promised_until && !one.source.resting(now);
    if (!promised || std::ranges::find(read.tried, node) != read.tried.end()) continue;
    // It lives and tells of no block: it has left.
    if (replica_.blocks(node) > 0 || replica_.address(node, now).empty()) continue;
    return Source{node, replica_.address(node, now), static_cast<std::uint32_t>(keys.size()), Tier::kMemory};
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
  const std::uint32_t ordered = std::min(chosen->blocks, read.wanted() - read.done);

  peer::ReadRequest request;
  request.id = next_request_++;
  request.node = cluster::hex(read.from);
  request.address = std::move(chosen->address);
  request.space = read.space.name;
  request.slot_bytes = read.space.slot_bytes;
  request.keys.assign(keys.begin(), keys.begin() + from + ordered);
  request.first = from;
  for (std::uint32_t i = 0; i < ordered; ++i) {
    request.buffers.push_back(pool_.subspan(read.asked.host_offsets[read.done + i], read.space.slot_bytes));
  }
  request.deadline = read.asked.deadline;

  read.there = peer(read.from, now).source.begin(chosen->tier, read.space.slot_bytes, ordered, now);
  requests_[read.asked.op] = request.id;
  watch(request.id, reads_.emplace(request.id, std::move(read)).first->second, now);
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
  peer(read.from, now).source.came(read.there, now);
  return Arrived{read.asked.op, read.done++};
}

// When nothing more comes of it, unless its time is over first.
void RemoteReads::watch(peer::RequestId request, const Read& read, Nanos now) {
  const Nanos at = peer(read.from, now).source.stops_at(read.there, costs_, now);
  if (at < read.asked.deadline) watch_.watch(request, at);
}

void RemoteReads::on_time(Nanos now) {
  for (const peer::RequestId request : watch_.take_due(now)) {
    Read& read = reads_.at(request);
    ReadSource& owner = peer(read.from, now).source;
    if (owner.stops_at(read.there, costs_, now) <= now) {
      if (!read.there.given_up) ++given_up_;
      owner.stopped(read.there, now);
      peers_.give_up(request);
    }
    watch(request, read, now);  // the peers may find another way to bring it
  }
}

// The request under way has ended: what it did not bring does not come from this peer.
void RemoteReads::settle(Read& read, peer::Outcome outcome, Nanos now) {
  const bool nothing = read.there.came == 0;
  const bool silent = outcome == peer::Outcome::kDeadline && (nothing || read.there.given_up);
  const bool stops = outcome == peer::Outcome::kCanceled && !read.canceled;  // by the owner, then
  using End = ReadSource::End;
  const bool failed = outcome == peer::Outcome::kUnreachable || silent || stops;
  const bool cut = outcome == peer::Outcome::kCanceled || outcome == peer::Outcome::kDeadline;
  peer(read.from, now).source.end(read.there, failed ? End::kFailed : cut ? End::kCut : End::kAnswered, costs_, now);
  // Who gives only so much at a time gives more once that has arrived.
  const bool gives_more = outcome == peer::Outcome::kDone || (outcome == peer::Outcome::kBusy && !nothing);
  if (!gives_more) read.tried.push_back(read.from);
}

std::optional<RemoteReads::Ended> RemoteReads::on_end(peer::RequestId request, peer::Outcome outcome, bool may_go_on,
                                                      Nanos now) {
  auto node = reads_.extract(request);
  if (node.empty()) return std::nullopt;
  Read read = std::move(node.mapped());
  const node::RemoteOp op = read.asked.op;
  watch_.forget(request);
  settle(read, outcome, now);
  const bool all = read.done == read.wanted();
  if (!all && may_go_on && !read.canceled && begin(std::move(read), now)) return std::nullopt;
  requests_.erase(op);
  if (all) return Ended{op, node::RemoteOutcome::kDone};
  return Ended{op, outcome == peer::Outcome::kDone ? node::RemoteOutcome::kMissing : to_node(outcome)};
}

RemoteReads::Peer& RemoteReads::peer(cluster::Incarnation node, Nanos now) {
  if (known_.size() >= kKnownMax && !known_.contains(node)) {
    std::erase_if(
        known_, [&](const auto& one) { return one.second.source.idle() && replica_.address(one.first, now).empty(); });
  }
  return known_[node];
}

RemoteReads::Flow RemoteReads::flow(cluster::Incarnation node, Nanos now) const {
  const auto found = known_.find(node);
  if (found == known_.end()) return {};
  const ReadSource& one = found->second.source;
  return {one.waiting_bytes(), one.bytes_per_second(), one.resting(now)};
}

}  // namespace flexkv::server
