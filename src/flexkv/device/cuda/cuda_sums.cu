#include <algorithm>

#include "flexkv/device/cuda/cuda_sums.h"
#include "flexkv/device/sum_tiles.h"

namespace flexkv::device {
namespace {

constexpr std::uint32_t kWarp = 32;
constexpr std::uint32_t kWarps = 8;
// CTAs that a block is shared out among: one alone would take longer for it than the link.
constexpr std::uint32_t kShares = 4;
// Of one kernel. Beside kernels that hold all processors one of ours runs between two of them: that has to do for what
// the link takes meanwhile.
constexpr std::size_t kLaunchBytes = 128U << 20;
constexpr std::size_t kBlocksMax = 512;

// Of the lanes that one CTA sums of a block.
struct Share {
  std::uint64_t low;
  std::uint64_t high;
};
constexpr std::size_t kSharesBytes = CopyStream::kSumsMax * kShares * sizeof(Share);

struct BlockList {
  std::uint32_t blocks[kBlocksMax];
};

__device__ void add_from_lane(BlockSum& sum, std::uint32_t distance) {
  constexpr unsigned kAll = ~0U;
  const unsigned long long low = __shfl_down_sync(kAll, static_cast<unsigned long long>(sum.low()), distance);
  const unsigned long long high = __shfl_down_sync(kAll, static_cast<unsigned long long>(sum.high()), distance);
  sum.add(BlockSum(low, high));
}

// Share s of block b goes to shares[b * kShares + s].
__global__ void __launch_bounds__(kWarps* kWarp)
    sum_blocks(const layout::Run* tiles, std::uint32_t tile_count, BlockList list, std::uint32_t count, Share* shares) {
  __shared__ Share of_warps[kWarps];
  const std::uint32_t warp = threadIdx.x / kWarp;
  const std::uint32_t thread = threadIdx.x % kWarp;
  for (std::uint32_t i = blockIdx.x; i < count * kShares; i += gridDim.x) {
    TileSummer summer(tiles, tile_count, list.blocks[i / kShares]);
    for (std::uint32_t tile = i % kShares * kWarps + warp; tile < tile_count; tile += kShares * kWarps) {
      summer.add(tile, thread, kWarp);
    }
    BlockSum sum = summer.sum();
    for (std::uint32_t distance = kWarp / 2; distance > 0; distance /= 2) add_from_lane(sum, distance);
    if (thread == 0) of_warps[warp] = {sum.low(), sum.high()};
    __syncthreads();
    if (threadIdx.x == 0) {
      for (std::uint32_t other = 1; other < kWarps; ++other) {
        sum.add(BlockSum(of_warps[other].low, of_warps[other].high));
      }
      shares[i] = {sum.low(), sum.high()};
    }
    __syncthreads();
  }
}

}  // namespace

Result<std::unique_ptr<Sums>> Sums::create(std::shared_ptr<Context> context, const layout::BlockLayout& layout,
                                           std::uint32_t ctas) {
  std::unique_ptr<Sums> sums(new Sums(context));
  Result<std::unique_ptr<Stream>> kernels = Stream::create(context);
  if (!kernels) return kernels.error();
  sums->kernels_ = std::move(kernels).value();
  const std::vector<layout::Run> tiles = tiles_of(layout);
  sums->ctas_ = ctas;
  sums->blocks_at_once_ = std::clamp<std::size_t>(kLaunchBytes / layout.shard_bytes(), 1, kBlocksMax);
  sums->shard_bytes_ = layout.shard_bytes();
  sums->tile_count_ = static_cast<std::uint32_t>(tiles.size());
  sums->first_plane_ = reinterpret_cast<const void*>(tiles.front().address);

  const std::size_t tile_bytes = tiles.size() * sizeof(layout::Run);
  void* memory = nullptr;
  Status status = checked(cudaMalloc(&memory, kSharesBytes + tile_bytes), "cudaMalloc");
  if (!status) return status.error();
  sums->memory_ = static_cast<std::byte*>(memory);
  status = checked(cudaHostAlloc(&sums->host_shares_, kSharesBytes, cudaHostAllocDefault), "cudaHostAlloc");
  if (!status) return status.error();
  const cudaStream_t stream = sums->kernels_->get();
  status =
      checked(cudaMemcpyAsync(sums->memory_ + kSharesBytes, tiles.data(), tile_bytes, cudaMemcpyHostToDevice, stream),
              "cudaMemcpyAsync");
  // The first launch loads the kernel, which takes long and is not for the middle of a transfer.
  if (status) status = sums->launch({});
  if (status) status = checked(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  if (!status) return status.error();
  return Result<std::unique_ptr<Sums>>(std::move(sums));
}

Sums::~Sums() {
  ContextScope scope(*context_);
  if (!scope.ok()) return;
  if (kernels_ != nullptr) (void)checked(cudaStreamSynchronize(kernels_->get()), "cudaStreamSynchronize");
  (void)checked(cudaFreeHost(host_shares_), "cudaFreeHost");
  (void)checked(cudaFree(memory_), "cudaFree");
}

std::byte* Sums::shares() const { return memory_ + summed_ * kShares * sizeof(Share); }

Status Sums::launch(std::span<const BlockCopy> copies) {
  BlockList list{};
  for (std::size_t i = 0; i < copies.size(); ++i) list.blocks[i] = copies[i].device_block;
  const auto count = static_cast<std::uint32_t>(copies.size());
  const auto* const tiles = reinterpret_cast<const layout::Run*>(memory_ + kSharesBytes);
  sum_blocks<<<std::clamp(count * kShares, 1U, ctas_), kWarps * kWarp, 0, kernels_->get()>>>(
      tiles, tile_count_, list, count, reinterpret_cast<Share*>(shares()));
  return checked(cudaGetLastError(), "kernel of sums");
}

Status Sums::submit(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) {
  FLEXKV_ASSERT(copies.size() == sums.size() && summed_ + copies.size() <= CopyStream::kSumsMax);
  Status status = check_device_memory(first_plane_);
  if (status && !sums.empty()) targets_.push_back(sums);
  while (status && !copies.empty()) {
    const auto round = copies.first(std::min(copies.size(), blocks_at_once_));
    copies = copies.subspan(round.size());
    status = launch(round);
    summed_ += round.size();
  }
  return status;
}

Status Sums::collect() {
  const cudaStream_t stream = kernels_->get();
  Status status;
  if (summed_ > 0) {
    status = checked(
        cudaMemcpyAsync(host_shares_, memory_, summed_ * kShares * sizeof(Share), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
    if (status) status = done_.record(stream);
    if (status) status = done_.wait();
    // Without an answer to that, kernels may run still.
    if (!status) (void)checked(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }
  const auto* share = static_cast<const Share*>(host_shares_);
  for (const std::span<std::uint64_t> sums : targets_) {
    for (std::uint64_t& value : sums) {
      BlockSum sum;
      for (std::uint32_t i = 0; i < kShares; ++i, ++share) sum.add(BlockSum(share->low, share->high));
      value = status ? sum.value(shard_bytes_) : kNoSum;
    }
  }
  targets_.clear();
  summed_ = 0;
  return status;
}

}  // namespace flexkv::device
