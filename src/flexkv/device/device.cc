#include "flexkv/device/device.h"

namespace flexkv::device {

Status check_copies(std::span<const BlockCopy> copies, const layout::BlockLayout& layout, std::size_t pool_bytes) {
  for (const BlockCopy& copy : copies) {
    if (copy.device_block >= layout.block_count()) {
      return Error{ErrorCode::kInvalidArgument, "copy of device block " + std::to_string(copy.device_block) + " of " +
                                                    std::to_string(layout.block_count())};
    }
    if (pool_bytes < layout.shard_bytes() || copy.host_offset > pool_bytes - layout.shard_bytes()) {
      return Error{ErrorCode::kInvalidArgument, "copy of " + std::to_string(layout.shard_bytes()) +
                                                    " bytes at host offset " + std::to_string(copy.host_offset) +
                                                    " in a pool of " + std::to_string(pool_bytes)};
    }
  }
  return {};
}

}  // namespace flexkv::device
