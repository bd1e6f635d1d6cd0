#include "flexkv/cluster/directory.h"

#include <algorithm>
#include <limits>
#include <set>

#include "flexkv/base/assert.h"
#include "flexkv/cluster/look.h"
#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
// Rounds that the bell asks for keep this distance, so that many nodes that join at once do not wake each other up in
// turns.
constexpr Nanos kRoundGap = 200 * kMillisecond;
// A node that has left says so for as long as it takes others to hear it.
constexpr Nanos kFarewell = 10 * kSecond;

}  // namespace

Directory::Directory(const DirectoryOptions& options, Replica& replica)
    : options_(options), replica_(replica), names_(options.cluster), epoch_(options.epoch), round_begun_(-kRoundGap) {
  FLEXKV_ASSERT(options.incarnation != 0 && options.name.size() <= kNameMax && options.address.size() <= kAddressMax);
  names_.set_epoch(epoch_);
}

// ---- this node's blocks --------------------------------------------------------------------------------------------

Publisher::Places Directory::places(const SpaceId& id) const {
  const Incarnation self = options_.incarnation;
  return {names_.stream(id, self), names_.snapshot(id, self)};
}

std::optional<SpaceIndex> Directory::add_space(const SpaceId& id, Nanos now) {
  if (spaces_.size() == kSpacesMax) return std::nullopt;
  Space& space = spaces_.emplace_back(Space{id, Publisher(options_.limits), false});
  space.publisher.move_to(places(id), now);
  for (auto& [node, peer] : peers_) follow_spaces(node, peer, now);
  ring_ = true;
  want_round(now);
  return static_cast<SpaceIndex>(spaces_.size() - 1);
}

void Directory::apply(const Change& change, Nanos now) {
  FLEXKV_ASSERT(change.space < spaces_.size() && change.tier < kTierCount);
  spaces_[change.space].publisher.apply(change, now);
}

void Directory::know_resets(std::uint64_t resets, Nanos now) {
  if (std::exchange(resets_known_, resets) == resets) return;
  for (auto& [node, peer] : peers_) follow_spaces(node, peer, now);
  ring_ = true;
  want_round(now);
}

// Who knows of fewer resets may have older blocks, as may who hears of none. Numbers do not tell who knows of more.
bool Directory::trusts(const Peer& peer) const { return peer.beat.resets == resets_known_; }

// ---- orders --------------------------------------------------------------------------------------------------------

bool Directory::round_is_near(Nanos now) const {
  return looked_ || order_ == Order::kLook || order_ == Order::kBeat || round_due_ <= now + kRoundGap;
}

void Directory::want_round(Nanos now) { round_due_ = std::min(round_due_, std::max(now, round_begun_ + kRoundGap)); }

void Directory::say(Condition condition, Nanos now) {
  FLEXKV_ASSERT(condition != Condition::kEnds);
  if (std::exchange(condition_, condition) == condition) return;
  ring_ = true;
  want_round(now);
}

void Directory::leave(Nanos now) {
  leaving_ = true;
  condition_ = Condition::kEnds;
  round_due_ = now;
}

Nanos Directory::order_due(Nanos now) const {
  if (left_ || epoch_to_enter_) return kForever;
  if (leaving_ || looked_) return now;
  Nanos due = round_due_;
  if (!joined_) return due;
  for (const Space& space : spaces_) {
    due = std::min(due, space.publisher.snapshot_due() ? now : space.publisher.due(now));
  }
  return due;
}

std::optional<meta::Request> Directory::next_order(Nanos now) {
  FLEXKV_ASSERT(order_ == Order::kNone);
  expire(now);
  if (order_due(now) > now) return std::nullopt;
  if (leaving_) {
    order_ = Order::kLeave;
    reset_looked_for_ = reset_asked_;
    // Who is named without a heartbeat has died.
    const Incarnation self = options_.incarnation;
    meta::Request farewell{meta::put(names_.beat(self), own_beat(), kFarewell), meta::drop(names_.nodes(), hex(self))};
    if (reset_wanted()) add_reset(farewell);  // nobody else may know of it
    farewell.push_back(meta::ring(names_.bell()));
    return farewell;
  }
  if (looked_) {
    order_ = Order::kBeat;
    return beat_request(now);
  }
  if (round_due_ <= now) {
    order_ = Order::kLook;
    reset_looked_for_ = reset_asked_;
    // From here on whoever wants a round wants another one than this.
    round_begun_ = now;
    round_due_ = now + beat_gap();
    return look_request();
  }
  for (order_space_ = 0; order_space_ < spaces_.size(); ++order_space_) {
    if (spaces_[order_space_].publisher.due(now) > now) continue;
    order_ = Order::kPublish;
    return spaces_[order_space_].publisher.publish_request(now, options_.time_to_live);
  }
  for (order_space_ = 0; !spaces_[order_space_].publisher.snapshot_due();) ++order_space_;
  order_ = Order::kSnapshot;
  return spaces_[order_space_].publisher.snapshot_request(options_.time_to_live);
}

void Directory::order_done(const Result<meta::Answers>& answers, Nanos now) {
  const Order order = std::exchange(order_, Order::kNone);
  FLEXKV_ASSERT(order != Order::kNone);
  if (!answers) {
    // The store may have lost everything. So first of all this node's heartbeat comes back, and others are told.
    looked_ = false;
    ring_ = true;
    round_due_ = now;
    left_ = leaving_ && !reset_wanted();
    return;
  }
  switch (order) {
    case Order::kLook:
      return look_done(answers.value(), now);
    case Order::kBeat:
      return beat_done(answers.value(), now);
    case Order::kPublish:
      return spaces_[order_space_].publisher.published();
    case Order::kSnapshot: {
      Publisher& publisher = spaces_[order_space_].publisher;
      if (!publisher.part_written()) return;
      ring_ = ring_ || publisher.was_asked();
      return want_round(now);
    }
    case Order::kLeave:
      if (reset_looked_for_ != reset_asked_) return;  // wanted meanwhile: the farewell is said once more, with it
      note_resets_told();
      left_ = true;
      return;
    case Order::kNone:
      return;
  }
}

// ---- rounds --------------------------------------------------------------------------------------------------------

meta::Request Directory::look_request() const {
  meta::Request request{meta::get(names_.epoch()),
                        meta::get(names_.reset()),
                        meta::get(names_.heard(epoch_.reset)),
                        meta::get(names_.heard(reset_asked_)),
                        meta::members(names_.nodes()),
                        meta::newest(names_.bell())};
  for (const Space& space : spaces_) request.push_back(meta::get(names_.ask(space.id, options_.incarnation)));
  return request;
}

void Directory::look_done(const meta::Answers& answers, Nanos now) {
  note_epoch(answers);
  if (epoch_to_enter_) return;
  // Spaces may have been added since it was asked.
  for (std::size_t s = 0; s + kFirstAsk < answers.size(); ++s) {
    const meta::Answer& ask = answers[s + kFirstAsk];
    spaces_[s].asked = ask.found;
    if (const auto generation = parse_number(ask.value)) spaces_[s].publisher.ask(*generation, now);
  }
  // Who rang before is heard in this round, whoever rings from now on in the next one.
  bell_after_ = answers[kBell].value;
  members_.clear();
  std::set<Incarnation> nodes;
  for (const auto& [node, peer] : peers_) nodes.insert(node);
  for (const std::string& member : answers[kMembers].members) {
    Incarnation node = 0;
    if (!parse_hex(member, node) || node == options_.incarnation) continue;
    members_.push_back(node);
    if (nodes.size() < kNodesMax) nodes.insert(node);
  }
  listening_.assign(nodes.begin(), nodes.end());
  std::erase_if(forgotten_, [&](const auto& one) { return !nodes.contains(one.first); });
  looked_ = true;
}

std::string Directory::own_beat() {
  beat_says_ = condition_;
  Beat beat{++beat_number_, options_.name, options_.address, {}, resets_known_, condition_};
  for (const Space& space : spaces_) {
    if (condition_ != Condition::kServes) break;
    beat.spaces.push_back(space.publisher.description());
    beat.spaces.back().id = space.id;
  }
  return encode_beat(beat, names_.beat(options_.incarnation));
}

meta::Request Directory::beat_request(Nanos now) {
  meta::Request request;
  for (const Incarnation node : listening_) request.push_back(meta::get(names_.beat(node)));
  add_epoch(request);
  const Incarnation self = options_.incarnation;
  request.push_back(meta::put(names_.beat(self), own_beat(), options_.time_to_live));
  request.push_back(meta::add(names_.nodes(), hex(self)));
  for (const Incarnation node : departed_) request.push_back(meta::drop(names_.nodes(), hex(node)));
  departed_.clear();
  for (const Space& space : spaces_) {
    space.publisher.touch(options_.time_to_live, request);
    if (space.asked) request.push_back(meta::remove(names_.ask(space.id, self)));
  }
  for (const auto& [node, peer] : peers_) {
    for (const auto& [space, follower] : peer.followers) {
      if (!follower.stuck()) continue;
      request.push_back(
          meta::put(names_.ask(spaces_[space].id, node), std::to_string(follower.generation()), options_.time_to_live));
    }
  }
  if (ring_ || reset_wanted()) request.push_back(meta::ring(names_.bell()));
  ring_ = false;
  if (reset_wanted()) want_round(now);
  request.push_back(meta::touch(names_.bell(), options_.time_to_live));
  return request;
}

void Directory::beat_done(const meta::Answers& answers, Nanos now) {
  looked_ = false;
  joined_ = true;
  told_ = beat_says_;
  for (std::size_t i = 0; i < listening_.size(); ++i) hear(listening_[i], answers[i], now);
}

void Directory::hear(Incarnation node, const meta::Answer& answer, Nanos now) {
  if (!answer.found) {
    forgotten_.erase(node);
    if (std::find(members_.begin(), members_.end(), node) != members_.end()) departed_.push_back(node);
    return;
  }
  auto beat = decode_beat(answer.value, names_.beat(node));
  if (!beat) {
    ++followed_.refused;
    followed_.last_refusal = beat.error().message;
    return;
  }
  const auto known = peers_.find(node);
  // Whether it changes is all that counts: no clock of another machine, nor of the store, is compared with ours.
  if (known != peers_.end() && known->second.beat.number == beat.value().number) return;
  if (const auto last = forgotten_.find(node); last != forgotten_.end()) {
    if (last->second == beat.value().number) return;
    forgotten_.erase(last);
  }
  Peer& peer = peers_[node];
  peer.seen_alive = known != peers_.end();
  peer.beat = std::move(beat).value();
  peer.heard = now;
  follow_spaces(node, peer, now);
}

void Directory::follow_spaces(Incarnation node, Peer& peer, Nanos now) {
  // Who is not trusted is not to be asked either, for what was found there before.
  replica_.refresh(node, trusts(peer) ? peer.beat.address : std::string(), peer.heard + options_.time_to_live);
  for (SpaceIndex s = 0; s < spaces_.size(); ++s) {
    const SpaceId& id = spaces_[s].id;
    const auto told = std::find_if(peer.beat.spaces.begin(), peer.beat.spaces.end(),
                                   [&](const Beat::Space& space) { return space.id == id; });
    if (told == peer.beat.spaces.end() || !trusts(peer)) {
      if (peer.followers.erase(s) > 0) replica_.clear(node, s);
      continue;
    }
    auto [follower, added] =
        peer.followers.try_emplace(s, node, s, names_.stream(id, node), names_.snapshot(id, node), replica_, followed_);
    follower->second.told(*told, now);
  }
}

void Directory::expire(Nanos now) {
  std::erase_if(peers_, [&](const auto& entry) {
    if (entry.second.heard + options_.time_to_live >= now) return false;
    replica_.remove(entry.first);
    forgotten_[entry.first] = entry.second.beat.number;
    return true;
  });
}

DirectoryStats Directory::stats() const {
  DirectoryStats stats;
  stats.epoch = epoch_.number;
  stats.joined = joined_;
  stats.left = left_ || told_ != Condition::kServes;
  stats.peers = peers_.size();
  for (const auto& [node, peer] : peers_) {
    if (peer.seen_alive && peer.beat.name == options_.name) ++stats.same_name;
    for (const auto& [space, follower] : peer.followers) {
      if (follower.stuck()) ++stats.stuck;
      if (follower.loading()) ++stats.loading;
    }
  }
  for (const Space& space : spaces_) {
    stats.blocks_told += space.publisher.block_count();
    stats.batches += space.publisher.batch_count();
    stats.stream_bytes += space.publisher.stream_bytes();
    stats.snapshot_bytes += space.publisher.snapshot_bytes();
  }
  stats.followed = followed_;
  stats.told_resets = told_resets_;
  return stats;
}

std::vector<PeerInfo> Directory::peers(Nanos now) const {
  std::vector<PeerInfo> all;
  for (const auto& [node, peer] : peers_) {
    all.push_back({node, peer.beat.name, peer.beat.address, now - peer.heard, peer.beat.condition});
  }
  return all;
}

}  // namespace flexkv::cluster
