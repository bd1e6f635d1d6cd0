#include "flexkv/cluster/residency_table.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

using Model = std::map<Tag, std::uint8_t>;

Model content(const ResidencyTable& table) {
  Model all;
  table.walk(0, table.end(), [&](Tag tag, std::uint8_t value) { RC_ASSERT(all.emplace(tag, value).second); });
  return all;
}

// Few different tags, of which many have the same home, and far more changes than places.
RC_GTEST_PROP(ResidencyTable, IsAMap, ()) {
  ResidencyTable table;
  Model model;
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  const std::uint64_t tags = *rc::gen::inRange<std::uint64_t>(1, 400);
  const bool crowded = *rc::gen::arbitrary<bool>();
  for (int i = 0; i < 3000; ++i) {
    const std::uint64_t number = random.below(tags);
    const Tag tag = crowded ? number : Prng::mix(number);
    const auto value = static_cast<std::uint8_t>(random.below(3));
    if (value != 0 && table.full()) table = table.resized();
    table.set(tag, value);
    model.erase(tag);
    if (value != 0) model[tag] = value;
    RC_ASSERT(table.find(tag) == value);
    RC_ASSERT(table.size() == model.size());
    if (table.sparse()) table = table.resized();
  }
  RC_ASSERT(content(table) == model);
  for (std::uint64_t n = 0; n < tags; ++n) {
    const Tag tag = crowded ? n : Prng::mix(n);
    RC_ASSERT(table.find(tag) == (model.contains(tag) ? model[tag] : 0));
  }
}

// A prompt's keys, as far as `values` has them without a gap.
std::size_t known_prefix(const Model& values, std::span<const key::BlockKey> keys) {
  const auto gap = std::ranges::find_if(keys, [&](const auto& key) { return !values.contains(tag_of(key)); });
  return static_cast<std::size_t>(gap - keys.begin());
}

// Prompts that branch off each other, saved in pieces that mix, thinned out, saved again: with holes anywhere, as a
// node that evicts and a reader that left something out have them.
RC_GTEST_PROP(ResidencyTable, RunsMakeUpTheKnownPrefixWhateverIsMissing, ()) {
  ResidencyTable table;
  Model model;
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  std::vector<std::vector<key::BlockKey>> prompts;
  for (int p = 0; p < 6; ++p) {
    std::vector<key::BlockKey> keys;
    if (p > 0) keys.assign(prompts[0].begin(), prompts[0].begin() + static_cast<std::ptrdiff_t>(random.below(200)));
    while (keys.size() < 200) keys.push_back({random.next(), random.next()});
    prompts.push_back(std::move(keys));
  }
  for (int turn = 0; turn < 60; ++turn) {
    const auto& prompt = prompts[random.below(prompts.size())];
    const std::size_t first = random.below(prompt.size());
    const std::size_t count = random.below(random.below(3) == 0 ? prompt.size() : 9) + 1;
    const auto value = static_cast<std::uint8_t>(random.below(4));
    for (std::size_t i = first; i < std::min(first + count, prompt.size()); ++i) {
      if (table.full() || table.sparse()) table = table.resized();
      const Tag tag = tag_of(prompt[i]);
      table.set(tag, value);
      model.erase(tag);
      if (value != 0) model[tag] = value;
    }
    for (const auto& keys : prompts) {
      const std::size_t from = random.below(keys.size());
      auto left = std::span(keys).subspan(from);
      const std::size_t known = known_prefix(model, left);
      std::size_t found = 0;
      const std::size_t likely = random.below(300);
      for (auto run = table.run(left, likely); !run.empty(); run = table.run(left, likely)) {
        for (std::size_t i = 0; i < run.size(); ++i) RC_ASSERT(run[i] == model[tag_of(left[i])]);
        found += run.size();
        left = left.subspan(run.size());
      }
      RC_ASSERT(found == known);
    }
  }
}

std::vector<key::BlockKey> some_keys(std::size_t count) {
  std::vector<key::BlockKey> keys;
  for (std::uint64_t k = 0; k < count; ++k) keys.push_back({k, Prng::mix(k)});
  return keys;
}

TEST(ResidencyTable, WhatCameInARowIsOneRunAlsoInATableOfAnotherSize) {
  const auto keys = some_keys(1000);
  ResidencyTable table(2 * keys.size());
  for (const auto& key : keys) {
    table.set(~tag_of(key), 1);
    table.set(~tag_of(key), 0);
  }
  table = table.resized();
  for (const auto& key : keys) {
    if (table.full()) table = table.resized();
    table.set(tag_of(key), 1);
  }
  EXPECT_EQ(table.run(keys, 1).size(), keys.size());
  EXPECT_EQ(table.run(std::span(keys).subspan(300), 700).size(), keys.size() - 300);
  EXPECT_EQ(table.resized().run(keys, 2000).size(), keys.size());
  table.set(tag_of(keys[700]), 0);
  EXPECT_EQ(table.run(keys, 1).size(), 700U);
}

// The halves of a tag are kept apart, and only the end of a run is compared in full.
TEST(ResidencyTable, ABlockWithHalfTheTagOfTheNextOneIsNotTakenForIt) {
  auto keys = some_keys(40);
  ResidencyTable table;
  for (const auto& key : keys) table.set(tag_of(key), 1);
  keys[25].low ^= 1ULL << 40;
  EXPECT_EQ(table.run(std::span(keys).first(26), 26).size(), 25U);
  keys[25].low ^= 1ULL << 40 | 1;
  EXPECT_EQ(table.run(keys, 1).size(), 25U);
}

// At its largest: half of the places are of blocks that are gone, and the next one asks for another table.
TEST(ResidencyTable, TakesAsMuchMemoryAsItSays) {
  constexpr std::size_t kBlocks = 100'000;
  ResidencyTable table(kBlocks);
  for (std::uint64_t k = 0; k < kBlocks; ++k) table.set(Prng::mix(k), 1);
  EXPECT_LE(table.memory_bytes(), kBlocks * 163 / 10);
  table = table.resized();
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
