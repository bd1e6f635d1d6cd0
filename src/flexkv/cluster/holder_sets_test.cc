#include "flexkv/cluster/holder_sets.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <map>
#include <set>
#include <vector>

#include "flexkv/base/prng.h"

namespace flexkv::cluster {
namespace {

using Model = std::map<HolderSets::Holder, Tiers>;

// Some blocks, each with the set of who has it, as a map says it, too.
RC_GTEST_PROP(HolderSets, EachBlockHasTheSetThatItsChangesMake, ()) {
  constexpr std::size_t kBlocks = 30;
  HolderSets sets;
  std::vector<HolderSets::Id> ids(kBlocks, 0);
  std::vector<Model> models(kBlocks);
  Prng random(*rc::gen::arbitrary<std::uint64_t>());
  const std::uint64_t holders = *rc::gen::inRange<std::uint64_t>(1, 20);
  for (int turn = 0; turn < 500; ++turn) {
    const auto holder = static_cast<HolderSets::Holder>(random.below(holders));
    const auto tiers = static_cast<Tiers>(random.below(4));
    const std::size_t first = random.below(kBlocks);
    for (std::size_t b = first; b < std::min(kBlocks, first + 1 + random.below(10)); ++b) {
      const HolderSets::Id after = sets.with(ids[b], holder, tiers);
      if (after != 0) sets.use(after);
      if (ids[b] != 0) sets.drop(ids[b]);
      ids[b] = after;
      models[b].erase(holder);
      if (tiers != 0) models[b][holder] = tiers;
    }
  }
  std::set<Model> different;
  for (std::size_t b = 0; b < kBlocks; ++b) {
    Model model;
    for (const auto& [holder, tiers] : sets.members(ids[b])) model[holder] = static_cast<Tiers>(tiers);
    RC_ASSERT(model == models[b]);
    RC_ASSERT((ids[b] == 0) == model.empty());
    for (HolderSets::Holder h = 0; h < holders; ++h) {
      RC_ASSERT(sets.tiers(ids[b], h) == (model.contains(h) ? model[h] : 0));
    }
    for (std::size_t other = 0; other < b; ++other) RC_ASSERT((ids[b] == ids[other]) == (models[b] == models[other]));
  }
}

TEST(HolderSets, AreGivenBackWhenNobodyUsesThem) {
  HolderSets sets;
  HolderSets::Id id = 0;
  for (int turn = 0; turn < 10'000; ++turn) {
    const HolderSets::Id after = sets.with(id, static_cast<HolderSets::Holder>(turn % 500), turn % 1000 < 500 ? 1 : 0);
    if (after != 0) sets.use(after);
    if (id != 0) sets.drop(id);
    id = after;
  }
  EXPECT_EQ(id, 0U);
  EXPECT_LE(sets.end(), 4U);
}

}  // namespace
}  // namespace flexkv::cluster
