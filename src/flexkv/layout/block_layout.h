// BlockLayout: where the bytes of each KV block lie on a device, and in the block's host form (README.md).
//
// An immutable value: thread-safe to read, cheap to share, owns nothing but its tables. Sizes and offsets in bytes.
// Bounds: a block (one shard) has below 4 GiB in at most kMaxRuns runs, a tensor at most kMaxLoops nested loops; more
// is refused by derive(). All arithmetic on a derived layout stays within 64 bits.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/layout/rectangles.h"
#include "flexkv/layout/tensor_desc.h"
#include "flexkv/layout/tensor_plan.h"

namespace flexkv::layout {

// Names a host form: equal only if the host bytes of a block mean the same, whatever the device layout. Covers, per
// distinct tensor, the element size and the logical axes in physical order; not addresses, names or block count.
struct LayoutId {
  std::array<std::uint8_t, 16> bytes{};

  friend bool operator==(const LayoutId&, const LayoutId&) = default;
};

constexpr std::size_t kMaxLoops = 6;
constexpr std::uint64_t kMaxRuns = 1U << 18;

// Runs of equal size at nested steps. In the host form they follow one another without gaps.
struct Strip {
  std::uint64_t address = 0;  // of the first run in block 0
  std::uint64_t block_stride = 0;
  std::uint32_t host_offset = 0;
  std::uint32_t run_bytes = 0;
  std::uint32_t loop_count = 0;
  std::array<Loop, kMaxLoops> loops{};  // outermost first; the first loop_count of them count
};

// A stretch of the host form that whole tensors fill, and the rectangles that copy it.
struct Part {
  std::uint32_t host_begin = 0;
  std::uint32_t host_end = 0;
  std::vector<Rectangle> rectangles;
};

constexpr std::uint32_t kMaxParts = 8;

class BlockLayout {
 public:
  // Refuses, naming the tensor, what plan_tensor() refuses, tensors that overlap in part, and what is out of bounds.
  // Tensors that are the same memory (address, shape, strides and element size) are stored once.
  // A block is cut into at most kMaxParts parts, and so few that they have min_part_bytes on average.
  static Result<BlockLayout> derive(std::span<const TensorDesc> tensors, std::uint32_t block_count,
                                    std::uint32_t min_part_bytes = 1);

  std::uint32_t block_count() const { return block_count_; }
  // Bytes of one block's host form.
  std::uint32_t shard_bytes() const { return shard_bytes_; }
  const LayoutId& id() const { return id_; }
  std::span<const Strip> strips() const { return strips_; }
  std::span<const Rectangle> rectangles() const { return rectangles_; }
  // All runs of a block, in the order of the host form. They come from the strips: who checks copies of rectangles with
  // them finds rectangles that are wrong.
  std::vector<Run> runs() const { return runs_of(strips_); }
  // For people: one line for each distinct shape of tensor.
  const std::string& describe() const { return description_; }

  // The whole host form, cut between tensors: for copies after each of which some layers are complete.
  std::span<const Part> parts() const { return parts_; }
  // The part that holds the tensor with this number in the list given to derive().
  std::uint32_t part_of(std::size_t tensor) const { return part_of_[tensor]; }

  // Calls fn(device_address, host_offset, bytes) for every contiguous run of a block, in the order of the host form.
  // REQUIRES: block < block_count()
  template <typename Fn>
  void for_each_run(std::uint32_t block, Fn&& fn) const {
    FLEXKV_ASSERT(block < block_count_);
    for (const Strip& strip : strips_) {
      std::uint32_t host_offset = strip.host_offset;
      walk(std::span(strip.loops).first(strip.loop_count), strip.address + block * strip.block_stride, strip.run_bytes,
           host_offset, fn);
    }
  }

 private:
  BlockLayout() = default;

  template <typename Fn>
  static void walk(std::span<const Loop> loops, std::uint64_t address, std::uint32_t bytes, std::uint32_t& host_offset,
                   Fn& fn) {
    if (loops.empty()) {
      fn(address, host_offset, bytes);
      host_offset += bytes;
      return;
    }
    for (std::uint64_t i = 0; i < loops[0].count; ++i) {
      walk(loops.subspan(1), address + i * loops[0].stride, bytes, host_offset, fn);
    }
  }

  static Strip make_strip(const TensorPlan& plan, std::uint32_t host_offset);
  static void append(std::vector<Strip>& strips, const Strip& strip);
  static std::vector<Run> runs_of(std::span<const Strip> strips);
  static std::vector<Rectangle> gather(std::span<const Strip> strips);
  // `strips`: one for each distinct tensor. Returns the part of each.
  std::vector<std::uint32_t> cut_parts(std::span<const Strip> strips, std::uint32_t min_part_bytes);

  std::uint32_t block_count_ = 0;
  std::uint32_t shard_bytes_ = 0;
  LayoutId id_;
  std::vector<Strip> strips_;
  std::vector<Rectangle> rectangles_;
  std::vector<Part> parts_;
  std::vector<std::uint32_t> part_of_;
  std::string description_;
};

}  // namespace flexkv::layout
