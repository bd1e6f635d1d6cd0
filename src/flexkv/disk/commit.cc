#include "flexkv/disk/commit.h"

#include <algorithm>
#include <numeric>

namespace flexkv::disk {

std::vector<RecordRun> join(std::span<const PendingRecord> records) {
  std::vector<std::size_t> order(records.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, [&](std::size_t i) { return records[i].index; });
  std::vector<RecordRun> runs;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const PendingRecord& record = records[order[i]];
    if (i + 1 < order.size() && records[order[i + 1]].index == record.index) continue;
    if (runs.empty() || runs.back().first + runs.back().bytes.size() / kRecordBytes != record.index) {
      runs.push_back({record.index, {}});
    }
    runs.back().bytes.insert(runs.back().bytes.end(), record.bytes.begin(), record.bytes.end());
  }
  return runs;
}

}  // namespace flexkv::disk
