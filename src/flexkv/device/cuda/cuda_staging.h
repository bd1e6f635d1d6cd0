// Loads of blocks of short runs through buffers in device memory: whole blocks cross the link, and a small kernel
// scatters their runs. Copy engines alone move runs of 18 KiB at a third to 0.80 of the link. Not for saves: a save
// shares the processors with the model, and the link is never what it waits for. Private to the CUDA form; owned by its
// copy stream's thread.
//
// The kernels run on a stream of their own, so that one buffer is filled while the other is emptied.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "flexkv/device/cuda/cuda_owners.h"
#include "flexkv/device/device.h"
#include "flexkv/layout/rectangles.h"

namespace flexkv::device {

// Which bytes of a block are moved: all, or those of a part. As in a buffer, where blocks lie one after the other.
struct StagedStretch {
  std::uint32_t host_begin = 0;
  std::uint32_t bytes = 0;
  std::uint32_t first_run = 0;
  std::uint32_t runs = 0;

  std::size_t blocks_at_once() const;
};

// REQUIRES of all calls, destruction apart: a ContextScope.
class Staging {
 public:
  // Whether it can be done for blocks of this layout (the kernels move units of 16 bytes), and should: its runs are
  // shorter than `stage_below` on average.
  static bool suits(const layout::BlockLayout& layout, std::uint32_t stage_below);
  static Result<std::unique_ptr<Staging>> create(std::shared_ptr<Context> context, const layout::BlockLayout& layout);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  const StagedStretch& stretch(std::size_t part) const {
    return stretches_[part == CopyStream::kAllParts ? 0 : part + 1];
  }

  // What the kernels do from now on comes after the event.
  Status order_after(const Event& event) { return event.order(kernels_->get()); }

  // An error if the engine has given the memory of its blocks back: a kernel that touches it would end the engine,
  // where a copy is only refused.
  Status check_memory() const;

  // One round through the next buffer, at most stretch.blocks_at_once() blocks: make_room(), the copies to address(),
  // then scatter(). `copies` is the stream that they are given to.
  Status make_room(cudaStream_t copies) { return buffers_[current_].emptied.order(copies); }
  Status scatter(std::span<const BlockCopy> blocks, const StagedStretch& stretch, cudaStream_t copies);
  // Of the i-th block in the buffer of this round.
  std::uint64_t address(std::size_t i, const StagedStretch& stretch) const;

  // What `copies` is given from now on comes after all that was scattered.
  Status join(cudaStream_t copies) { return buffers_[1 - current_].emptied.order(copies); }
  // Waits until no kernel runs or will run.
  void synchronize();

 private:
  struct Buffer {
    explicit Buffer(const std::shared_ptr<Context>& context) : filled(context), emptied(context) {}
    Event filled;
    Event emptied;
  };

  explicit Staging(const std::shared_ptr<Context>& context)
      : context_(context), buffers_{Buffer(context), Buffer(context)} {}
  Status launch(std::span<const BlockCopy> blocks, const StagedStretch& stretch);
  std::byte* buffer() const;

  const std::shared_ptr<Context> context_;
  std::unique_ptr<Stream> kernels_;
  std::byte* memory_ = nullptr;  // the buffers, then the runs
  const layout::Run* runs_ = nullptr;
  const void* first_plane_ = nullptr;
  std::vector<StagedStretch> stretches_;  // of all of a block, then of each part
  std::array<Buffer, 2> buffers_;
  std::size_t current_ = 0;
};

}  // namespace flexkv::device
