#include "flexkv/base/block_sum.h"

#include <array>
#include <vector>

namespace flexkv {
namespace {

// Keys are most of the work, and follow from numbers alone: so many at once are what compilers make vectors of.
constexpr std::size_t kBatch = 64;

[[gnu::always_inline]] inline void add_with_this(BlockSum& sum, std::uint32_t first, std::span<const std::byte> bytes) {
  BlockSum added;
  alignas(64) std::array<std::uint64_t, kBatch> low;
  alignas(64) std::array<std::uint64_t, kBatch> high;
  const auto lane_at = [](const std::byte* at) {
    SumLane lane;
    std::memcpy(&lane, at, kSumLaneBytes);
    return lane;
  };
  for (; bytes.size() >= kBatch * kSumLaneBytes; bytes = bytes.subspan(kBatch * kSumLaneBytes)) {
    for (std::size_t i = 0; i < kBatch; ++i) {
      const SumLane key = BlockSum::key_of(first + static_cast<std::uint32_t>(i));
      low[i] = key.low;
      high[i] = key.high;
    }
    for (std::size_t i = 0; i < kBatch; ++i) {
      added.add_lane({low[i], high[i]}, lane_at(bytes.data() + i * kSumLaneBytes));
    }
    first += kBatch;
  }
  for (; !bytes.empty(); bytes = bytes.subspan(kSumLaneBytes)) added.add_lane(first++, lane_at(bytes.data()));
  sum.add(added);
}

void add_plainly(BlockSum& sum, std::uint32_t first, std::span<const std::byte> bytes) {
  add_with_this(sum, first, bytes);
}

#if defined(__x86_64__)

[[gnu::target("avx2,bmi2")]] void add_with_avx2(BlockSum& sum, std::uint32_t first, std::span<const std::byte> bytes) {
  add_with_this(sum, first, bytes);
}

[[gnu::target("avx512f,avx512dq,avx512vl,bmi2")]] void add_with_avx512(BlockSum& sum, std::uint32_t first,
                                                                       std::span<const std::byte> bytes) {
  add_with_this(sum, first, bytes);
}

std::vector<AddLanes> ways() {
  std::vector<AddLanes> all;
  const bool bmi2 = __builtin_cpu_supports("bmi2");
  const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (bmi2 && avx512) all.push_back(add_with_avx512);
  if (bmi2 && __builtin_cpu_supports("avx2")) all.push_back(add_with_avx2);
  all.push_back(add_plainly);
  return all;
}

#else

std::vector<AddLanes> ways() { return {add_plainly}; }

#endif

}  // namespace

std::span<const AddLanes> ways_to_add_lanes() {
  static const std::vector<AddLanes> all = ways();
  return all;
}

}  // namespace flexkv
