// The sums of blocks that are saved (base/block_sum.h), by short kernels that read device memory alone, on a stream of
// their own beside the copies. Private to the CUDA form; owned by its copy stream's thread.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "flexkv/device/cuda/cuda_owners.h"
#include "flexkv/device/device.h"

namespace flexkv::device {

// REQUIRES of all calls, destruction apart: a ContextScope.
class Sums {
 public:
  // `ctas`: that a kernel has at most.
  static Result<std::unique_ptr<Sums>> create(std::shared_ptr<Context> context, const layout::BlockLayout& layout,
                                              std::uint32_t ctas = kCtas);
  ~Sums();
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  // What the kernels do from now on comes after the event.
  Status order_after(const Event& event) { return event.order(kernels_->get()); }
  // As CopyStream::sum(). An error also if the engine has given the memory of its blocks back: a kernel that touches it
  // would end the engine, where a copy is only refused.
  Status submit(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums);
  // Waits until no kernel runs, and fills what submit() was given since the last time.
  Status collect();

  // A kernel of the model that wants all processors waits until the last one is free. So a kernel here is short: it
  // takes many of them, and few blocks at a time.
  static constexpr std::uint32_t kCtas = 264;

 private:
  explicit Sums(std::shared_ptr<Context> context) : context_(std::move(context)), done_(context_) {}
  Status launch(std::span<const BlockCopy> copies);
  std::byte* shares() const;  // in device memory, of the blocks summed since the last collect()

  const std::shared_ptr<Context> context_;
  std::unique_ptr<Stream> kernels_;
  Event done_;
  std::uint32_t ctas_ = 0;
  std::size_t blocks_at_once_ = 0;
  std::uint64_t shard_bytes_ = 0;
  std::uint32_t tile_count_ = 0;
  const void* first_plane_ = nullptr;
  std::byte* memory_ = nullptr;  // on the device: shares of sums, then the tiles
  void* host_shares_ = nullptr;  // pinned
  std::size_t summed_ = 0;       // blocks
  std::vector<std::span<std::uint64_t>> targets_;
};

}  // namespace flexkv::device
