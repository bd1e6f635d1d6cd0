// The blocks of a copy command, a chunk at a time: what a lane gives its stream between two looks for a cancellation.
// Thread-compatible. Holds one chunk; the command must outlive it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flexkv/device/device.h"
#include "flexkv/proto/messages.h"

namespace flexkv::agent {

class CopyChunks {
 public:
  // REQUIRES: blocks_max > 0
  CopyChunks(const proto::CopyCommand& command, std::size_t blocks_max)
      : command_(command),
        run_(command.runs.begin()),
        left_(command.block_count()),
        chunk_(std::min(blocks_max, left_)) {}

  // The next blocks in order, as many as a chunk holds; valid until the next call. Empty: there are no more.
  std::span<const device::BlockCopy> next() {
    const std::size_t count = std::min(chunk_.size(), left_);
    for (std::size_t filled = 0; filled < count;) {
      const auto end = static_cast<std::uint32_t>(std::min<std::size_t>(run_->count, run_used_ + count - filled));
      for (; run_used_ < end; ++run_used_) chunk_[filled++] = run_->at(run_used_, command_.host_stride);
      if (run_used_ < run_->count) break;
      ++run_;
      run_used_ = 0;
    }
    left_ -= count;
    return std::span(chunk_).first(count);
  }

 private:
  const proto::CopyCommand& command_;
  std::vector<proto::BlockRun>::const_iterator run_;
  std::uint32_t run_used_ = 0;
  std::size_t left_;
  std::vector<device::BlockCopy> chunk_;
};

}  // namespace flexkv::agent
