// CopyStream on a CUDA stream of its own. Private to the CUDA form; owned by one thread.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "flexkv/device/cuda/cuda_owners.h"
#include "flexkv/device/cuda/cuda_staging.h"
#include "flexkv/device/cuda/cuda_sums.h"
#include "flexkv/device/cuda/pinned_pool.h"
#include "flexkv/device/cuda/staging_pace.h"
#include "flexkv/device/device.h"

namespace flexkv::device {

class CudaEngineEvent final : public EngineEvent {
 public:
  explicit CudaEngineEvent(std::shared_ptr<Context> context) : event(std::move(context)) {}
  Event event;
};

class CudaStream final : public CopyStream {
 public:
  // `staging`: null where the copy engines move the blocks as they lie. `sums`: null where there are none.
  CudaStream(std::shared_ptr<Context> context, std::shared_ptr<const PinnedPool> pinned, std::unique_ptr<Stream> stream,
             std::unique_ptr<Staging> staging, std::unique_ptr<Sums> sums, Direction direction,
             const layout::BlockLayout& layout, std::span<std::byte> pool, std::uint64_t max_pitch);
  ~CudaStream() override;

  Status order_after(const EngineEvent& event) override;
  using CopyStream::submit;
  Status submit(std::span<const BlockCopy> copies, std::size_t part) override;
  Status sum(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) override;
  Status synchronize() override;

  // `fn(stream)` gives the stream something to do once all that was submitted so far has arrived.
  template <typename Fn>
  Status after_all(Fn&& fn) {
    if (failed_) return *failed_;
    Status status = join();
    return keep(status ? fn(stream_->get()) : std::move(status));
  }
  // Makes `engine_stream` wait for all submitted so far.
  Status order_engine(cudaStream_t engine_stream);

 private:
  // Copies queued between two marks, and the most runs given to one batched call.
  static constexpr std::size_t kGroup = 200;
  // Bytes between two marks: what a cancellation, or the change from staging to copies in place, comes after.
  static constexpr std::size_t kGroupBytes = 16U << 20;
  // A stream takes about 1,020 copies, then its calls spin: with four full groups and one growing it never gets there.
  static constexpr std::size_t kMarks = 6;

  // The rectangles that make up a block, or a part of each.
  struct Plan {
    std::span<const layout::Rectangle> rectangles;
    std::vector<bool> by_row;  // for each: the driver does not take it as one copy
  };

  Status submit_staged(std::span<const BlockCopy> copies, std::size_t part);
  Status queue_staged(std::span<const BlockCopy> copies, const StagedStretch& stretch);
  // What the stream is given from now on comes after what its kernels do.
  Status join();
  Status queue_block(const BlockCopy& copy, Plan& plan);
  cudaError_t queue_rectangle(const layout::Rectangle& rectangle, std::uint64_t address, std::byte* host);
  // In pieces where the host side crosses a pinning boundary.
  Status queue_run(std::uint64_t address, std::byte* host, std::size_t bytes, bool pinned);
  Status flush_batch();
  // Counts what was queued; at the end of a group waits until few enough groups are in flight.
  Status count(std::size_t copies, std::size_t bytes);
  // Keeps the first failure: what later calls return.
  Status keep(Status status);

  const std::shared_ptr<Context> context_;
  const std::shared_ptr<const PinnedPool> pinned_;
  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<Staging> staging_;
  const std::unique_ptr<Sums> sums_;
  const Direction direction_;
  const layout::BlockLayout layout_;
  const std::span<std::byte> pool_;
  const std::uint64_t max_pitch_;

  Event done_;
  struct Mark {
    explicit Mark(const std::shared_ptr<Context>& context) : event(context, Event::Timing::kOn) {}
    Event event;
    std::size_t bytes = 0;  // of the group that it ends; 0: nothing has been in flight since
    bool staged = false;    // all of them
  };
  std::array<Mark, kMarks> marks_;
  std::size_t next_mark_ = 0;
  std::size_t copies_since_mark_ = 0;
  std::size_t bytes_since_mark_ = 0;
  bool staged_since_mark_ = true;
  StagingPace pace_;
  std::vector<Plan> plans_;  // of all of a block, then of each part
  // Runs that wait for a batched call, at most kGroup.
  std::vector<void*> targets_;
  std::vector<const void*> sources_;
  std::vector<std::size_t> sizes_;
  std::optional<Error> failed_;
};

}  // namespace flexkv::device
