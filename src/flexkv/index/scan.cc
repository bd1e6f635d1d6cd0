// Visiting all blocks of a tier while others come and go.
#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::index {

void PrefixIndex::begin_scan(Tier tier) {
  FLEXKV_ASSERT(tier < tier_count_);
  scan_ = {tier, {0, 0}, {}};
}

PrefixIndex::Scanned PrefixIndex::scan(std::uint32_t looks_max) {
  for (std::uint32_t looks = 0; looks < looks_max; ++looks) {
    const bool split_off = !scan_.split_off.empty();
    if (!split_off && scan_.next.run >= runs_.end()) {
      end_scan();
      return {std::nullopt, true};
    }
    Position& next = split_off ? scan_.split_off.back() : scan_.next;
    const Run& run = runs_[next.run];
    const bool any = !run.detached && run.tiers[scan_.tier].blocks > 0 && next.at < run.blocks.size();
    if (!any && split_off) {
      scan_.split_off.pop_back();
    } else if (!any) {
      next = {next.run + 1, 0};
    } else if (const std::uint32_t at = next.at++; run.blocks.slots(scan_.tier)[at] != kNoSlot) {
      return {add_pin({next.run, at}), false};
    }
  }
  return {std::nullopt, false};
}

std::optional<PinId> PrefixIndex::pin_part(const Part& part) {
  const RunId id = table_.find(part.run, [&](RunId run) { return runs_[run].blocks.keys()[0] == part.run; });
  if (id == kNone || part.end == 0) return std::nullopt;
  return add_pin({id, std::min(part.end, runs_[id].blocks.size()) - 1});
}

// The blocks before `at` have gone to another run, and those behind have moved to the front of theirs. What is still to
// be visited of the former is remembered, unless its run comes later anyway.
void PrefixIndex::scan_past_split(RunId head, RunId tail, std::uint32_t at) {
  std::vector<Position> more;
  const auto divide = [&](Position& next) {
    if (next.run != tail) return;
    if (next.at < at) more.push_back({head, next.at});
    next.at -= std::min(next.at, at);
  };
  for (Position& next : scan_.split_off) divide(next);
  divide(scan_.next);
  if (tail > scan_.next.run) more.push_back({head, 0});
  if (head <= scan_.next.run) scan_.split_off.insert(scan_.split_off.end(), more.begin(), more.end());
}

}  // namespace flexkv::index
