// Sums of what is saved, on a real GPU; skips where there is none. Every example layout is summed in
// cuda_device_test.cu.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/prng.h"
#include "flexkv/device/cuda/cuda_device_form.h"
#include "flexkv/device/cuda/cuda_sums.h"
#include "flexkv/device/cuda_device.h"
#include "flexkv/layout/example_tensors.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::device {
namespace {

class CudaSumsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto opened = open_cuda_form(0, kStageBelow);
    if (!opened) GTEST_SKIP() << "no usable GPU: " << opened.error().message;
    device_ = std::move(opened).value();
  }
  void TearDown() override {
    if (pool_) device_->unregister_pool();
    device_.reset();
    for (void* memory : allocated_) cudaFree(memory);
  }

  // Filled with random bytes.
  std::uint64_t device_memory(std::size_t bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    allocated_.push_back(memory);
    std::vector<std::uint64_t> words(bytes / 8);
    for (std::uint64_t& word : words) word = prng_.next();
    EXPECT_EQ(cudaMemcpy(memory, words.data(), words.size() * 8, cudaMemcpyHostToDevice), cudaSuccess);
    return reinterpret_cast<std::uint64_t>(memory);
  }
  std::span<std::byte> pinned_pool(std::uint64_t bytes) {
    pool_.emplace(memory::HostRegion::create(bytes, {}).value());
    EXPECT_TRUE(device_->register_pool(pool_->data(), pool_->bytes()));
    return {pool_->data(), pool_->bytes()};
  }
  // So many, no device block beside the one before it.
  static std::vector<BlockCopy> copies(const layout::BlockLayout& layout, std::uint32_t count) {
    std::vector<BlockCopy> copies;
    for (std::uint32_t i = 0; i < count; ++i) {
      copies.push_back({(i * 61 + 7) % layout.block_count(), std::uint64_t{i} * layout.shard_bytes()});
    }
    return copies;
  }

  Prng prng_{1};
  std::shared_ptr<Device> device_;
  std::optional<memory::HostRegion> pool_;
  std::vector<void*> allocated_;
};

struct Geometry {
  const char* name;
  std::vector<layout::TensorDesc> tensors;
  std::uint32_t blocks;
};

// As models have them, 64 MiB to 512 MiB in all; then one whose runs fit no lane.
std::vector<Geometry> geometries(std::uint64_t base) {
  const layout::KvSize mha{.layers = 64, .blocks = 256, .heads = 8, .tokens = 16, .content = 128};
  const layout::KvSize mla{.layers = 61, .blocks = 256, .heads = 1, .tokens = 16, .content = 576};
  std::vector<layout::TensorDesc> odd;
  for (std::uint64_t i = 0; i < 16; ++i) {
    odd.push_back(layout::dense_tensor("odd", base + i * (1U << 20) + 2 * i, 2, {256, 16, 73}, 3));
  }
  return {{"runs of 32 KiB", layout::vllm_tensors("LBNHC", mha, base), 256},
          {"runs of 4 KiB", layout::vllm_tensors("LBHNC", mha, base), 256},
          {"runs of 18 KiB", layout::vllm_tensors("LBNHC", mla, base), 256},
          {"whole blocks", layout::vllm_tensors("BLNHC", mha, base), 256},
          {"runs of 2,336 bytes, 2-byte aligned", odd, 256}};
}
constexpr std::size_t kMemoryBytes = 512U << 20;

TEST_F(CudaSumsTest, are_those_of_what_arrives) {
  const std::uint64_t base = device_memory(kMemoryBytes);
  const auto pool = pinned_pool(kMemoryBytes);
  for (const Geometry& geometry : geometries(base)) {
    const auto layout = layout::BlockLayout::derive(geometry.tensors, geometry.blocks).value();
    const auto stream = device_->open_stream(Direction::kToHost, layout, pool).value();
    for (const std::uint32_t count : {1U, 3U, 200U}) {
      const auto blocks = copies(layout, count);
      std::vector<std::uint64_t> sums(count, kNoSum);
      const std::size_t half = count / 2;  // in two calls
      ASSERT_TRUE(stream->sum(std::span(blocks).first(half), std::span(sums).first(half)));
      ASSERT_TRUE(stream->submit(blocks));
      ASSERT_TRUE(stream->sum(std::span(blocks).subspan(half), std::span(sums).subspan(half)));
      ASSERT_TRUE(stream->synchronize());
      for (std::size_t i = 0; i < count; ++i) {
        ASSERT_EQ(sums[i], block_sum(pool.subspan(blocks[i].host_offset, layout.shard_bytes())))
            << geometry.name << ", block " << i << " of " << count;
      }
    }
  }
}

TEST_F(CudaSumsTest, as_many_as_are_allowed_in_one_go) {
  constexpr std::uint32_t kBlocks = 16;
  const std::uint64_t base = device_memory(kBlocks * 4096);
  const auto pool = pinned_pool(kBlocks * 4096);
  const auto tensor = layout::dense_tensor("kv", base, 1, {kBlocks, 4096});
  const auto layout = layout::BlockLayout::derive({&tensor, 1}, kBlocks).value();
  const auto stream = device_->open_stream(Direction::kToHost, layout, pool).value();
  std::vector<BlockCopy> blocks(CopyStream::kSumsMax);
  for (std::uint32_t i = 0; i < blocks.size(); ++i) blocks[i] = {i % kBlocks, std::uint64_t{i % kBlocks} * 4096};
  for (int round = 0; round < 3; ++round) {
    std::vector<std::uint64_t> sums(blocks.size(), kNoSum);
    ASSERT_TRUE(stream->submit(std::span(blocks).first(kBlocks)));
    ASSERT_TRUE(stream->sum(blocks, sums));
    ASSERT_TRUE(stream->synchronize());
    for (std::size_t i = 0; i < sums.size(); ++i) {
      ASSERT_EQ(sums[i], block_sum(pool.subspan(blocks[i].host_offset, 4096))) << i;
    }
  }
}

// What the engine computes before the event is summed; and what it overwrites afterwards, before the copy, is seen.
TEST_F(CudaSumsTest, come_after_the_engine_and_tell_a_torn_save) {
  const auto geometry = geometries(device_memory(kMemoryBytes))[0];
  const auto layout = layout::BlockLayout::derive(geometry.tensors, geometry.blocks).value();
  const auto pool = pinned_pool(64U << 20);
  const auto stream = device_->open_stream(Direction::kToHost, layout, pool).value();
  const auto blocks = copies(layout, 4);
  const std::uint64_t page = geometry.tensors[40].address + blocks[2].device_block * (std::uint64_t{32} << 10);
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  const auto sum_of = [&](std::size_t i) {
    return block_sum(pool.subspan(blocks[i].host_offset, layout.shard_bytes()));
  };
  for (int round = 1; round <= 10; ++round) {
    std::vector<std::uint64_t> sums(blocks.size(), kNoSum);
    for (int i = 0; i < 200; ++i) cudaMemsetAsync(reinterpret_cast<void*>(page), i, 32 << 10, engine);
    cudaMemsetAsync(reinterpret_cast<void*>(page), round, 32 << 10, engine);
    const auto event = device_->record(reinterpret_cast<std::uintptr_t>(engine)).value();
    ASSERT_TRUE(stream->order_after(*event));
    ASSERT_TRUE(stream->sum(blocks, sums));
    ASSERT_TRUE(stream->submit(blocks));
    ASSERT_TRUE(stream->synchronize());
    for (std::size_t i = 0; i < blocks.size(); ++i) ASSERT_EQ(sums[i], sum_of(i)) << round;
    cudaMemset(reinterpret_cast<void*>(page + 5), 0x77, 1);
    ASSERT_TRUE(stream->submit(blocks));
    ASSERT_TRUE(stream->synchronize());
    for (std::size_t i = 0; i < blocks.size(); ++i) ASSERT_EQ(sums[i] == sum_of(i), i != 2) << round;
  }
  cudaStreamDestroy(engine);
}

// ---- figures for people --------------------------------------------------------------------------------------------

double median_ms(int rounds, const std::function<void()>& work) {
  std::vector<double> took;
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    work();
    took.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(took.begin(), took.end());
  return took[took.size() / 2];
}

TEST_F(CudaSumsTest, prints_the_time_of_kernels_by_processors) {
  const std::uint64_t base = device_memory(kMemoryBytes);
  auto context = Context::open(0).value();
  const ContextScope scope(*context);
  for (const Geometry& geometry : geometries(base)) {
    const auto layout = layout::BlockLayout::derive(geometry.tensors, geometry.blocks).value();
    for (const std::uint32_t ctas : {8U, 16U, 32U, 64U, 128U, 264U}) {
      const auto kernels = Sums::create(context, layout, ctas).value();
      for (const std::uint32_t count : {1U, 256U}) {
        const auto blocks = copies(layout, count);
        std::vector<std::uint64_t> sums(count);
        const double ms = median_ms(9, [&] {
          ASSERT_TRUE(kernels->submit(blocks, sums));
          ASSERT_TRUE(kernels->collect());
        });
        const double bytes = static_cast<double>(count) * layout.shard_bytes();
        std::printf("[ INFO     ] %s, %u block(s), %.1f MiB, at most %u CTAs: %.3f ms, %.0f GB/s\n", geometry.name,
                    count, bytes / (1 << 20), ctas, ms, bytes / ms / 1e6);
      }
    }
  }
}

// Stand-ins for a model: a kernel that holds all processors for about 1.4 ms, and one that reads memory.
__global__ void __launch_bounds__(256) hold_processors(float* out, int rounds) {
  extern __shared__ float shared[];
  float a = static_cast<float>(threadIdx.x);
  float b = a + 1;
  for (int i = 0; i < rounds; ++i) {
    a = a * 1.0001F + b;
    b = b * 0.9999F + a;
  }
  shared[threadIdx.x] = a + b;
  if (a == 12345.0F) *out = shared[0];
}

__global__ void __launch_bounds__(1024) read_memory(const uint4* words, std::size_t count, std::uint32_t* out) {
  std::uint32_t x = 0;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const uint4 word = words[i];
    x ^= word.x ^ word.y ^ word.z ^ word.w;
  }
  if (x == 0x12345678) *out = x;
}

TEST_F(CudaSumsTest, prints_what_sums_cost_saves_and_the_model) {
  const std::uint64_t base = device_memory(kMemoryBytes);
  const std::uint64_t other = device_memory(1U << 30);
  const auto pool = pinned_pool(kMemoryBytes);
  auto context = Context::open(0).value();
  const ContextScope scope(*context);
  cudaDeviceProp properties{};
  ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
  const int processors = properties.multiProcessorCount;
  const auto shared = static_cast<int>(properties.sharedMemPerBlockOptin);
  ASSERT_EQ(cudaFuncSetAttribute(hold_processors, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), cudaSuccess);
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  cudaEvent_t begun = nullptr;
  cudaEvent_t ended = nullptr;
  ASSERT_EQ(cudaEventCreate(&begun), cudaSuccess);
  ASSERT_EQ(cudaEventCreate(&ended), cudaSuccess);
  auto* const out = reinterpret_cast<void*>(other);
  struct Model {
    const char* name;
    std::function<void()> launch;
  };
  const Model models[] = {
      {"nothing", [] {}},
      {"kernels that hold all processors",
       [&] { hold_processors<<<processors, 256, shared, engine>>>(static_cast<float*>(out), 300'000); }},
      {"kernels that read memory", [&] {
         read_memory<<<2 * processors, 1024, 0, engine>>>(static_cast<const uint4*>(out), (std::size_t{1} << 30) / 16,
                                                          static_cast<std::uint32_t*>(out));
       }}};
  for (const Geometry& geometry : geometries(base)) {
    const auto layout = layout::BlockLayout::derive(geometry.tensors, geometry.blocks).value();
    const auto stream = device_->open_stream(Direction::kToHost, layout, pool).value();
    const auto blocks = copies(layout, 256);
    std::vector<std::uint64_t> sums(blocks.size());
    const double gigabytes = 256.0 * layout.shard_bytes() / 1e9;
    constexpr std::uint32_t kNotSummed = 0;
    for (const Model& model : models) {
      constexpr int kLaunches = 64;
      for (const std::uint32_t ctas : {kNotSummed, 16U, 64U, 264U, kNotSummed, 16U, 64U, 264U}) {
        std::unique_ptr<Sums> kernels;
        if (ctas != kNotSummed) kernels = Sums::create(context, layout, ctas).value();
        int saves = 0;
        double save_ms = 0;
        // Time of the model's kernels, by the GPU's clock.
        const auto model_ms = [&](bool saving) {
          std::vector<double> took;
          for (int round = 0; round < 5; ++round) {
            cudaEventRecord(begun, engine);
            for (int i = 0; i < kLaunches; ++i) model.launch();
            cudaEventRecord(ended, engine);
            while (saving) {
              save_ms += median_ms(1, [&] {
                if (kernels != nullptr) ASSERT_TRUE(kernels->submit(blocks, sums));
                ASSERT_TRUE(stream->submit(blocks));
                if (kernels != nullptr) ASSERT_TRUE(kernels->collect());
                ASSERT_TRUE(stream->synchronize());
              });
              ++saves;
              if (cudaEventQuery(ended) == cudaSuccess) break;
            }
            cudaEventSynchronize(ended);
            float ms = 0;
            cudaEventElapsedTime(&ms, begun, ended);
            took.push_back(ms);
          }
          std::sort(took.begin(), took.end());
          return took[took.size() / 2];
        };
        const double alone = model_ms(false);
        const double beside = model_ms(true);
        const std::string way = kernels == nullptr ? "not summed" : "summed by " + std::to_string(ctas) + " CTAs";
        const double rate = gigabytes * saves / save_ms * 1e3;
        std::printf("[ INFO     ] %s, beside %s, %s: saves at %.1f GB/s", geometry.name, model.name, way.c_str(), rate);
        if (alone > 1) {
          std::printf(", %.1f ms of kernels %+.1f %%, lost %.2f ms per GB", alone, (beside / alone - 1) * 100,
                      (1 - alone / beside) / rate * 1e3);
        }
        std::printf("\n");
      }
    }
    // One block, from the call to its end.
    for (const bool summed : {false, true, false, true}) {
      const double ms = median_ms(31, [&] {
        if (summed) ASSERT_TRUE(stream->sum({blocks.data(), 1}, {sums.data(), 1}));
        ASSERT_TRUE(stream->submit({blocks.data(), 1}));
        ASSERT_TRUE(stream->synchronize());
      });
      std::printf("[ INFO     ] %s, one block, %s: %.0f us\n", geometry.name, summed ? "summed" : "not summed",
                  ms * 1e3);
    }
  }
  cudaEventDestroy(begun);
  cudaEventDestroy(ended);
  cudaStreamDestroy(engine);
}

}  // namespace
}  // namespace flexkv::device
