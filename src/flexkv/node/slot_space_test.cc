#include "flexkv/node/slot_space.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <set>
#include <vector>

namespace flexkv::node {
namespace {

constexpr std::uint64_t kPage = kExtentAlignment;

TEST(RangeAllocator, TakesTheFirstRangeThatIsLargeEnough) {
  RangeAllocator ranges(10 * kPage);
  const auto first = ranges.take(kPage, 2 * kPage);
  EXPECT_EQ(first.offset, 0U);
  EXPECT_EQ(first.bytes, 2 * kPage);
  const auto second = ranges.take(kPage, 3 * kPage);
  EXPECT_EQ(second.offset, 2 * kPage);
  ranges.give_back(first);
  EXPECT_EQ(ranges.take(3 * kPage, 3 * kPage).offset, 5 * kPage);  // the hole in front is too small
  EXPECT_EQ(ranges.take(kPage, 9 * kPage).bytes, 2 * kPage);       // cut to what the hole has
}

TEST(RangeAllocator, HasNothingBeyondThePool) {
  RangeAllocator ranges(3 * kPage + 17);
  EXPECT_EQ(ranges.free_bytes(), 3 * kPage);
  EXPECT_EQ(ranges.take(4 * kPage, 4 * kPage).bytes, 0U);
  EXPECT_EQ(ranges.take(kPage, 9 * kPage).bytes, 3 * kPage);
  EXPECT_EQ(ranges.take(kPage, kPage).bytes, 0U);
}

// Against a map of pages: nothing is dealt out twice, and all that came back can be had in one piece again.
RC_GTEST_PROP(RangeAllocator, AgreesWithAMapOfPages, ()) {
  const auto pages = *rc::gen::inRange<std::size_t>(1, 60);
  RangeAllocator ranges(pages * kPage);
  std::vector<bool> taken(pages, false);
  std::vector<RangeAllocator::Range> held;
  const auto steps = *rc::gen::inRange(1, 60);
  for (int step = 0; step < steps; ++step) {
    if (held.empty() || *rc::gen::inRange(0, 3) > 0) {
      const auto least = *rc::gen::inRange<std::uint64_t>(1, 8);
      const auto most = least + *rc::gen::inRange<std::uint64_t>(0, 8);
      std::size_t run = 0;
      bool possible = false;
      for (std::size_t page = 0; page < pages && !possible; ++page) {
        run = taken[page] ? 0 : run + 1;
        possible = run >= least;
      }
      const auto range = ranges.take(least * kPage, most * kPage);
      RC_ASSERT((range.bytes > 0) == possible);
      if (!possible) continue;
      RC_ASSERT(range.bytes >= least * kPage && range.bytes <= most * kPage);
      for (std::uint64_t at = range.offset; at < range.offset + range.bytes; at += kPage) {
        RC_ASSERT(!taken.at(at / kPage));
        taken[at / kPage] = true;
      }
      held.push_back(range);
    } else {
      const auto which = *rc::gen::inRange<std::size_t>(0, held.size());
      for (std::uint64_t at = 0; at < held[which].bytes; at += kPage) taken[(held[which].offset + at) / kPage] = false;
      ranges.give_back(held[which]);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    }
    RC_ASSERT(ranges.free_bytes() == kPage * static_cast<std::uint64_t>(std::count(taken.begin(), taken.end(), false)));
  }
  for (const auto& range : held) ranges.give_back(range);
  RC_ASSERT(ranges.take(pages * kPage, pages * kPage).bytes == pages * kPage);
}

// Several spaces in one pool: no two slots overlap, ever, and the pool is whole again when they are gone.
RC_GTEST_PROP(SlotSpace, SlotsNeverOverlap, ()) {
  const auto pool = *rc::gen::inRange<std::uint64_t>(1, 200) * kPage;
  RangeAllocator ranges(pool);
  {
    std::vector<std::unique_ptr<SlotSpace>> spaces;
    std::vector<std::vector<index::Slot>> held;
    const auto count = *rc::gen::inRange(1, 4);
    for (int i = 0; i < count; ++i) {
      spaces.push_back(std::make_unique<SlotSpace>(ranges, *rc::gen::inRange<std::uint64_t>(1, 6) * kPage, pool));
      held.emplace_back();
    }
    std::set<std::uint64_t> pages;
    const auto each_page = [](const SlotSpace& space, index::Slot slot, auto visit) {
      for (std::uint64_t at = 0; at < space.slot_bytes(); at += kPage) visit(space.offset(slot) + at);
    };
    for (int step = 0; step < 200; ++step) {
      const auto which = *rc::gen::inRange<std::size_t>(0, spaces.size());
      SlotSpace& space = *spaces[which];
      if (!held[which].empty() && *rc::gen::inRange(0, 3) == 0) {
        each_page(space, held[which].back(), [&](std::uint64_t page) { pages.erase(page); });
        space.give_back(held[which].back());
        held[which].pop_back();
      } else if (space.free_count() > 0 || space.grow()) {
        const index::Slot slot = space.take();
        each_page(space, slot, [&](std::uint64_t page) {
          RC_ASSERT(page % kPage == 0 && page + kPage <= pool);
          RC_ASSERT(pages.insert(page).second);
        });
        const std::uint32_t row = space.slots_in_row(slot);
        RC_ASSERT(row > 0);
        for (const index::Slot other : held[which]) {
          if (other > slot && other - slot < row) {
            RC_ASSERT(space.offset(other) == space.offset(slot) + (other - slot) * space.slot_bytes());
          }
        }
        held[which].push_back(slot);
      } else {
        RC_ASSERT(ranges.take(space.slot_bytes(), space.slot_bytes()).bytes == 0);
      }
      RC_ASSERT(space.slot_count() == space.free_count() + held[which].size());
    }
  }
  RC_ASSERT(ranges.take(pool, pool).bytes == pool);
}

}  // namespace
}  // namespace flexkv::node
