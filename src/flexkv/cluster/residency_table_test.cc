#include "flexkv/cluster/residency_table.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <map>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

using Model = std::map<Tag, std::uint8_t>;

Model content(const ResidencyTable& table) {
  Model all;
  table.walk(0, table.bucket_count(), [&](Tag tag, std::uint8_t value) { RC_ASSERT(all.emplace(tag, value).second); });
  return all;
}

// Few different tags, of which many have the same home, and far more changes than places.
RC_GTEST_PROP(ResidencyTable, IsAMap, ()) {
  ResidencyTable table(ResidencyTable::Order::kOwn);
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

TEST(ResidencyTable, TakesAsMuchMemoryAsItSays) {
  constexpr std::size_t kBlocks = 1'000'000;
  const ResidencyTable table(ResidencyTable::Order::kOwn, kBlocks);
  EXPECT_LE(table.memory_bytes(), kBlocks * 125 / 10);
  EXPECT_FALSE(table.full());
}

}  // namespace
}  // namespace flexkv::cluster
