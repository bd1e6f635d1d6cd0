#include "flexkv/index/policy.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace flexkv::index {

void Policy::link(std::uint32_t id, unsigned list, bool as_oldest) {
  Segment& segment = segments_[id];
  List& l = lists_[list];
  segment.list = static_cast<std::uint8_t>(list);
  segment.listed = true;
  segment.older = as_oldest ? kNone : l.newest;
  segment.newer = as_oldest ? l.oldest : kNone;
  (segment.older == kNone ? l.oldest : segments_[segment.older].newer) = id;
  (segment.newer == kNone ? l.newest : segments_[segment.newer].older) = id;
  l.blocks += segment.count;
  nonempty_ |= std::uint64_t{1} << list;
}

void Policy::unlink(std::uint32_t id) {
  Segment& segment = segments_[id];
  List& l = lists_[segment.list];
  (segment.older == kNone ? l.oldest : segments_[segment.older].newer) = segment.newer;
  (segment.newer == kNone ? l.newest : segments_[segment.newer].older) = segment.older;
  segment.older = segment.newer = kNone;
  segment.listed = false;
  l.blocks -= segment.count;
  if (l.oldest == kNone) nonempty_ &= ~(std::uint64_t{1} << segment.list);
}

void Policy::split(std::uint32_t part, std::uint32_t id) {
  const Segment& segment = segments_[id];
  Segment& p = segments_[part];
  p.used = segment.used;
  p.uses = segment.uses;
  p.list = segment.list;
  if (!segment.listed) return;
  p.listed = true;
  p.older = newest_first_ ? segment.older : id;
  p.newer = newest_first_ ? id : segment.newer;
  List& l = lists_[segment.list];
  (p.older == kNone ? l.oldest : segments_[p.older].newer) = part;
  (p.newer == kNone ? l.newest : segments_[p.newer].older) = part;
  l.blocks += p.count;
}

bool Policy::mergeable(std::uint32_t a, std::uint32_t b) const {
  const Segment& x = segments_[a];
  const Segment& y = segments_[b];
  return x.listed && y.listed && x.list == y.list && x.uses == y.uses && x.used == y.used &&
         (x.newer == b || x.older == b);
}

namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();

// Lists by number of uses, each in order of last use.
class RecencyPolicy : public Policy {
 public:
  struct Shape {
    unsigned list_count = 1;
    unsigned uses_max = 0;
    unsigned uses_per_list = 1;
    // What standing one list higher is worth against having been used later. kForever: lower lists always go first.
    Nanos step = kForever;
    bool newest_first = false;
    // The default policy. Many blocks are never used again, and a block that was is likely to be once more, but for how
    // long to wait for that depends on the size of the tier: so a step is what a block that is not used lives in this
    // tier, as seen at its latest victims. And blocks that come back soon after they were evicted were evicted too
    // early: they continue at the number of uses that they had, plus this one. (The ghosts are those of 2Q and ARC, the
    // reward per hit is FlexKV's; that it follows the eviction age is ours.) bench/index_bench prints what it gains.
    bool adaptive = false;
  };

  RecencyPolicy(Slab<Segment>& segments, const Shape& shape) : Policy(segments, shape.newest_first), shape_(shape) {
    if (shape_.adaptive) shape_.step = 0;
  }

  void insert(std::uint32_t id, unsigned remembered, Nanos now) override {
    Segment& segment = segments_[id];
    segment.used = now;
    segment.uses = static_cast<std::uint8_t>(shape_.adaptive ? std::min(remembered, shape_.uses_max) : 0);
    link(id, list_of(segment), false);
  }

  void touch(std::uint32_t id, bool hit, Nanos now) override {
    Segment& segment = segments_[id];
    if (hit && segment.uses < shape_.uses_max) ++segment.uses;
    segment.used = now;
    move_to_newest(id, list_of(segment));
  }

  std::uint32_t victim(Nanos now) override {
    if (nonempty_ == 0) return kNone;
    unsigned chosen = static_cast<unsigned>(std::countr_zero(nonempty_));
    if (shape_.step != kForever) {
      Nanos earliest = kForever;
      for (std::uint64_t left = nonempty_; left != 0; left &= left - 1) {
        const auto list = static_cast<unsigned>(std::countr_zero(left));
        const Nanos worth = segments_[first(list)].used + shape_.step * list;
        if (worth < earliest) earliest = worth, chosen = list;
      }
    }
    const std::uint32_t id = first(chosen);
    if (shape_.adaptive && chosen == 0) {
      const Nanos age = now - segments_[id].used;
      shape_.step = shape_.step == 0 ? age : shape_.step + (age - shape_.step) / kAgesAveraged;
    }
    return id;
  }

  bool heeds_memory() const override { return shape_.adaptive; }

 private:
  static constexpr Nanos kAgesAveraged = 64;

  unsigned list_of(const Segment& segment) const {
    return std::min(segment.uses / shape_.uses_per_list, shape_.list_count - 1);
  }

  Shape shape_;
};

class ArrivalPolicy : public Policy {
 public:
  ArrivalPolicy(Slab<Segment>& segments, bool newest_first) : Policy(segments, newest_first) {}

  void insert(std::uint32_t id, unsigned, Nanos) override { link(id, 0, false); }
  void touch(std::uint32_t, bool, Nanos) override {}
  std::uint32_t victim(Nanos) override { return first(0); }
  bool heeds_touch() const override { return false; }
};

// New blocks pass through a small queue that takes a tenth of the tier; those used at least twice there, or remembered,
// get into the main queue, which gives every block up to three more rounds.
class S3FifoPolicy : public Policy {
 public:
  explicit S3FifoPolicy(Slab<Segment>& segments) : Policy(segments, false) {}

  void insert(std::uint32_t id, unsigned remembered, Nanos) override {
    link(id, remembered > 0 ? kMain : kSmall, false);
  }
  void touch(std::uint32_t id, bool hit, Nanos) override {
    Segment& segment = segments_[id];
    if (hit && segment.uses < kUsesMax) ++segment.uses;
  }
  std::uint32_t victim(Nanos) override {
    while (true) {
      const std::int64_t all = lists_[kSmall].blocks + lists_[kMain].blocks;
      const bool small = first(kSmall) != kNone && (lists_[kSmall].blocks * 10 >= all || first(kMain) == kNone);
      const std::uint32_t id = first(small ? kSmall : kMain);
      if (id == kNone) return kNone;
      Segment& segment = segments_[id];
      if (small ? segment.uses < kUsesToMain : segment.uses == 0) return id;
      segment.uses = small ? 0 : static_cast<std::uint8_t>(segment.uses - 1);
      move_to_newest(id, kMain);
    }
  }
  bool heeds_memory() const override { return true; }

 private:
  static constexpr unsigned kSmall = 0;
  static constexpr unsigned kMain = 1;
  static constexpr unsigned kUsesMax = 3;
  static constexpr unsigned kUsesToMain = 2;
};

}  // namespace

std::unique_ptr<Policy> make_policy(const PolicyOptions& options, Slab<Segment>& segments) {
  auto recency = [&](RecencyPolicy::Shape shape) { return std::make_unique<RecencyPolicy>(segments, shape); };
  switch (options.kind) {
    case PolicyKind::kAdaptive:
      return recency({.list_count = 5, .uses_max = 4, .adaptive = true});
    case PolicyKind::kLru:
      return recency({});
    case PolicyKind::kHitReward:
      return recency({.list_count = 16, .uses_max = 15, .step = options.hit_reward});
    case PolicyKind::kLfu:
      return recency({.list_count = 64, .uses_max = 63});
    case PolicyKind::kSlru:
      FLEXKV_ASSERT(options.protected_after > 0 && options.protected_after < 64);
      return recency({.list_count = 2, .uses_max = options.protected_after, .uses_per_list = options.protected_after});
    case PolicyKind::kMru:
      return recency({.newest_first = true});
    case PolicyKind::kFifo:
      return std::make_unique<ArrivalPolicy>(segments, false);
    case PolicyKind::kFilo:
      return std::make_unique<ArrivalPolicy>(segments, true);
    case PolicyKind::kS3Fifo:
      return std::make_unique<S3FifoPolicy>(segments);
  }
  FLEXKV_ASSERT(false);
}

}  // namespace flexkv::index
