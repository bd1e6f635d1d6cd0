// What is kept, told to readers (module events).

#include <algorithm>
#include <array>

#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// About 6 MB. A reader that is further behind gets a snapshot.
constexpr std::size_t kChangesHeldMax = 1 << 16;

}  // namespace

void Node::follow() {
  if (feed_ != nullptr) return;
  feed_ = std::make_unique<events::Feed>(kChangesHeldMax, [this] { outbox_.changed(); });
  for (const auto& space : spaces_) open_feed(*space);
}

void Node::open_feed(Space& space) {
  if (feed_ == nullptr) return;
  space.feed.emplace(*feed_, space.number);
  if (!draining_) space.index.tell(&*space.feed);
}

// For readers this is a node without blocks from now on, whatever it still holds.
void Node::close_feeds() {
  if (feed_ == nullptr) return;
  for (const auto& space : spaces_) {
    space->index.tell(nullptr);
    space->feed->cleared();
  }
}

bool Node::read_changes(events::Subscription& subscription, EngineHandle handle, std::size_t changes_max,
                        std::vector<events::Change>& out) {
  if (feed_ == nullptr) return false;
  events::SpaceNumber number = 0;
  if (handle != 0) {
    const Engine* engine = find_engine(handle);
    if (engine == nullptr || engine->space == nullptr) return false;  // until its ranks are back
    number = engine->space->feed->space();
  }
  return subscription.read(
      *feed_, number, changes_max,
      [&](std::vector<events::Change>& kept) {
        if (draining_) return;
        for (const auto& space : spaces_) {
          if (number == 0 || space->feed->space() == number) space->index.append_kept(kept);
        }
      },
      out);
}

void Node::want_changes() {
  if (feed_ != nullptr) feed_->want_wake();
}

void Node::describe(EngineHandle handle, const proto::DescribeRequest& request) {
  Engine* engine = find_engine(handle);
  if (feed_ == nullptr || draining_ || engine == nullptr || engine->space == nullptr) return;
  const auto found = engine->sequences.find(request.sequence);
  if (found == engine->sequences.end()) return;
  Sequence& sequence = found->second;
  const std::size_t end = request.first_block + request.hashes.size();
  // Descriptions come before the keys of the save that they are for, and have the same bound.
  if (end > sequence.keys.size() && sequence_keys_ + (end - sequence.keys.size()) > options_.sequence_keys_max) return;
  if (sequence.descriptions.size() < end) sequence.descriptions.resize(end);
  std::ranges::move(proto::descriptions(request), sequence.descriptions.begin() + request.first_block);
  Space& space = *engine->space;
  const bool valid = sequence.pinned && sequence.generation == space.generation && sequence.drops == space.drops;
  if (!valid || sequence.matched <= request.first_block) return;
  const std::size_t kept = std::min<std::size_t>(end, sequence.matched) - request.first_block;
  describe_path(space, sequence.pin, request.first_block,
                std::span(sequence.descriptions).subspan(request.first_block, kept));
}

// Blocks from `first` on of the pinned path, as far as they are known.
void Node::describe_path(Space& space, index::PinId pin, std::uint32_t first,
                         std::span<const events::DescriptionRef> known) {
  const std::size_t before = first == 0 ? 0 : 1;
  std::vector<key::BlockKey> keys(before + known.size());
  space.index.collect_keys(pin, first - static_cast<std::uint32_t>(before), keys);
  std::array<std::vector<index::Slot>, 2> slots;
  for (index::Tier tier = 0; tier < slots.size(); ++tier) {
    slots[tier].assign(known.size(), index::kNoSlot);
    if (tier == kHostTier || disk_ != nullptr) space.index.collect(pin, tier, first, slots[tier]);
  }
  for (std::size_t i = 0; i < known.size(); ++i) {
    if (known[i] == nullptr) continue;
    unsigned tiers = 0;
    for (index::Tier tier = 0; tier < slots.size(); ++tier) {
      if (slots[tier][i] != index::kNoSlot) tiers |= 1U << tier;
    }
    const std::size_t at = before + i;
    space.feed->describe(at == 0 ? key::BlockKey{} : keys[at - 1], keys[at], known[i], tiers);
  }
}

// What a save brought into the index.
void Node::describe_saved(const Job& job) {
  if (feed_ == nullptr || draining_ || job.descriptions.empty()) return;
  Space& space = *job.space;
  describe_path(space, job.pin, space.index.depth(job.pin) - static_cast<std::uint32_t>(job.keys.size()),
                job.descriptions);
}

// How many leading blocks of what was found are described.
std::uint32_t Node::described(const Space& space, Sequence& sequence) const {
  if (feed_ == nullptr) return sequence.matched;
  sequence.described = std::min(sequence.described, sequence.matched);
  while (sequence.described < sequence.matched && space.feed->described(sequence.keys[sequence.described])) {
    ++sequence.described;
  }
  return sequence.described;
}

}  // namespace flexkv::node
