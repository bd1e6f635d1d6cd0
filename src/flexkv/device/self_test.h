// Proof, on the real memory and before it holds anything of worth, that a layout's copy plan moves the right bytes.
#pragma once

#include <span>

#include "flexkv/device/device.h"
#include "flexkv/layout/block_layout.h"
#include "flexkv/layout/tensor_desc.h"

namespace flexkv::device {

// Writes a pattern into the first and the last block through the plan, compares what changed (the next block too, which
// must not) with element by element addressing, reads the pattern back through the plan, and puts the old bytes of the
// two blocks back. The error names the tensor and the block; a plan so found wrong may have written elsewhere in the
// tensors. Uses host memory of four blocks, not registered. Blocks its thread. REQUIRES: `layout` was derived from
// `tensors`; nothing else uses the two blocks and their neighbours meanwhile.
Status self_test(Device& device, const layout::BlockLayout& layout, std::span<const layout::TensorDesc> tensors);

}  // namespace flexkv::device
