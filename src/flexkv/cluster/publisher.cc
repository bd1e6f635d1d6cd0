#include "flexkv/cluster/publisher.h"

#include <algorithm>
#include <limits>

#include "flexkv/base/assert.h"
#include "flexkv/cluster/wire.h"

namespace flexkv::cluster {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
constexpr std::size_t kBatchesPerRequest = 16;
constexpr std::size_t kQueueSlack = 64 << 10;

}  // namespace

// ---- the node's blocks ---------------------------------------------------------------------------------------------

void Publisher::apply(const Change& what, Nanos now) {
  const auto tier = static_cast<Tiers>(1U << what.tier);
  switch (what.kind) {
    case Change::Kind::kAdded:
      return change(tag_of(what.key), what.parent == key::BlockKey{} ? kFirst : half(tag_of(what.parent)), tier, 0,
                    now);
    case Change::Kind::kRemoved:
      return change(tag_of(what.key), kUnsaid, 0, tier, now);
    case Change::Kind::kCleared:
      blocks_ = ResidencyTable<std::uint8_t>();
      ++table_number_;
      queue_.clear();
      if (told_count_ > 0 && !clear_) {
        clear_ = true;
        waiting_since_ = now;
      }
      told_count_ = 0;
      return;
    case Change::Kind::kRestart:
      return forget_where_blocks_are(now);
    case Change::Kind::kCurrent:
      return;
  }
}

void Publisher::change(Tag tag, Before before, Tiers set, Tiers taken, Nanos now) {
  const std::uint8_t known = blocks_.find(tag);
  const std::uint8_t after = value_of(told(known), static_cast<Tiers>((is(known) | set) & ~taken));
  if (after == known) return;
  store(tag, after, before);
  if (told(known) != is(known) || told(after) == is(after)) return;  // it is in the queue, or need not be
  if (queue_.empty() && !clear_) waiting_since_ = now;
  queue_.push_back({tag, before});
  // Blocks that come and go between two batches leave places behind them.
  if (queue_.size() > 2 * blocks_.size() + kQueueSlack) queue_all(now);
}

void Publisher::rewrite() {
  blocks_ = blocks_.rewritten();
  ++table_number_;
}

void Publisher::store(Tag tag, std::uint8_t value, Before before) {
  if (value == 0 ? blocks_.sparse() && !building_ : blocks_.full()) rewrite();
  blocks_.set(tag, value, before);
}

void Publisher::forget_where_blocks_are(Nanos now) {
  std::vector<Tag> untold;
  blocks_.walk(0, blocks_.end(), [&](Tag tag, std::uint8_t& value, Before) {
    if (told(value) == 0) {
      untold.push_back(tag);
    } else {
      value = value_of(told(value), 0);
    }
  });
  for (const Tag tag : untold) blocks_.erase(tag);
  queue_all(now);
}

void Publisher::queue_all(Nanos now) {
  if (queue_.empty() && !clear_) waiting_since_ = now;
  queue_.clear();
  rewrite();
  blocks_.walk(0, blocks_.end(), [&](Tag tag, std::uint8_t value, Before before) {
    if (told(value) != is(value)) queue_.push_back({tag, before});
  });
}

void Publisher::move_to(Places places, Nanos now) {
  places_ = std::move(places);
  std::vector<Tag> gone;
  blocks_.walk(0, blocks_.end(), [&](Tag tag, std::uint8_t& value, Before) {
    if (is(value) == 0) {
      gone.push_back(tag);
    } else {
      value = value_of(0, is(value));
    }
  });
  for (const Tag tag : gone) blocks_.erase(tag);
  told_count_ = 0;
  clear_ = false;
  unacknowledged_.clear();
  building_.reset();
  announced_ = {};
  cut_ = acknowledged_ = generation_ = kept_from_ = trim_to_ = bytes_since_base_ = 0;
  asked_ = false;
  queue_all(now);
}

// ---- the stream ----------------------------------------------------------------------------------------------------

Nanos Publisher::due(Nanos now) const {
  if (!unacknowledged_.empty() || trim_to_ > kept_from_) return now;
  if (queue_.empty() && !clear_) return kForever;
  return queue_.size() >= limits_.batch_max ? now : waiting_since_ + limits_.publish_after;
}

void Publisher::cut_batches() {
  std::size_t at = 0;
  while (unacknowledged_.size() < kBatchesPerRequest && (at < queue_.size() || clear_)) {
    Batch batch;
    batch.cleared = std::exchange(clear_, false);
    for (; at < queue_.size() && batch.residencies.size() < limits_.batch_max; ++at) {
      const auto [tag, before] = queue_[at];
      const std::uint8_t value = blocks_.find(tag);
      if (told(value) == is(value)) continue;
      batch.residencies.push_back({tag, is(value), is(value) == 0 ? kUnsaid : before});
      if (told(value) == 0) ++told_count_;
      if (is(value) == 0) --told_count_;
      store(tag, value_of(is(value), is(value)), before);
    }
    if (batch.residencies.empty() && !batch.cleared) break;
    batch.number = ++cut_;
    std::string bytes = encode_batch(batch, places_.stream);
    bytes_since_base_ += bytes.size();
    all_bytes_[0] += bytes.size();
    unacknowledged_.push_back({batch.number, std::move(bytes)});
  }
  queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(at));
}

meta::Request Publisher::publish_request(Nanos now, Nanos ttl) {
  FLEXKV_ASSERT(due(now) <= now);
  // What may have been carried out is repeated as it was: the store takes each number once.
  if (unacknowledged_.empty()) cut_batches();
  meta::Request request;
  for (const Sent& sent : unacknowledged_) request.push_back(meta::append(places_.stream, sent.number, sent.bytes));
  if (trim_to_ > kept_from_) request.push_back(meta::trim(places_.stream, cut_ - trim_to_));
  request.push_back(meta::touch(places_.stream, ttl));
  return request;
}

void Publisher::published() {
  unacknowledged_.clear();
  acknowledged_ = cut_;
  kept_from_ = trim_to_;
  announced_.head = acknowledged_;
}

// ---- the snapshot --------------------------------------------------------------------------------------------------

void Publisher::ask(std::uint64_t generation, Nanos now) {
  if (generation != announced_.generation || now < deaf_until_) return;
  deaf_until_ = now + kAskGap;
  (building_ ? was_asked_ : asked_) = true;
}

bool Publisher::snapshot_due() const {
  return building_.has_value() || asked_ ||
         bytes_since_base_ > std::max<std::uint64_t>(limits_.snapshot_bytes_min, told_count_ * sizeof(Tag));
}

meta::Request Publisher::snapshot_request(Nanos ttl) {
  if (!building_ || building_->table_number != table_number_) {
    // What is told from here on is in the stream behind the base. What is told before is in the parts, each as it is
    // when its turn comes: a block that has changed meanwhile is in the stream, too, and that counts.
    if (!building_) was_asked_ = false;
    was_asked_ = was_asked_ || std::exchange(asked_, false);
    rewrite();
    building_ = Building{cut_, ++generation_, table_number_, 0, 0, blocks_.end(), {}, false};
    bytes_since_base_ = 0;
  }
  const std::string place = snapshot_place(building_->generation);
  // A part whose fate is unknown is repeated as it was: should the first one arrive last, it must not leave a hole
  // before the part behind it.
  if (building_->bytes.empty()) make_part(place);
  return {meta::put_part(place, building_->part, building_->bytes), meta::touch(place, ttl)};
}

void Publisher::make_part(const std::string& place) {
  Batch part;
  part.number = building_->part;
  std::size_t& next = building_->next;
  for (; next < building_->end && part.residencies.size() < limits_.part_max; ++next) {
    blocks_.walk(next, next + 1, [&](Tag tag, std::uint8_t value, Before before) {
      if (told(value) != 0) part.residencies.push_back({tag, told(value), before});
    });
  }
  building_->last = next == building_->end;
  building_->bytes = encode_batch(part, place);
  all_bytes_[1] += building_->bytes.size();
}

bool Publisher::part_written() {
  FLEXKV_ASSERT(building_.has_value());
  building_->bytes.clear();
  ++building_->part;
  if (!building_->last) return false;
  // Who is behind the snapshot before this one would not catch up faster through the stream.
  trim_to_ = announced_.base;
  announced_.generation = building_->generation;
  announced_.base = building_->base;
  announced_.part_count = building_->part;
  building_.reset();
  return true;
}

void Publisher::touch(Nanos ttl, meta::Request& out) const {
  out.push_back(meta::touch(places_.stream, ttl));
  if (announced_.generation > 0) out.push_back(meta::touch(snapshot_place(announced_.generation), ttl));
  if (building_) out.push_back(meta::touch(snapshot_place(building_->generation), ttl));
}

}  // namespace flexkv::cluster
