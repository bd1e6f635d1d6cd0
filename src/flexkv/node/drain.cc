// A node that is to end without a loss: it takes nothing more, finishes what it has begun, and offers to the store what
// would go with it.

#include <algorithm>

#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// It looks at so many blocks at once, also of the prompts that it offers, and remembers so many parts: the hottest ones
// of all.
constexpr std::uint32_t kLooksAtOnce = 4096;
constexpr std::size_t kFoundMax = 16384;
// Before it looks again, or asks a store again that took nothing.
constexpr Nanos kOfferPause = 200 * kMillisecond;

}  // namespace

void Node::drain(Nanos now, Nanos until) {
  tell_time(now);
  if (!std::exchange(draining_, true)) {
    if (store_ != nullptr) store_->offers.emplace().look(now_);
    close_feeds();
  }
  if (store_ != nullptr) store_->offers->until = until;
  stop_scrub(now);
  flush_store(now);
}

Node::Undone Node::undone() const {
  Undone undone{.jobs = jobs_.size(),
                .loans = loans_.size(),
                .disk_writes = disk_queues().writes,
                .store_writes = store_queue(),
                .lends = lends_};
  if (store_ == nullptr || !store_->offers) return undone;
  const Offers& offers = *store_->offers;
  undone.host_only = offers.lacking;
  undone.looks = offers.state == Offers::State::kLooking || offers.again;
  undone.offered = offers.offered;
  return undone;
}

Node::Lookup Node::miss_by_drain(Sequence& sequence) {
  if (!std::exchange(sequence.counted, true)) {
    ++stats_.lookups;
    stats_.blocks_queried += sequence.keys.size();
    stats_.missed_blocks[slot_of(Reason::kDraining)] += sequence.keys.size();
  }
  return {0, Reason::kDraining, 0, 0};
}

// ---- to the store --------------------------------------------------------------------------------------------------

std::optional<Nanos> Node::offers_deadline() const {
  if (!store_->offers) return std::nullopt;
  const Offers& offers = *store_->offers;
  if (offers.state == Offers::State::kLooking) return offers.due;
  if (offers.again && (offers.state == Offers::State::kDone || now_ >= offers.until)) return now_;
  if (offers.state == Offers::State::kDone || now_ >= offers.until) return std::nullopt;
  return offers.due;
}

void Node::pump_offers() {
  Offers& offers = *store_->offers;
  // What is left once the time is over is only counted.
  if (offers.again &&
      (offers.state == Offers::State::kDone || (offers.state == Offers::State::kOffering && now_ >= offers.until))) {
    offers.look(now_ + kOfferPause);
  }
  if (offers.state == Offers::State::kLooking && now_ >= offers.due) look_for_offers();
  if (offers.state != Offers::State::kOffering || now_ >= offers.until) return;
  for (std::size_t looked_at = 0; !offers.found.empty();) {
    const Offers::Found next = offers.found.back();
    Space* space = find_space(next.space);
    if (space != nullptr && !offer(next.part, *space)) {
      offers.due = now_ + kOfferPause;
      return;
    }
    offers.found.pop_back();
    looked_at += store_->keys.size();
    if (looked_at >= kLooksAtOnce) {
      offers.due = now_;
      return;
    }
  }
  offers.look(now_ + kOfferPause);
}

// Some of it at once: others wait for the lock meanwhile.
void Node::look_for_offers() {
  Offers& offers = *store_->offers;
  const auto hotter = [](const Offers::Found& a, const Offers::Found& b) { return a.part.hotter_than(b.part); };
  const auto space = std::ranges::find_if(spaces_, [&](const auto& one) { return one->number >= offers.space; });
  if (space == spaces_.end()) {
    std::ranges::sort_heap(offers.found, hotter);
    std::ranges::reverse(offers.found);
    offers.state = offers.lacking == 0 ? Offers::State::kDone : Offers::State::kOffering;
    return;
  }
  Space& here = **space;
  if (here.number != offers.space) offers.run = 0;
  const auto next = here.index.visit_parts(
      kHostTier, offers.run, kLooksAtOnce,
      [&](const index::PrefixIndex::Part& part, std::span<const key::BlockKey> keys, const auto& slots) {
        std::uint64_t lacking = 0;
        const auto in_host = slots(kHostTier);
        for (std::size_t i = 0; i < keys.size(); ++i) {
          const bool only = in_host[i] != index::kNoSlot && !here.slots.marked(in_host[i]) &&
                            (disk_ == nullptr || slots(kDiskTier)[i] == index::kNoSlot);
          if (only && !store_->port.has(here.number, keys[i])) ++lacking;
        }
        if (lacking == 0) return;
        offers.lacking += lacking;
        offers.found.push_back({here.number, part});
        std::ranges::push_heap(offers.found, hotter);
        if (offers.found.size() <= kFoundMax) return;
        std::ranges::pop_heap(offers.found, hotter);
        offers.found.pop_back();
      });
  offers.space = next ? here.number : here.number + 1;
  offers.run = next.value_or(0);
  offers.due = now_;
}

// The part's last blocks that the store lacks, and what it lacks before them: they are found by that. False: the store
// or its queue has no room for all of it now.
bool Node::offer(const index::PrefixIndex::Part& part, Space& space) {
  // Once: it may have gone off by the next time.
  const std::uint32_t write_blocks = store_->port.write_blocks(space.number);
  if (write_blocks == 0 || store_is_busy()) return false;
  std::optional<index::PinId> pin = space.index.pin_part(part);
  if (!pin) return true;
  std::uint32_t end = space.index.depth(*pin);
  auto& slots = store_->slots;
  auto& keys = store_->keys;
  slots.resize(end);
  keys.resize(end);
  space.index.collect(*pin, kHostTier, 0, slots);
  space.index.collect_keys(*pin, 0, keys);
  const auto lacks = [&](std::uint32_t at) {
    return slots[at] != index::kNoSlot && !space.slots.marked(slots[at]) && !store_->port.has(space.number, keys[at]);
  };
  while (end > 0 && !lacks(end - 1)) --end;
  std::uint32_t begin = end;
  while (begin > 0 && lacks(begin - 1)) --begin;
  const std::uint32_t wanted = end - begin;
  end = begin + static_cast<std::uint32_t>(std::min<std::uint64_t>(wanted, store_room(space)));
  if (end > begin) {
    Offers& offers = *store_->offers;
    std::vector<index::Slot> on_drives(end - begin, index::kNoSlot);
    if (disk_ != nullptr) space.index.collect(*pin, kDiskTier, begin, on_drives);
    const auto only_here = static_cast<std::uint64_t>(std::ranges::count(on_drives, index::kNoSlot));
    offers.lacking -= std::min(offers.lacking, only_here);
    offers.offered += end - begin;
    queue_for_store(space, *pin, begin, end, write_blocks);
  }
  drop_pin(space, *pin);
  return end - begin == wanted;
}

}  // namespace flexkv::node
