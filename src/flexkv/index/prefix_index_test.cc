#include "flexkv/index/prefix_index.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "flexkv/base/prng.h"
#include "flexkv/index/naive_index.h"

namespace flexkv::index {
namespace {

using Keys = std::vector<key::BlockKey>;
using Evicted = PrefixIndex::Evicted;

// A chained key: it depends on the one before it.
key::BlockKey next_key(const key::BlockKey& previous, std::uint64_t content) {
  const std::uint64_t low = Prng::mix(previous.low * 3 + content + 1);
  return {Prng::mix(low + previous.high), low};
}

Keys path(std::initializer_list<std::pair<std::uint64_t, std::uint32_t>> parts) {
  Keys keys;
  for (const auto& [content, count] : parts) {
    for (std::uint32_t i = 0; i < count; ++i) {
      keys.push_back(next_key(keys.empty() ? key::BlockKey{} : keys.back(), content));
    }
  }
  return keys;
}

bool same(std::vector<Evicted> a, std::vector<Evicted> b, bool in_order) {
  auto less = [](const Evicted& x, const Evicted& y) { return std::tie(x.tier, x.slot) < std::tie(y.tier, y.slot); };
  if (!in_order) std::sort(a.begin(), a.end(), less), std::sort(b.begin(), b.end(), less);
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Evicted& x, const Evicted& y) {
    return x.key == y.key && x.slot == y.slot && x.tier == y.tier;
  });
}

// Drives an index and the naive one with the same random operations and compares all that they answer.
constexpr std::uint64_t kSeeds = 60;

class Pair {
 public:
  Pair(const PrefixIndex::Options& options, std::uint64_t seed, bool exact_order, bool with_drops)
      : options_(options), index_(options), naive_(options), prng_(seed), exact_(exact_order), drops_(with_drops) {}

  void step() {
    now_ += static_cast<Nanos>(prng_.below(3)) * kSecond;
    switch (prng_.below(12)) {
      case 0:
      case 1:
      case 2:
        add_pin();
        break;
      case 3:
        extend_pin();
        break;
      case 4:
      case 5:
      case 6:
        insert();
        break;
      case 7:
        add_residency();
        break;
      case 8:
        evict(1 + static_cast<std::uint32_t>(prng_.below(12)));
        break;
      case 9:
        if (drops_) drop();
        break;
      default:
        unpin();
        break;
    }
    while (pins_.size() > pins_max_) unpin();
    for (Tier tier = 0; tier < options_.tier_count; ++tier) {
      if (index_.block_count(tier) > 200) evict(50);
    }
    check();
  }

  void clear() {
    std::vector<Evicted> out, expected;
    index_.clear(now_, out);
    naive_.clear(expected);
    ASSERT_TRUE(same(out, expected, false));
    check();
  }

  void drain() {
    while (!pins_.empty()) unpin();
    for (Tier tier = 0; tier < options_.tier_count; ++tier) {
      evict(UINT32_MAX);
      ASSERT_EQ(index_.block_count(tier), 0u);
    }
    ASSERT_EQ(index_.run_count(), 0u);
    ASSERT_EQ(index_.segment_count(), 0u);
    check();
  }

  void set_pins_max(std::size_t count) { pins_max_ = count; }
  void unpin_before_evictions() { pins_in_evictions_ = false; }

 private:
  struct BothPins {
    PinId id;
    NaiveIndex::Block* block;
  };

  // A path in a bushy tree, so that lookups meet known prefixes and inserts split runs.
  Keys some_keys(const key::BlockKey& from) {
    Keys keys;
    const auto count = prng_.below(24);
    std::uint64_t content = prng_.below(3);
    for (std::uint64_t i = 0; i < count; ++i) {
      if (prng_.chance(8)) content = prng_.below(3);
      keys.push_back(next_key(keys.empty() ? from : keys.back(), content));
    }
    return keys;
  }
  BothPins& some_pin() {
    if (pins_.empty()) add_pin();
    return pins_[prng_.below(pins_.size())];
  }
  std::vector<Slot> new_slots(std::size_t count) {
    std::vector<Slot> slots(count);
    for (auto& slot : slots) slot = next_slot_++;
    return slots;
  }

  void add_pin() {
    const Keys keys = some_keys({});
    const bool touch = prng_.chance(70);
    NaiveIndex::Block* block = naive_.root();
    const auto expected = naive_.extend(block, keys, touch, now_);
    const auto match = index_.match(keys, touch, now_);
    ASSERT_EQ(match.block_count, expected);
    naive_.pin(block);
    pins_.push_back({match.pin, block});
    if (prng_.chance(10)) {
      naive_.pin(block);
      pins_.push_back({index_.clone(match.pin), block});
    }
  }
  void move(BothPins& pin, NaiveIndex::Block* to) {
    naive_.pin(to);
    --pin.block->pins;  // never the last on its path: the new one is the same or behind it
    pin.block = to;
  }
  void extend_pin() {
    BothPins& pin = some_pin();
    const Keys keys = some_keys(pin.block->key);
    const bool touch = prng_.chance(70);
    NaiveIndex::Block* block = pin.block;
    const auto expected = naive_.extend(block, keys, touch, now_);
    const auto match = index_.extend(pin.id, keys, touch, now_);
    pin.id = match.pin;
    ASSERT_EQ(match.block_count, expected);
    move(pin, block);
  }
  void insert() {
    BothPins& pin = some_pin();
    const Keys keys = some_keys(pin.block->key);
    const auto slots = new_slots(keys.size());
    const auto tier = static_cast<Tier>(prng_.below(options_.tier_count));
    std::vector<Slot> rejected, expected;
    NaiveIndex::Block* block = pin.block;
    naive_.insert(block, tier, keys, slots, now_, expected);
    index_.insert(pin.id, tier, keys, slots, now_, rejected);
    ASSERT_EQ(rejected, expected);
    move(pin, block);
  }
  void add_residency() {
    BothPins& pin = some_pin();
    const auto first = static_cast<std::uint32_t>(prng_.below(pin.block->depth + 1));
    const auto slots = new_slots(prng_.below(pin.block->depth - first + 1));
    const auto tier = static_cast<Tier>(prng_.below(options_.tier_count));
    std::vector<Slot> rejected, expected;
    naive_.add_residency(pin.block, tier, first, slots, now_, expected);
    index_.add_residency(pin.id, tier, first, slots, now_, rejected);
    ASSERT_EQ(rejected, expected);
  }
  void drop() {
    BothPins& pin = some_pin();
    if (pin.block->depth == 0) return;
    const auto at = static_cast<std::uint32_t>(prng_.below(pin.block->depth));
    const auto tier = static_cast<Tier>(prng_.below(options_.tier_count));
    const Slot expected = naive_.drop(pin.block, tier, at);
    ASSERT_EQ(index_.drop(pin.id, tier, at, MissReason::kDamaged), expected);
  }
  void evict(std::uint32_t count) {
    const auto tier = static_cast<Tier>(prng_.below(options_.tier_count));
    evict(tier, count);
    if (count == UINT32_MAX) {
      for (Tier t = 0; t < options_.tier_count; ++t) evict(t, count);
    }
  }
  void evict(Tier tier, std::uint32_t count) {
    while (!pins_in_evictions_ && !pins_.empty()) unpin();
    std::vector<Evicted> out, expected;
    const std::uint32_t taken = index_.evict(tier, count, now_, out);
    ASSERT_EQ(taken, out.size());
    if (exact_) {
      ASSERT_EQ(naive_.evict(tier, count, expected), taken);
      ASSERT_TRUE(same(out, expected, true));
    } else {
      naive_.take(tier, out);  // asserts that each may go
      ASSERT_EQ(naive_.may_still_go(tier) && taken < count, false);
    }
  }
  void unpin() {
    if (pins_.empty()) return;
    std::swap(some_pin(), pins_.back());
    std::vector<Evicted> out, expected;
    index_.unpin(pins_.back().id, out);
    naive_.unpin(pins_.back().block, expected);
    ASSERT_TRUE(same(out, expected, false));
    pins_.pop_back();
  }

  void check() {
    index_.check_invariants();
    ASSERT_EQ(index_.pin_count(), pins_.size());
    for (Tier tier = 0; tier < options_.tier_count; ++tier) {
      ASSERT_EQ(index_.block_count(tier), naive_.block_count(tier));
    }
    for (const BothPins& pin : pins_) {
      ASSERT_EQ(index_.depth(pin.id), pin.block->depth);
      const Tier tier = static_cast<Tier>(prng_.below(options_.tier_count));
      const auto first = static_cast<std::uint32_t>(prng_.below(pin.block->depth + 1));
      std::vector<Slot> slots(prng_.below(pin.block->depth - first + 1));
      index_.collect(pin.id, tier, first, slots);
      for (std::uint32_t i = 0; i < slots.size(); ++i) ASSERT_EQ(slots[i], naive_.slot(pin.block, tier, first + i));
    }
  }

  const PrefixIndex::Options options_;
  PrefixIndex index_;
  NaiveIndex naive_;
  Prng prng_;
  const bool exact_;
  const bool drops_;
  std::size_t pins_max_ = 12;
  bool pins_in_evictions_ = true;
  Nanos now_ = 0;
  Slot next_slot_ = 0;
  std::vector<BothPins> pins_;
};

PrefixIndex::Options options_for(PolicyKind kind, unsigned tier_count) {
  PrefixIndex::Options options;
  options.tier_count = tier_count;
  options.ghost_count_max = 512;
  for (auto& policy : options.policy) policy = {.kind = kind, .protected_after = 2, .hit_reward = 5 * kSecond};
  return options;
}

// How far the naive index knows the order. Blocks that were set aside because of a pin come back with the rest of their
// segment, and the naive index has no segments: that shows where ancestors need not be the younger ones (policies that
// heed no touch, or drops). The last two policies keep state of their own.
enum class Order { kExact, kExactWithoutPins, kValid };

struct ModelCase {
  PolicyKind kind;
  const char* name;
  Order order;
};

class AgainstNaive : public testing::TestWithParam<ModelCase> {};

TEST_P(AgainstNaive, RandomOperations) {
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const bool drops = seed % 4 == 0;
    const bool without_pins = GetParam().order != Order::kValid && seed % 2 == 0;
    const bool exact = GetParam().order == Order::kExact || without_pins;
    Pair pair(options_for(GetParam().kind, 1 + static_cast<unsigned>(seed % 3)), seed, exact, drops);
    if (without_pins) pair.unpin_before_evictions();
    if (seed % 3 == 0) pair.set_pins_max(3);
    for (int i = 0; i < 400 && !HasFatalFailure(); ++i) {
      pair.step();
      if (i == 250 && seed % 5 == 0) pair.clear();
    }
    if (HasFatalFailure()) return;
    pair.drain();
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, AgainstNaive,
                         testing::Values(ModelCase{PolicyKind::kLru, "Lru", Order::kExact},
                                         ModelCase{PolicyKind::kHitReward, "HitReward", Order::kExact},
                                         ModelCase{PolicyKind::kLfu, "Lfu", Order::kExact},
                                         ModelCase{PolicyKind::kSlru, "Slru", Order::kExact},
                                         ModelCase{PolicyKind::kFifo, "Fifo", Order::kExactWithoutPins},
                                         ModelCase{PolicyKind::kFilo, "Filo", Order::kExactWithoutPins},
                                         ModelCase{PolicyKind::kMru, "Mru", Order::kExactWithoutPins},
                                         ModelCase{PolicyKind::kAdaptive, "Adaptive", Order::kValid},
                                         ModelCase{PolicyKind::kS3Fifo, "S3Fifo", Order::kValid}),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(PrefixIndex, MixedPoliciesPerTierAgainstNaive) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    auto options = options_for(PolicyKind::kLru, 4);
    options.policy[1].kind = PolicyKind::kSlru;
    options.policy[2].kind = PolicyKind::kLfu;
    options.policy[3].kind = PolicyKind::kHitReward;
    Pair pair(options, seed, true, false);
    for (int i = 0; i < 150; ++i) pair.step();
    pair.drain();
    RC_ASSERT(!testing::Test::HasFatalFailure());
  }));
}

std::vector<Slot> numbered(std::size_t count, Slot first = 0) {
  std::vector<Slot> slots(count);
  for (std::size_t i = 0; i < count; ++i) slots[i] = first + static_cast<Slot>(i);
  return slots;
}

// Inserts a path as a request does: match, insert what is missing, unpin. Returns the number of blocks matched.
std::uint32_t request(PrefixIndex& index, const Keys& keys, Nanos now) {
  std::vector<Slot> rejected;
  std::vector<Evicted> freed;
  const auto [matched, pin] = index.match(keys, true, now);
  const auto missing = std::span(keys).subspan(matched);
  index.insert(pin, 0, missing, numbered(missing.size()), now, rejected);
  index.unpin(pin, freed);
  return matched;
}

// Block-level LRU, leaves first, without any of the index's notions: a block has a time of last use, and the one that
// has the earliest and no child in the cache goes.
TEST(PrefixIndex, LruHitsAreThoseOfAnExactLru) {
  EXPECT_TRUE(rc::check([](std::uint64_t seed) {
    constexpr std::size_t kCapacity = 150;
    Prng prng(seed);
    PrefixIndex index(options_for(PolicyKind::kLru, 1));
    struct Block {
      std::uint64_t used;
      std::uint64_t parent;
    };
    std::map<std::uint64_t, Block> cached;  // by key.low
    for (std::uint64_t now = 1; now <= 150; ++now) {
      const Keys keys = path({{prng.below(2), static_cast<std::uint32_t>(prng.below(30))},
                              {2 + prng.below(6), static_cast<std::uint32_t>(prng.below(30))}});
      std::uint32_t expected = 0;
      while (expected < keys.size() && cached.contains(keys[expected].low)) cached[keys[expected++].low].used = now;
      for (std::size_t i = expected; i < keys.size(); ++i) cached[keys[i].low] = {now, i == 0 ? 0 : keys[i - 1].low};
      while (cached.size() > kCapacity) {
        std::set<std::uint64_t> parents;
        for (const auto& [key, block] : cached) parents.insert(block.parent);
        auto victim = cached.end();
        for (auto it = cached.begin(); it != cached.end(); ++it) {
          if (!parents.contains(it->first) && (victim == cached.end() || it->second.used < victim->second.used))
            victim = it;
        }
        cached.erase(victim);
      }
      RC_ASSERT(request(index, keys, static_cast<Nanos>(now)) == expected);
      std::vector<Evicted> freed;
      if (index.block_count(0) > kCapacity) {
        index.evict(0, static_cast<std::uint32_t>(index.block_count(0) - kCapacity), static_cast<Nanos>(now), freed);
      }
    }
  }));
}

TEST(PrefixIndex, ShortTurnsMakeLongRuns) {
  PrefixIndex index(options_for(PolicyKind::kLru, 1));
  const Keys keys = path({{1, 2048}});
  for (std::uint32_t turn = 4; turn <= 2048; turn += 4) {
    request(index, Keys(keys.begin(), keys.begin() + turn), turn);
    EXPECT_LE(index.run_count(), 1 + (turn - 1) / 512);
    EXPECT_EQ(index.segment_count(), index.run_count());
  }
}

TEST(PrefixIndex, SaysWhyABlockIsMissing) {
  PrefixIndex index(options_for(PolicyKind::kLru, 1));
  const Keys keys = path({{1, 4}});
  std::vector<Evicted> freed;
  std::vector<Slot> rejected;
  Nanos gone_at = -1;
  EXPECT_EQ(index.why_missing(keys[0], &gone_at), MissReason::kNeverSeen);
  EXPECT_EQ(gone_at, -1);
  request(index, keys, kSecond);
  index.evict(0, 1, 5 * kSecond, freed);
  EXPECT_EQ(index.why_missing(keys[3], &gone_at), MissReason::kEvicted);
  EXPECT_NEAR(static_cast<double>(gone_at), 5e9, 1024);
  const auto match = index.match(keys, true, 6 * kSecond);
  EXPECT_EQ(match.block_count, 3u);
  EXPECT_EQ(index.drop(match.pin, 0, 2, MissReason::kUnreadable), 2u);
  EXPECT_EQ(index.drop(match.pin, 0, 2, MissReason::kDamaged), kNoSlot);
  EXPECT_EQ(index.why_missing(keys[2], nullptr), MissReason::kUnreadable);
  index.unpin(match.pin, freed);
  EXPECT_EQ(index.block_count(0), 2u);
  index.clear(7 * kSecond, freed);
  EXPECT_EQ(freed.size(), 3u);
  EXPECT_EQ(index.why_missing(keys[0], nullptr), MissReason::kReset);
}

TEST(PrefixIndex, ClearDetachesPinnedBlocksUntilTheirLastUnpin) {
  PrefixIndex index(options_for(PolicyKind::kLru, 1));
  const Keys keys = path({{1, 8}});
  request(index, keys, 1);
  std::vector<Evicted> freed;
  std::vector<Slot> rejected;
  const PinId pin = index.match(std::span(keys).first(5), true, 2).pin;
  const PinId shallow = index.match(std::span(keys).first(2), true, 2).pin;
  index.clear(3, freed);
  EXPECT_EQ(freed.size(), 3u);
  EXPECT_EQ(index.block_count(0), 5u);
  const auto match = index.match(keys, true, 4);
  EXPECT_EQ(match.block_count, 0u);
  std::vector<Slot> slots(5);
  index.collect(pin, 0, 0, slots);
  EXPECT_EQ(slots, numbered(5));
  std::vector<key::BlockKey> path(4);
  index.collect_keys(pin, 1, path);
  EXPECT_TRUE(std::equal(path.begin(), path.end(), keys.begin() + 1));
  EXPECT_EQ(index.extend(pin, std::span(keys).subspan(5), true, 4).block_count, 0u);
  index.insert(pin, 0, std::span(keys).subspan(5), numbered(3, 100), 4, rejected);
  EXPECT_EQ(rejected, numbered(3, 100));
  // The same keys can come back beside the detached ones.
  EXPECT_EQ(request(index, keys, 5), 0u);
  EXPECT_EQ(index.block_count(0), 13u);
  index.check_invariants();
  freed.clear();
  EXPECT_EQ(index.evict(0, 100, 6, freed), 8u);
  freed.clear();
  index.unpin(pin, freed);
  EXPECT_EQ(freed.size(), 3u);
  index.unpin(shallow, freed);
  EXPECT_EQ(freed.size(), 5u);
  index.unpin(match.pin, freed);
  EXPECT_EQ(index.run_count(), 0u);
  index.check_invariants();
}

// While blocks come, go, and runs are divided, a scan finds each that was there when it began and still is.
TEST(PrefixIndex, AScanFindsAllThatStays) {
  std::uint64_t divided = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    Prng prng(seed);
    PrefixIndex::Options options;
    options.tier_count = 2;
    PrefixIndex index(options);
    std::vector<Evicted> out;
    std::vector<Slot> rejected;
    Slot next_slot = 0;
    std::map<Slot, key::BlockKey> kept;  // in tier 1
    const auto insert = [&](Tier tier) {
      Keys keys = path({{prng.below(3), 1 + static_cast<std::uint32_t>(prng.below(12))},
                        {prng.below(4), 1 + static_cast<std::uint32_t>(prng.below(12))}});
      std::vector<Slot> slots;
      for (std::size_t i = 0; i < keys.size(); ++i) slots.push_back(next_slot++);
      const std::uint32_t runs = index.run_count();
      const auto pin = index.match({}, false, 0).pin;
      rejected.clear();
      index.insert(pin, tier, keys, slots, 0, rejected);
      index.unpin(pin, out);
      divided += index.run_count() > runs + 1;
      for (std::size_t i = 0; i < keys.size() && tier == 1; ++i) {
        if (std::ranges::find(rejected, slots[i]) == rejected.end()) kept[slots[i]] = keys[i];
      }
    };
    const auto evict = [&](Tier tier) {
      out.clear();
      index.evict(tier, 1 + static_cast<std::uint32_t>(prng.below(6)), 0, out);
      for (const Evicted& one : out) {
        if (one.tier == 1) kept.erase(one.slot);
      }
    };
    const auto change = [&] {
      const auto tier = static_cast<Tier>(prng.below(2));
      prng.chance(60) ? insert(tier) : evict(tier);
    };
    for (int i = 0; i < 30; ++i) change();
    for (int scan = 0; scan < 3; ++scan) {
      std::map<Slot, key::BlockKey> left = kept;
      index.begin_scan(1);
      for (bool over = false; !over;) {
        const auto found = index.scan(1 + static_cast<std::uint32_t>(prng.below(5)));
        over = found.over;
        if (found.pin) {
          Slot slot = kNoSlot;
          key::BlockKey key;
          const std::uint32_t at = index.depth(*found.pin) - 1;
          index.collect(*found.pin, 1, at, {&slot, 1});
          index.collect_keys(*found.pin, at, {&key, 1});
          ASSERT_EQ(kept.at(slot), key);
          left.erase(slot);
          index.unpin(*found.pin, out);
        }
        if (prng.chance(50)) change();
        std::erase_if(left, [&](const auto& entry) { return !kept.contains(entry.first); });
      }
      ASSERT_TRUE(left.empty()) << "seed " << seed << ", scan " << scan << ": " << left.size() << " not found";
    }
    index.check_invariants();
  }
  EXPECT_GT(divided, 100U) << "hardly any run was divided: this tests nothing";
}

TEST(PrefixIndex, MemoryPerBlockIsBounded) {
  for (const std::uint32_t turn : {32u, 4u}) {
    auto options = options_for(PolicyKind::kAdaptive, 1);
    options.ghost_count_max = 0;
    PrefixIndex one(options);
    options.tier_count = 2;
    PrefixIndex two(options);
    for (std::uint64_t group = 0; group < 3; ++group) {
      for (std::uint32_t blocks = turn; blocks <= 448; blocks += turn) {
        for (std::uint64_t conversation = 0; conversation < 64; ++conversation) {
          const Keys keys = path({{group, 64}, {1000 + conversation, blocks}});
          request(one, keys, kSecond * blocks);
          request(two, keys, kSecond * blocks);
        }
      }
    }
    const auto bytes = [](const PrefixIndex& index) {
      return static_cast<double>(index.memory_bytes()) / static_cast<double>(index.block_count(0));
    };
    EXPECT_LE(bytes(one), 48) << turn;
    EXPECT_LE(bytes(two), bytes(one) + 8) << turn;
    std::vector<Evicted> freed;
    one.evict(0, static_cast<std::uint32_t>(one.block_count(0) * 9 / 10), kSecond * 1000, freed);
    EXPECT_LE(bytes(one), 64) << turn;
    one.check_invariants();
  }
}

}  // namespace
}  // namespace flexkv::index
