#include "flexkv/layout/tensor_plan.h"

#include <algorithm>

namespace flexkv::layout {
namespace {

constexpr int kBlockAxis = -2;

struct AxisLoop {
  int label = 0;
  Loop loop;
};

Error refuse(const TensorDesc& tensor, const std::string& what) {
  return Error{ErrorCode::kInvalidArgument, "KV tensor \"" + tensor.name + "\": " + what};
}

// a * b, or kMaxAddress + 1 where that is more than kMaxAddress.
std::uint64_t bounded_product(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return kMaxAddress + 1;
  return std::min(product, kMaxAddress + 1);
}

Status check_shape(const TensorDesc& tensor, std::uint32_t block_count) {
  if (tensor.shape.empty() || tensor.shape.size() != tensor.stride.size()) {
    return refuse(tensor, std::to_string(tensor.shape.size()) + " sizes and " + std::to_string(tensor.stride.size()) +
                              " strides: want one of each for every axis, and at least one axis");
  }
  if (tensor.address == 0) return refuse(tensor, "its address is null");
  if (tensor.block_axis >= tensor.shape.size()) {
    return refuse(tensor, "block axis " + std::to_string(tensor.block_axis) + " of " +
                              std::to_string(tensor.shape.size()) + " axes");
  }
  if (tensor.element_bytes == 0 || tensor.kernel_blocks_per_block == 0 || block_count == 0) {
    return refuse(tensor, "element bytes, kernel blocks per block and block count must be above 0");
  }
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    const std::string where = "axis " + std::to_string(axis) + " has ";
    if (tensor.shape[axis] <= 0) return refuse(tensor, where + "size " + std::to_string(tensor.shape[axis]));
    if (tensor.shape[axis] > 1 && tensor.stride[axis] <= 0) {
      return refuse(tensor, where + "stride " + std::to_string(tensor.stride[axis]) +
                                ": expanded and reversed tensors cannot be stored");
    }
  }
  const auto entries = static_cast<std::uint64_t>(tensor.shape[tensor.block_axis]);
  const std::uint64_t wanted = std::uint64_t{block_count} * tensor.kernel_blocks_per_block;
  if (entries < wanted) {
    return refuse(tensor, "axis " + std::to_string(tensor.block_axis) + " has " + std::to_string(entries) +
                              " entries, " + std::to_string(block_count) + " blocks of " +
                              std::to_string(tensor.kernel_blocks_per_block) + " need " + std::to_string(wanted));
  }
  return {};
}

// All axes longer than 1, the block axis cut in two, outermost in memory first.
std::vector<AxisLoop> axes_by_stride(const TensorDesc& tensor, std::uint32_t block_count) {
  std::vector<AxisLoop> axes;
  auto add = [&](int label, std::uint64_t count, std::uint64_t stride) {
    if (count > 1) axes.push_back({label, {count, stride}});
  };
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    const auto count = static_cast<std::uint64_t>(tensor.shape[axis]);
    const std::uint64_t stride =
        count > 1 ? bounded_product(static_cast<std::uint64_t>(tensor.stride[axis]), tensor.element_bytes) : 0;
    if (axis == tensor.block_axis) {
      add(kBlockAxis, block_count, bounded_product(stride, tensor.kernel_blocks_per_block));
      add(kKernelBlockAxis, tensor.kernel_blocks_per_block, stride);
    } else {
      add(static_cast<int>(axis < tensor.block_axis ? axis : axis - 1), count, stride);
    }
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const AxisLoop& a, const AxisLoop& b) { return a.loop.stride > b.loop.stride; });
  return axes;
}

std::string axis_text(int label, const TensorDesc& tensor) {
  if (label < 0) return "block axis " + std::to_string(tensor.block_axis);
  const auto number = static_cast<unsigned>(label);
  return "axis " + std::to_string(number < tensor.block_axis ? number : number + 1);
}

// Every axis must step over all that lies inside it. Any permutation of a dense tensor does, with any padding.
Result<std::uint64_t> checked_span(const TensorDesc& tensor, const std::vector<AxisLoop>& axes) {
  std::uint64_t span = tensor.element_bytes;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    if (axis->loop.stride < span) {
      return refuse(tensor, axis_text(axis->label, tensor) + " steps by " + std::to_string(axis->loop.stride) +
                                " bytes over " + std::to_string(span) + " bytes: blocks or elements overlap");
    }
    const std::uint64_t reach = bounded_product(axis->loop.count - 1, axis->loop.stride);
    if (reach > kMaxAddress || span > kMaxAddress - reach || tensor.address > kMaxAddress - reach - span) {
      return refuse(tensor, "its last byte lies beyond any address");
    }
    span += reach;
  }
  if (tensor.address > kMaxAddress - span) return refuse(tensor, "its last byte lies beyond any address");
  return span;
}

}  // namespace

Result<TensorPlan> plan_tensor(const TensorDesc& tensor, std::uint32_t block_count) {
  if (Status status = check_shape(tensor, block_count); !status) return status.error();
  const std::vector<AxisLoop> axes = axes_by_stride(tensor, block_count);
  const Result<std::uint64_t> span = checked_span(tensor, axes);
  if (!span) return span.error();

  TensorPlan plan;
  plan.address = tensor.address;
  plan.block_bytes = tensor.element_bytes;
  plan.run_bytes = tensor.element_bytes;
  plan.span = span.value();
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    const Loop& loop = axis->loop;
    if (axis->label == kBlockAxis) {
      plan.block_stride = loop.stride;
      continue;
    }
    plan.axes.push_back({axis->label, loop.count});
    plan.block_bytes *= loop.count;  // no overflow: all of it lies within the span
    if (plan.loops.empty() && loop.stride == plan.run_bytes) {
      plan.run_bytes *= loop.count;
    } else if (!plan.loops.empty() && loop.stride == plan.loops.back().stride * plan.loops.back().count) {
      plan.loops.back().count *= loop.count;
    } else {
      plan.loops.push_back(loop);
    }
  }
  std::reverse(plan.axes.begin(), plan.axes.end());
  std::reverse(plan.loops.begin(), plan.loops.end());
  return plan;
}

}  // namespace flexkv::layout
