#include "flexkv/layout/block_layout.h"

#include <xxhash.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>

#include "flexkv/layout/disjoint.h"

namespace flexkv::layout {
namespace {

struct PlannedTensor {
  const TensorDesc* desc;
  TensorPlan plan;
};

bool same_memory(const TensorDesc& a, const TensorDesc& b) {
  return a.address == b.address && a.element_bytes == b.element_bytes && a.shape == b.shape && a.stride == b.stride &&
         a.block_axis == b.block_axis && a.kernel_blocks_per_block == b.kernel_blocks_per_block;
}

std::uint64_t run_count(const TensorPlan& plan) { return plan.block_bytes / plan.run_bytes; }

Status check_bounds(const PlannedTensor& tensor, std::uint64_t bytes_before, std::uint64_t runs_before) {
  const std::string name = "KV tensor \"" + tensor.desc->name + "\": ";
  if (tensor.plan.block_bytes > std::numeric_limits<std::uint32_t>::max() - bytes_before) {
    return Error{ErrorCode::kUnsupported, name + "a block would reach 4 GiB"};
  }
  if (tensor.plan.loops.size() > kMaxLoops || runs_before + run_count(tensor.plan) > kMaxRuns) {
    return Error{ErrorCode::kUnsupported, name + "a block lies in too many pieces (" +
                                              std::to_string(run_count(tensor.plan)) + " of " +
                                              std::to_string(tensor.plan.run_bytes) + " bytes)"};
  }
  return {};
}

StridedSet all_blocks(const TensorPlan& plan, std::uint32_t block_count) {
  StridedSet set{plan.address, plan.run_bytes, plan.loops};
  if (block_count > 1) set.loops.push_back({block_count, plan.block_stride});
  return set;
}

Status check_disjoint(const std::vector<PlannedTensor>& tensors, std::uint32_t block_count) {
  std::vector<std::size_t> by_address(tensors.size());
  std::iota(by_address.begin(), by_address.end(), 0U);
  std::sort(by_address.begin(), by_address.end(),
            [&](std::size_t a, std::size_t b) { return tensors[a].plan.address < tensors[b].plan.address; });
  for (std::size_t i = 0; i < by_address.size(); ++i) {
    const PlannedTensor& a = tensors[by_address[i]];
    for (std::size_t j = i + 1; j < by_address.size(); ++j) {
      const PlannedTensor& b = tensors[by_address[j]];
      if (b.plan.address >= a.plan.address + a.plan.span) break;
      if (disjoint(all_blocks(a.plan, block_count), all_blocks(b.plan, block_count))) continue;
      return Error{ErrorCode::kInvalidArgument, "KV tensors \"" + a.desc->name + "\" and \"" + b.desc->name +
                                                    "\" overlap in memory but are not the same tensor"};
    }
  }
  return {};
}

std::string axes_text(const TensorPlan& plan) {
  std::string text;
  for (const Axis& axis : plan.axes) {
    if (!text.empty()) text += ' ';
    text += (axis.label == kKernelBlockAxis ? "k" : std::to_string(axis.label)) + ":" + std::to_string(axis.size);
  }
  return text.empty() ? "-" : text;
}

LayoutId host_form_id(const std::vector<PlannedTensor>& tensors) {
  // The version changes when the same tensors get other host bytes: what older versions stored is then a miss.
  std::string canonical = "flexkv host form 1";
  for (const PlannedTensor& tensor : tensors) {
    canonical += '\n' + std::to_string(tensor.desc->element_bytes) + ' ' + axes_text(tensor.plan);
  }
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, XXH3_128bits(canonical.data(), canonical.size()));
  LayoutId id;
  std::copy(std::begin(bytes.digest), std::end(bytes.digest), id.bytes.begin());
  return id;
}

std::string description_of(const std::vector<PlannedTensor>& tensors) {
  std::vector<std::pair<std::string, std::size_t>> lines;  // in order of first appearance
  std::map<std::string, std::size_t> line_of;
  for (const PlannedTensor& tensor : tensors) {
    const TensorPlan& plan = tensor.plan;
    const std::string line = std::to_string(plan.block_bytes) + " bytes a block, elements of " +
                             std::to_string(tensor.desc->element_bytes) + ", axes outermost first [" + axes_text(plan) +
                             "], in " + std::to_string(run_count(plan)) + " run(s) of " +
                             std::to_string(plan.run_bytes) + ", block stride " + std::to_string(plan.block_stride);
    const auto [at, is_new] = line_of.emplace(line, lines.size());
    if (is_new) lines.emplace_back(line, 0);
    ++lines[at->second].second;
  }
  std::string text;
  for (const auto& [line, count] : lines) text += std::to_string(count) + " tensor(s): " + line + '\n';
  return text;
}

}  // namespace

Result<BlockLayout> BlockLayout::derive(std::span<const TensorDesc> tensors, std::uint32_t block_count,
                                        std::uint32_t min_part_bytes) {
  std::vector<PlannedTensor> planned;
  std::vector<std::size_t> planned_as;  // for each of `tensors`
  std::uint64_t bytes = 0;
  std::uint64_t runs = 0;
  for (const TensorDesc& desc : tensors) {
    const auto is_alias = [&](const PlannedTensor& other) { return same_memory(*other.desc, desc); };
    const auto same = std::find_if(planned.begin(), planned.end(), is_alias);
    planned_as.push_back(static_cast<std::size_t>(same - planned.begin()));
    if (same != planned.end()) continue;
    Result<TensorPlan> plan = plan_tensor(desc, block_count);
    if (!plan) return plan.error();
    planned.push_back({&desc, std::move(plan).value()});
    if (Status status = check_bounds(planned.back(), bytes, runs); !status) return status.error();
    bytes += planned.back().plan.block_bytes;
    runs += run_count(planned.back().plan);
  }
  if (planned.empty()) return Error{ErrorCode::kInvalidArgument, "no KV tensors were registered"};
  if (Status status = check_disjoint(planned, block_count); !status) return status.error();

  BlockLayout layout;
  layout.block_count_ = block_count;
  std::vector<Strip> strips;
  for (const PlannedTensor& tensor : planned) {
    strips.push_back(make_strip(tensor.plan, layout.shard_bytes_));
    layout.shard_bytes_ += static_cast<std::uint32_t>(tensor.plan.block_bytes);
    append(layout.strips_, strips.back());
  }
  layout.rectangles_ = gather(layout.strips_);
  const std::vector<std::uint32_t> parts = layout.cut_parts(strips, min_part_bytes);
  for (const std::size_t number : planned_as) layout.part_of_.push_back(parts[number]);
  layout.id_ = host_form_id(planned);
  layout.description_ = description_of(planned);
  return layout;
}

Strip BlockLayout::make_strip(const TensorPlan& plan, std::uint32_t host_offset) {
  Strip strip{.address = plan.address,
              .block_stride = plan.block_stride,
              .host_offset = host_offset,
              .run_bytes = static_cast<std::uint32_t>(plan.run_bytes),
              .loop_count = static_cast<std::uint32_t>(plan.loops.size())};
  std::copy(plan.loops.begin(), plan.loops.end(), strip.loops.begin());
  return strip;
}

void BlockLayout::append(std::vector<Strip>& strips, const Strip& strip) {
  // Layers that lie side by side within each block are one run.
  if (!strips.empty()) {
    Strip& last = strips.back();
    if (last.loop_count == 0 && strip.loop_count == 0 && last.block_stride == strip.block_stride &&
        last.address + last.run_bytes == strip.address) {
      last.run_bytes += strip.run_bytes;
      return;
    }
  }
  strips.push_back(strip);
}

std::vector<Run> BlockLayout::runs_of(std::span<const Strip> strips) {
  std::vector<Run> runs;
  for (const Strip& strip : strips) {
    std::uint32_t host_offset = strip.host_offset;
    auto add = [&](std::uint64_t address, std::uint32_t offset, std::uint32_t bytes) {
      runs.push_back({address, strip.block_stride, offset, bytes});
    };
    walk(std::span(strip.loops).first(strip.loop_count), strip.address, strip.run_bytes, host_offset, add);
  }
  return runs;
}

std::vector<Rectangle> BlockLayout::gather(std::span<const Strip> strips) { return gather_rectangles(runs_of(strips)); }

std::vector<std::uint32_t> BlockLayout::cut_parts(std::span<const Strip> strips, std::uint32_t min_part_bytes) {
  const std::uint32_t count = std::clamp(shard_bytes_ / std::max(min_part_bytes, 1U), 1U, kMaxParts);
  const auto end_of = [&](std::size_t i) { return i + 1 < strips.size() ? strips[i + 1].host_offset : shard_bytes_; };
  std::vector<std::uint32_t> part_of;
  std::vector<Strip> merged;
  std::uint32_t begin = 0;
  for (std::size_t i = 0; i < strips.size(); ++i) {
    append(merged, strips[i]);
    part_of.push_back(static_cast<std::uint32_t>(parts_.size()));
    // The next cut lies where this many equal parts would end.
    const std::uint64_t cut = std::uint64_t{shard_bytes_} * (parts_.size() + 1) / count;
    if (end_of(i) < cut) continue;
    parts_.push_back({begin, end_of(i), gather(merged)});
    begin = end_of(i);
    merged.clear();
  }
  return part_of;
}

}  // namespace flexkv::layout
