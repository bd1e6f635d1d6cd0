#include "flexkv/layout/disjoint.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <set>

namespace flexkv::layout {
namespace {

void add_bytes(const StridedSet& set, std::size_t level, std::uint64_t address, std::set<std::uint64_t>& bytes) {
  if (level == set.loops.size()) {
    for (std::uint64_t i = 0; i < set.run_bytes; ++i) bytes.insert(address + i);
    return;
  }
  for (std::uint64_t i = 0; i < set.loops[level].count; ++i) {
    add_bytes(set, level + 1, address + i * set.loops[level].stride, bytes);
  }
}

StridedSet any_set() {
  StridedSet set{.address = *rc::gen::inRange<std::uint64_t>(0, 200),
                 .run_bytes = *rc::gen::inRange<std::uint64_t>(1, 6),
                 .loops = {}};
  const auto loops = *rc::gen::inRange<int>(0, 4);
  for (int i = 0; i < loops; ++i) {
    set.loops.push_back({*rc::gen::inRange<std::uint64_t>(2, 5),
                         *rc::gen::element<std::uint64_t>(3, 4, 8, 12, 16, 24, 31, 32, 48, 64, 100)});
  }
  return set;
}

RC_GTEST_PROP(Disjoint, agrees_with_sets_of_bytes, ()) {
  const StridedSet a = any_set();
  const StridedSet b = any_set();
  std::set<std::uint64_t> a_bytes, b_bytes;
  add_bytes(a, 0, a.address, a_bytes);
  add_bytes(b, 0, b.address, b_bytes);
  bool shared = false;
  for (const std::uint64_t byte : a_bytes) shared = shared || b_bytes.contains(byte);
  RC_CLASSIFY(shared);
  RC_ASSERT(disjoint(a, b) == !shared);
  RC_ASSERT(disjoint(b, a) == !shared);
}

TEST(Disjoint, is_fast_on_many_interleaved_layers) {
  // 1,000,000 blocks of 61 layers of 4 heads, layers inside the heads: [block][head][layer][2304].
  for (std::uint64_t layer = 1; layer < 61; ++layer) {
    const std::vector<Loop> loops = {{1'000'000, 4 * 61 * 2304}, {4, 61 * 2304}};
    EXPECT_TRUE(disjoint({4096, 2304, loops}, {4096 + layer * 2304, 2304, loops}));
    EXPECT_FALSE(disjoint({4096, 2305, loops}, {4096 + layer * 2304, 2304 * 60, loops}));
  }
}

}  // namespace
}  // namespace flexkv::layout
