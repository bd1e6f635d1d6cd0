#include <algorithm>

#include "flexkv/device/cuda/cuda_staging.h"

namespace flexkv::device {
namespace {

using Unit = uint4;
constexpr std::uint32_t kThreads = 256;
// Enough to scatter several times as fast as the link takes it, few enough to leave the model its processors.
constexpr std::uint32_t kCtas = 32;
constexpr std::size_t kRunsMax = 8192;
constexpr std::size_t kBufferBytes = 8U << 20;
constexpr std::size_t kBlocksMax = 256;

struct BlockList {
  std::uint32_t blocks[kBlocksMax];
};

// Each CTA moves whole runs.
__global__ void scatter_runs(const layout::Run* runs, StagedStretch stretch, BlockList list, std::uint32_t blocks,
                             const std::byte* buffer) {
  const std::uint32_t count = stretch.runs * blocks;
  for (std::uint32_t i = blockIdx.x; i < count; i += gridDim.x) {
    const std::uint32_t block = i / stretch.runs;
    const layout::Run& run = runs[stretch.first_run + i % stretch.runs];
    const auto* const __restrict__ from = reinterpret_cast<const Unit*>(buffer + std::size_t{block} * stretch.bytes +
                                                                        (run.host_offset - stretch.host_begin));
    auto* const __restrict__ to = reinterpret_cast<Unit*>(run.address + list.blocks[block] * run.block_stride);
    const std::uint32_t units = run.bytes / sizeof(Unit);
#pragma unroll 4
    for (std::uint32_t unit = threadIdx.x; unit < units; unit += kThreads) to[unit] = from[unit];
  }
}

// Those of its parts, which are all of a block: a run of the whole may go over the end of a part.
std::vector<layout::Run> runs_of(const layout::BlockLayout& layout) {
  std::vector<layout::Run> runs;
  for (const layout::Part& part : layout.parts()) {
    for (const layout::Rectangle& r : part.rectangles) {
      for (std::uint32_t row = 0; row < r.rows; ++row) {
        runs.push_back({r.address + row * r.row_step, r.block_stride, r.host_offset + row * r.host_step, r.row_bytes});
      }
    }
  }
  std::sort(runs.begin(), runs.end(),
            [](const layout::Run& a, const layout::Run& b) { return a.host_offset < b.host_offset; });
  return runs;
}

}  // namespace

std::size_t StagedStretch::blocks_at_once() const { return std::min(kBlocksMax, kBufferBytes / bytes); }

bool Staging::suits(const layout::BlockLayout& layout, std::uint32_t stage_below) {
  const std::vector<layout::Run> runs = runs_of(layout);
  return runs.size() > 1 && runs.size() <= kRunsMax && layout.shard_bytes() / runs.size() < stage_below &&
         layout.shard_bytes() <= kBufferBytes && std::all_of(runs.begin(), runs.end(), [](const layout::Run& run) {
           return (run.address | run.block_stride | run.host_offset | run.bytes) % sizeof(Unit) == 0;
         });
}

Result<std::unique_ptr<Staging>> Staging::create(std::shared_ptr<Context> context, const layout::BlockLayout& layout) {
  std::unique_ptr<Staging> staging(new Staging(context));
  Result<std::unique_ptr<Stream>> kernels = Stream::create_urgent(context);
  if (!kernels) return kernels.error();
  staging->kernels_ = std::move(kernels).value();
  const std::vector<layout::Run> runs = runs_of(layout);
  staging->first_plane_ = reinterpret_cast<const void*>(runs.front().address);
  const auto add = [&](std::uint32_t begin, std::uint32_t end) {
    const auto at = [&](std::uint32_t offset) {
      return static_cast<std::uint32_t>(
          std::partition_point(runs.begin(), runs.end(),
                               [&](const layout::Run& run) { return run.host_offset < offset; }) -
          runs.begin());
    };
    staging->stretches_.push_back({begin, end - begin, at(begin), at(end) - at(begin)});
  };
  add(0, layout.shard_bytes());
  for (const layout::Part& part : layout.parts()) add(part.host_begin, part.host_end);

  constexpr std::size_t kBuffersBytes = 2 * kBufferBytes;
  const std::size_t run_bytes = runs.size() * sizeof(layout::Run);
  void* memory = nullptr;
  Status status = checked(cudaMalloc(&memory, kBuffersBytes + run_bytes), "cudaMalloc");
  if (!status) return status.error();
  staging->memory_ = static_cast<std::byte*>(memory);
  staging->runs_ = reinterpret_cast<const layout::Run*>(staging->memory_ + kBuffersBytes);
  const cudaStream_t stream = staging->kernels_->get();
  status =
      checked(cudaMemcpyAsync(staging->memory_ + kBuffersBytes, runs.data(), run_bytes, cudaMemcpyHostToDevice, stream),
              "cudaMemcpyAsync");
  // The first launch loads the kernel, which takes long and is not for the middle of a transfer.
  if (status) status = staging->launch({}, {});
  if (status) status = checked(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  if (!status) return status.error();
  return Result<std::unique_ptr<Staging>>(std::move(staging));
}

Staging::~Staging() {
  ContextScope scope(*context_);
  if (!scope.ok()) return;
  synchronize();
  (void)checked(cudaFree(memory_), "cudaFree");
}

void Staging::synchronize() { (void)checked(cudaStreamSynchronize(kernels_->get()), "cudaStreamSynchronize"); }

std::byte* Staging::buffer() const { return memory_ + current_ * kBufferBytes; }

Status Staging::launch(std::span<const BlockCopy> blocks, const StagedStretch& stretch) {
  BlockList list{};
  for (std::size_t i = 0; i < blocks.size(); ++i) list.blocks[i] = blocks[i].device_block;
  const auto count = static_cast<std::uint32_t>(blocks.size());
  const std::uint32_t ctas = std::clamp(count * stretch.runs, 1U, kCtas);
  scatter_runs<<<ctas, kThreads, 0, kernels_->get()>>>(runs_, stretch, list, count, buffer());
  return checked(cudaGetLastError(), "staging kernel");
}

// All planes of an engine's cache come and go together, so one tells of all.
Status Staging::check_memory() const { return check_device_memory(first_plane_); }

std::uint64_t Staging::address(std::size_t i, const StagedStretch& stretch) const {
  return reinterpret_cast<std::uint64_t>(buffer() + i * stretch.bytes);
}

Status Staging::scatter(std::span<const BlockCopy> blocks, const StagedStretch& stretch, cudaStream_t copies) {
  Buffer& buffer = buffers_[current_];
  Status status = buffer.filled.record(copies);
  if (status) status = buffer.filled.order(kernels_->get());
  if (status) status = launch(blocks, stretch);
  if (status) status = buffer.emptied.record(kernels_->get());
  current_ = 1 - current_;
  return status;
}

}  // namespace flexkv::device
