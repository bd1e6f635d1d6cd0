// Records on their way to the drive, as few writes as possible. Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/disk/record.h"

namespace flexkv::disk {

struct PendingRecord {
  std::uint32_t index = 0;            // of the slot in its file
  RecordBytes bytes{};                // zeros: the slot holds nothing
  std::optional<std::uint64_t> op{};  // who waits for it
};

struct RecordRun {
  std::uint32_t first = 0;
  std::vector<std::byte> bytes;
};

// Neighbours joined, ascending. Of several for one slot, the last one counts.
std::vector<RecordRun> join(std::span<const PendingRecord> records);

}  // namespace flexkv::disk
