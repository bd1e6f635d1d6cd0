#include "flexkv/cluster/residency_table.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

using Table = ResidencyTable<std::uint8_t>;
using WideTable = ResidencyTable<std::uint32_t>;
using Model = std::map<Tag, std::uint8_t>;

Model content(const Table& table) {
  Model all;
  table.walk(0, table.end(), [&](Tag tag, std::uint8_t value, Before) { RC_ASSERT(all.emplace(tag, value).second); });
  return all;
}

// Few different tags, of which many have the same home, some the same half, said to follow anything, and far more
// changes than places.
RC_GTEST_PROP(ResidencyTable, IsAMap, ()) {
  Table table;
  Model model;
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  const std::uint64_t tags = *rc::gen::inRange<std::uint64_t>(1, 400);
  const bool crowded = *rc::gen::arbitrary<bool>();
  const auto tag_of_number = [&](std::uint64_t number) {
    return crowded ? number / 2 | (number % 2) << 32 : Prng::mix(number);
  };
  for (int i = 0; i < 3000; ++i) {
    const std::uint64_t number = random.below(tags);
    const Tag tag = tag_of_number(number);
    const auto value = static_cast<std::uint8_t>(random.below(3));
    if (value != 0 && table.full()) table = table.rewritten();
    table.set(tag, value, half(tag_of_number(random.below(2) == 0 ? number - 1 : random.below(tags))));
    model.erase(tag);
    if (value != 0) model[tag] = value;
    RC_ASSERT(table.find(tag) == value);
    RC_ASSERT(table.size() == model.size());
    if (table.sparse()) table = table.rewritten();
  }
  RC_ASSERT(content(table) == model);
  for (std::uint64_t n = 0; n < tags; ++n) {
    const Tag tag = tag_of_number(n);
    RC_ASSERT(table.find(tag) == (model.contains(tag) ? model[tag] : 0));
  }
}

// A prompt's keys, as far as `values` has them without a gap.
std::size_t known_prefix(const Model& values, std::span<const key::BlockKey> keys) {
  const auto gap = std::ranges::find_if(keys, [&](const auto& key) { return !values.contains(tag_of(key)); });
  return static_cast<std::size_t>(gap - keys.begin());
}

// Whom a block is said to follow: the truth, nothing, or something else.
Before said_of(Prng& random, std::span<const key::BlockKey> prompt, std::size_t at) {
  switch (random.below(12)) {
    case 0:
      return kUnsaid;
    case 1:
      return kFirst;
    case 2:
      return half(tag_of(prompt[random.below(prompt.size())]));
    default:
      return at == 0 ? kFirst : half(tag_of(prompt[at - 1]));
  }
}

// Prompts that branch off each other, saved in pieces that mix, thinned out, saved again: with holes anywhere, as a
// node that evicts and a reader that left something out have them.
RC_GTEST_PROP(ResidencyTable, RunsMakeUpTheKnownPrefixWhateverIsMissing, ()) {
  Table table;
  Model model;
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  std::vector<std::vector<key::BlockKey>> prompts;
  for (int p = 0; p < 6; ++p) {
    std::vector<key::BlockKey> keys;
    if (p > 0) keys.assign(prompts[0].begin(), prompts[0].begin() + static_cast<std::ptrdiff_t>(random.below(200)));
    while (keys.size() < 200) keys.push_back({random.next(), random.next()});
    prompts.push_back(std::move(keys));
  }
  std::vector<std::size_t> saved(prompts.size(), 0);
  for (int turn = 0; turn < 120; ++turn) {
    const std::size_t p = random.below(prompts.size());
    const auto& prompt = prompts[p];
    const bool grows = random.below(2) == 0;
    const std::size_t first = grows ? saved[p] : random.below(prompt.size());
    const std::size_t count = random.below(random.below(6) == 0 ? prompt.size() : 9) + 1;
    const auto value = static_cast<std::uint8_t>(grows ? 1 : random.below(4));
    const std::size_t end = std::min(first + count, prompt.size());
    if (grows) saved[p] = end;
    for (std::size_t i = first; i < end; ++i) {
      if (table.full() || table.sparse() || random.below(400) == 0) table = table.rewritten();
      const Tag tag = tag_of(prompt[i]);
      table.set(tag, value, said_of(random, prompt, i));
      model.erase(tag);
      if (value != 0) model[tag] = value;
    }
    for (const auto& keys : prompts) {
      const std::size_t from = random.below(2) == 0 ? 0 : random.below(keys.size());
      auto left = std::span(keys).subspan(from);
      const std::size_t known = known_prefix(model, left);
      std::size_t found = 0;
      const std::size_t likely = random.below(300);
      for (auto run = table.run(left, likely); !run.values.empty(); run = table.run(left, likely, run.next)) {
        for (std::size_t i = 0; i < run.values.size(); ++i) RC_ASSERT(run.values[i] == model[tag_of(left[i])]);
        found += run.values.size();
        left = left.subspan(run.values.size());
      }
      RC_ASSERT(found == known);
    }
  }
  RC_ASSERT(content(table) == model);
}

std::vector<key::BlockKey> some_keys(std::size_t count, std::uint64_t first = 0) {
  std::vector<key::BlockKey> keys;
  for (std::uint64_t k = first; k < first + count; ++k) keys.push_back({k, Prng::mix(k + 1)});
  return keys;
}

// The runs that make up a prompt.
std::size_t run_count(const Table& table, std::span<const key::BlockKey> keys) {
  std::size_t count = 0;
  for (auto run = table.run(keys, 1); !run.values.empty(); run = table.run(keys, 1, run.next)) {
    ++count;
    keys = keys.subspan(run.values.size());
  }
  EXPECT_TRUE(keys.empty());
  return count;
}

TEST(ResidencyTable, WhatCameInARowIsOneRunAlsoInATableOfAnotherSize) {
  const auto keys = some_keys(1000);
  Table table(2 * keys.size());
  for (const auto& key : keys) {
    table.set(~tag_of(key), 1);
    table.set(~tag_of(key), 0);
  }
  table = table.rewritten();
  for (const auto& key : keys) {
    if (table.full()) table = table.rewritten();
    table.set(tag_of(key), 1);
  }
  EXPECT_EQ(table.run(keys, 1).values.size(), keys.size());
  EXPECT_EQ(table.run(std::span(keys).subspan(300), 700).values.size(), keys.size() - 300);
  EXPECT_EQ(table.rewritten().run(keys, 2000).values.size(), keys.size());
  table.set(tag_of(keys[700]), 0);
  EXPECT_EQ(table.run(keys, 1).values.size(), 700U);
}

// Prompts that grow in turns, a piece at a time.
TEST(ResidencyTable, WhatCameInPiecesLiesInAFewChunksAndInOneOnceRewritten) {
  constexpr std::size_t kPrompts = 20;
  constexpr std::size_t kBlocks = 512;
  for (const std::size_t piece : {1U, 4U, 32U}) {
    Table table(2 * kPrompts * kBlocks);
    for (std::size_t at = 0; at < kBlocks; at += piece) {
      for (std::size_t p = 0; p < kPrompts; ++p) {
        const auto keys = some_keys(kBlocks, p * kBlocks);
        for (std::size_t i = at; i < at + piece; ++i) {
          table.set(tag_of(keys[i]), 1, i == 0 ? kFirst : half(tag_of(keys[i - 1])));
        }
      }
    }
    for (std::size_t p = 0; p < kPrompts; ++p) EXPECT_LE(run_count(table, some_keys(kBlocks, p * kBlocks)), 15U);
    EXPECT_LE(table.end(), kPrompts * kBlocks * 3 / 2) << "places that wait";
    table = table.rewritten();
    for (std::size_t p = 0; p < kPrompts; ++p) EXPECT_EQ(run_count(table, some_keys(kBlocks, p * kBlocks)), 1U);
    EXPECT_EQ(table.end(), kPrompts * (kBlocks + 1));
  }
}

// A turn's blocks that were evicted come back to their places.
TEST(ResidencyTable, ARowGrowsAgainWhereItWasCutOff) {
  const auto keys = some_keys(300);
  Table table(400);
  const auto set = [&](std::size_t first, std::size_t end, std::uint8_t value) {
    for (std::size_t i = first; i < end; ++i) {
      table.set(tag_of(keys[i]), value, i == 0 ? kFirst : half(tag_of(keys[i - 1])));
    }
  };
  set(0, 300, 1);
  const std::size_t end = table.end();
  set(200, 300, 0);
  set(200, 300, 2);
  EXPECT_EQ(table.end(), end);
  EXPECT_EQ(table.run(keys, 1).values.size(), keys.size());
}

TEST(ResidencyTable, ARewriteMayLeaveBlocksOutAndChangeValues) {
  const auto keys = some_keys(100);
  WideTable table;
  for (std::size_t i = 0; i < 99; ++i) table.set(tag_of(keys[i]), static_cast<std::uint32_t>(1'000'000 + i));
  const auto other = table.rewritten([](std::uint32_t value) { return value % 2 == 0 ? 0U : value + 1'000'000; });
  EXPECT_EQ(other.size(), 49U);
  for (std::size_t i = 0; i < 99; ++i) EXPECT_EQ(other.find(tag_of(keys[i])), i % 2 == 0 ? 0U : 2'000'000 + i);
}

// The halves of a tag are kept apart, and only the end of a run is compared in full.
TEST(ResidencyTable, ABlockWithHalfTheTagOfTheNextOneIsNotTakenForIt) {
  auto keys = some_keys(40);
  Table table;
  for (const auto& key : keys) table.set(tag_of(key), 1);
  keys[25].low ^= 1ULL << 40;
  EXPECT_EQ(table.run(std::span(keys).first(26), 26).values.size(), 25U);
  keys[25].low ^= 1ULL << 40 | 1;
  EXPECT_EQ(table.run(keys, 1).values.size(), 25U);
}

// At its largest: half of the places are of blocks that are gone, and the next one asks for another table.
TEST(ResidencyTable, TakesAsMuchMemoryAsItSays) {
  constexpr std::size_t kBlocks = 100'000;
  Table table(kBlocks);
  for (std::uint64_t k = 0; k < kBlocks; ++k) table.set(Prng::mix(k), 1);
  EXPECT_LE(table.memory_bytes(), kBlocks * 163 / 10);
  table = table.rewritten();
  EXPECT_LE(table.memory_bytes(), kBlocks * 198 / 10);
  for (std::uint64_t k = kBlocks; !table.full(); ++k) {
    table.set(Prng::mix(k - kBlocks), 0);
    table.set(Prng::mix(k), 1);
  }
  EXPECT_EQ(table.size(), kBlocks);
  EXPECT_LE(table.memory_bytes(), kBlocks * 243 / 10);
}

}  // namespace
}  // namespace flexkv::cluster
