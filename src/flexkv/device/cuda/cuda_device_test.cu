// The CUDA form on a real GPU; skips where there is none. Self-contained: it needs the driver's libcuda alone.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "flexkv/device/conformance.h"
#include "flexkv/device/cuda/cuda_device_form.h"
#include "flexkv/device/cuda/cuda_owners.h"
#include "flexkv/device/cuda/pinned_pool.h"
#include "flexkv/device/cuda_device.h"
#include "flexkv/device/self_test.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::device {
namespace {

constexpr std::uint32_t kNoStaging = 0;
constexpr std::uint32_t kStageAll = ~0U;

// Each test with blocks copied where they lie, and with all that can be staged.
class CudaDeviceTest : public testing::TestWithParam<std::uint32_t> {
 protected:
  void SetUp() override { open(GetParam()); }
  void open(std::uint32_t stage_below) {
    auto opened = open_cuda_form(0, stage_below);
    if (!opened) GTEST_SKIP() << "no usable GPU: " << opened.error().message;
    device_ = std::move(opened).value();
  }
  void TearDown() override {
    device_.reset();
    for (void* memory : allocated_) cudaFree(memory);
  }

  std::uint64_t device_memory(std::size_t bytes) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    allocated_.push_back(memory);
    return reinterpret_cast<std::uint64_t>(memory);
  }

  static memory::HostRegion host_memory(std::uint64_t bytes) {
    Result<memory::HostRegion> region = memory::HostRegion::create(bytes, {});
    if (!region) std::printf("%s\n", region.error().message.c_str()), std::abort();
    return std::move(region).value();
  }

  std::shared_ptr<Device> device_;
  std::vector<void*> allocated_;
};

TEST_P(CudaDeviceTest, moves_every_example_layout_pinned_and_not) {
  const std::uint64_t base = device_memory(256 << 10);
  memory::HostRegion pool = host_memory(1 << 20);
  for (const bool pinned : {false, true}) {
    if (pinned) {
      const Status status = device_->register_pool(pool.data(), pool.bytes());
      ASSERT_TRUE(status) << status.error().message;
    }
    std::uint64_t seed = pinned ? 100 : 1;
    for (const layout::ExampleCase& example : layout::example_cases(base)) {
      Conformance conformance(*device_, example, base, {pool.data(), pool.bytes()});
      EXPECT_EQ(conformance.run(seed++), "") << example.name << (pinned ? ", pinned" : ", not pinned");
    }
  }
  EXPECT_FALSE(device_->register_pool(pool.data(), pool.bytes())) << "one pool at a time";
  device_->unregister_pool();
  EXPECT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  device_->unregister_pool();
}

TEST_P(CudaDeviceTest, self_test_passes_on_every_example_layout) {
  const std::uint64_t base = device_memory(256 << 10);
  for (const layout::ExampleCase& example : layout::example_cases(base)) {
    const auto layout = layout::BlockLayout::derive(example.tensors, example.blocks);
    const Status status = self_test(*device_, layout.value(), example.tensors);
    EXPECT_TRUE(status) << example.name << ": " << status.error().message;
  }
}

// Extents across a boundary between two pinned pieces, at odd offsets, with rectangles and with batches of runs.
TEST_P(CudaDeviceTest, moves_extents_across_pinned_pieces) {
  memory::HostRegion pool = host_memory(kPinPiece + (8 << 20));
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  const auto start = reinterpret_cast<std::uintptr_t>(pool.data());
  const std::uintptr_t boundary = (start / kPinPiece + 1) * kPinPiece - start;
  ASSERT_LT(boundary, pool.bytes());
  const std::uint64_t base = device_memory(256 << 10);
  for (const layout::ExampleCase& example : layout::example_cases(base)) {
    // Conformance puts block k at k * (shard + 37) + 11: the boundary falls into the middle of the blocks.
    const auto shard = layout::BlockLayout::derive(example.tensors, example.blocks).value().shard_bytes();
    const std::size_t before = std::min<std::size_t>(boundary, shard * 3 + 211);
    const std::size_t bytes = std::min<std::size_t>(pool.bytes() - (boundary - before), shard * 8 + 1000);
    Conformance conformance(*device_, example, base, {pool.data() + boundary - before, bytes});
    EXPECT_EQ(conformance.run(shard), "") << example.name;
  }
  device_->unregister_pool();
}

TEST_P(CudaDeviceTest, copies_through_memory_that_is_being_pinned) {
  memory::HostRegion pool = host_memory(2ULL << 30);
  const std::uint64_t base = device_memory(256 << 10);
  const std::vector<layout::ExampleCase> examples = layout::example_cases(base);
  std::jthread pinning([&] { EXPECT_TRUE(device_->register_pool(pool.data(), pool.bytes())); });
  for (const layout::ExampleCase& example : examples) {
    Conformance conformance(*device_, example, base, {pool.data() + (1 << 20), 1 << 20});
    EXPECT_EQ(conformance.run(5), "") << example.name;
  }
  pinning.join();
  device_->unregister_pool();
}

// The engine fills a block behind a slow memset; the copy must see it, and the engine's next write must not be seen.
TEST_P(CudaDeviceTest, orders_with_the_engine) {
  constexpr std::size_t kBig = 2ULL << 30;
  const std::uint64_t base = device_memory(256 << 10);
  void* big = reinterpret_cast<void*>(device_memory(kBig));
  const std::vector<layout::TensorDesc> tensors = layout::vllm_tensors("BLNHC", {}, base);
  const auto layout = layout::BlockLayout::derive(tensors, 7);
  const std::size_t shard = layout.value().shard_bytes();
  memory::HostRegion pool = host_memory(1 << 20);
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  const auto handle = reinterpret_cast<std::uintptr_t>(engine);
  {
    const auto stream = device_->open_stream(Direction::kToHost, layout.value(), {pool.data(), pool.bytes()});
    ASSERT_TRUE(stream);
    for (int round = 1; round <= 20; ++round) {
      for (int i = 0; i < 8; ++i) cudaMemsetAsync(big, i, kBig, engine);
      cudaMemsetAsync(reinterpret_cast<void*>(base), round, shard, engine);
      const auto event = device_->record(handle);
      ASSERT_TRUE(event);
      ASSERT_TRUE(stream.value()->order_after(*event.value()));
      const BlockCopy copy{0, 0};
      ASSERT_TRUE(stream.value()->submit({&copy, 1}));
      ASSERT_TRUE(device_->order_engine_after(handle, *stream.value()));
      cudaMemsetAsync(reinterpret_cast<void*>(base), 0xEE, shard, engine);
      ASSERT_TRUE(stream.value()->synchronize());
      for (std::size_t i = 0; i < shard; ++i) ASSERT_EQ(pool.data()[i], static_cast<std::byte>(round)) << round;
    }
  }
  cudaStreamSynchronize(engine);
  cudaStreamDestroy(engine);
  device_->unregister_pool();
}

// Planes at equal steps, but each an allocation of its own: no copy of the driver's may span them.
TEST_P(CudaDeviceTest, moves_planes_of_several_allocations) {
  constexpr std::uint32_t kBlocks = 16;
  constexpr std::size_t kPlane = 32ULL << 20;
  std::vector<std::uint64_t> planes;
  for (int i = 0; i < 8; ++i) planes.push_back(device_memory(kPlane));
  std::sort(planes.begin(), planes.end());
  layout::ExampleCase example{"allocations", kBlocks, {}, planes.back() - planes.front() + kPlane};
  for (const std::uint64_t plane : planes) {
    example.tensors.push_back(layout::dense_tensor("plane", plane, 2, {kBlocks, 16, 8, 128}));
  }
  const auto layout = layout::BlockLayout::derive(example.tensors, kBlocks);
  ASSERT_TRUE(layout);
  memory::HostRegion pool = host_memory(8 << 20);
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  const Status status = self_test(*device_, layout.value(), example.tensors);
  EXPECT_TRUE(status) << status.error().message;
  device_->unregister_pool();
}

// A reader on the engine's stream, held at each part, has to see that part, though nothing on the host waits for it.
TEST_P(CudaDeviceTest, holds_the_engine_until_parts_have_arrived) {
  constexpr std::uint32_t kBlocks = 256;
  const layout::KvSize size{.layers = 16, .blocks = kBlocks, .heads = 8, .tokens = 16, .content = 128};
  const std::uint64_t base = device_memory(size.bytes());
  const auto layout = layout::BlockLayout::derive(layout::vllm_tensors("LBNHC", size, base), kBlocks);
  ASSERT_TRUE(layout);
  const std::size_t parts = layout.value().parts().size();
  ASSERT_EQ(parts, 8U);
  memory::HostRegion pool = host_memory(size.bytes());
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  auto stream = device_->open_stream(Direction::kToDevice, layout.value(), {pool.data(), pool.bytes()});
  std::vector<BlockCopy> copies;
  for (std::uint32_t i = 0; i < kBlocks; ++i) copies.push_back({i, std::uint64_t{i} * layout.value().shard_bytes()});
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  const auto handle = reinterpret_cast<std::uintptr_t>(engine);
  const std::size_t plane = size.bytes() / size.layers;
  // In pinned memory: a copy to other memory would wait here for what has not begun.
  void* pinned = nullptr;
  ASSERT_EQ(cudaHostAlloc(&pinned, size.bytes(), cudaHostAllocDefault), cudaSuccess);
  auto* const seen = static_cast<std::byte*>(pinned);
  for (int round = 1; round <= 5; ++round) {
    std::memset(pool.data(), round, pool.bytes());
    std::memset(seen, 0, size.bytes());
    auto gate = device_->make_gate();
    ASSERT_TRUE(gate) << gate.error().message;
    // The engine's side is queued before the first copy is.
    for (std::uint32_t layer = 0; layer < size.layers; ++layer) {
      ASSERT_TRUE(gate.value()->hold(handle, layout.value().part_of(layer) + 1));
      cudaMemcpyAsync(seen + layer * plane, reinterpret_cast<void*>(base + layer * plane), plane,
                      cudaMemcpyDeviceToHost, engine);
    }
    for (std::size_t part = 0; part < parts; ++part) {
      ASSERT_TRUE(stream.value()->submit(copies, part));
      ASSERT_TRUE(gate.value()->raise_after(*stream.value(), static_cast<std::uint32_t>(part + 1)));
    }
    ASSERT_TRUE(stream.value()->synchronize());
    ASSERT_EQ(cudaStreamSynchronize(engine), cudaSuccess);
    for (std::size_t i = 0; i < size.bytes(); i += 64) ASSERT_EQ(seen[i], static_cast<std::byte>(round)) << i;
  }
  // One that nothing will raise.
  {
    auto gate = device_->make_gate();
    ASSERT_TRUE(gate);
    ASSERT_TRUE(gate.value()->hold(handle, 3));
    EXPECT_EQ(cudaStreamQuery(engine), cudaErrorNotReady);
    gate.value()->open();
    EXPECT_EQ(cudaStreamSynchronize(engine), cudaSuccess);
    ASSERT_TRUE(gate.value()->hold(handle, Gate::kMax));
  }
  EXPECT_EQ(cudaStreamSynchronize(engine), cudaSuccess);
  // Many in a row, held after they are gone.
  for (int i = 0; i < 5000; ++i) {
    auto gate = device_->make_gate();
    ASSERT_TRUE(gate);
    ASSERT_TRUE(gate.value()->hold(handle, 1 + i % 8));
  }
  EXPECT_EQ(cudaStreamSynchronize(engine), cudaSuccess);
  stream.value().reset();
  cudaStreamDestroy(engine);
  cudaFreeHost(pinned);
  device_->unregister_pool();
}

TEST_P(CudaDeviceTest, an_error_stays_with_its_stream) {
  const std::uint64_t base = device_memory(256 << 10);
  memory::HostRegion pool = host_memory(1 << 20);
  const BlockCopy copy{0, 0};
  // Addresses that are nobody's: what an engine that freed its cache would leave behind.
  const auto wrong = layout::BlockLayout::derive(layout::vllm_tensors("LBNHC", {}, 4096), 7);
  auto broken = device_->open_stream(Direction::kToDevice, wrong.value(), {pool.data(), pool.bytes()});
  const Status first = broken.value()->submit({&copy, 1});
  ASSERT_FALSE(first);
  EXPECT_EQ(first.error().code, ErrorCode::kDevice);
  EXPECT_FALSE(broken.value()->submit({&copy, 1}));
  EXPECT_FALSE(broken.value()->synchronize());
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "the engine would find our error";

  const std::vector<layout::ExampleCase> examples = layout::example_cases(base);
  EXPECT_EQ(Conformance(*device_, examples[0], base, {pool.data(), pool.bytes()}).run(3), "");
}

TEST_P(CudaDeviceTest, leaves_no_context_current_in_a_thread_that_had_none) {
  const std::uint64_t base = device_memory(4096);
  std::jthread([&] {
    std::vector<std::byte> bytes(4096);
    EXPECT_TRUE(device_->read(base, bytes));
    void* get_current = nullptr;
    cudaDriverEntryPointQueryResult result{};
    ASSERT_EQ(cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &get_current, 12000, cudaEnableDefault, &result),
              cudaSuccess);
    CUcontext current = nullptr;
    EXPECT_EQ(reinterpret_cast<decltype(&cuCtxGetCurrent)>(get_current)(&current), CUDA_SUCCESS);
    EXPECT_EQ(current, nullptr);
  }).join();
}

TEST_P(CudaDeviceTest, pins_and_copies_while_the_engine_captures_a_graph) {
  const std::uint64_t base = device_memory(256 << 10);
  memory::HostRegion pool = host_memory(1 << 20);
  const std::vector<layout::ExampleCase> examples = layout::example_cases(base);
  cudaStream_t engine = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&engine, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(engine, cudaStreamCaptureModeGlobal), cudaSuccess);
  std::jthread([&] {
    EXPECT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
    EXPECT_EQ(Conformance(*device_, examples[0], base, {pool.data(), pool.bytes()}).run(9), "");
    device_->unregister_pool();
  }).join();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(engine, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(engine);
}

std::string way_of(const testing::TestParamInfo<std::uint32_t>& way) {
  return way.param == kNoStaging ? "in_place" : "staged";
}
INSTANTIATE_TEST_SUITE_P(, CudaDeviceTest, testing::Values(kNoStaging, kStageAll), way_of);

class CudaRates : public CudaDeviceTest {
 protected:
  void SetUp() override { open(kStageBelow); }
};

// Not a test: figures for people. Random blocks of 64 planes, as a model of 32 layers has them.
void print_rate(Device& device, const char* what, const std::vector<layout::TensorDesc>& tensors, std::uint32_t blocks,
                std::span<std::byte> pool) {
  const layout::BlockLayout layout = layout::BlockLayout::derive(tensors, blocks).value();
  std::vector<BlockCopy> copies;
  for (std::uint32_t i = 0; i < blocks; ++i) {
    copies.push_back({(i * 61 + 7) % blocks, std::uint64_t{(i * 37 + 3) % blocks} * layout.shard_bytes()});
  }
  for (const Direction direction : {Direction::kToDevice, Direction::kToHost}) {
    auto stream = device.open_stream(direction, layout, pool);
    std::vector<double> rates;
    for (int round = 0; round < 9; ++round) {
      const auto start = std::chrono::steady_clock::now();
      ASSERT_TRUE(stream.value()->submit(copies));
      ASSERT_TRUE(stream.value()->synchronize());
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      rates.push_back(static_cast<double>(blocks) * layout.shard_bytes() / took.count() / 1e9);
    }
    std::sort(rates.begin(), rates.end());
    std::printf("[ INFO     ] %s, %zu rectangle(s) a block, to %s: %.1f GB/s (median of 9)\n", what,
                layout.rectangles().size(), direction == Direction::kToDevice ? "device" : "host", rates[4]);
  }
}

TEST_F(CudaRates, prints_rates_of_methods) {
  constexpr std::uint32_t kBlocks = 512;
  memory::HostRegion pool = host_memory(4ULL << 30);
  const std::span<std::byte> bytes(pool.data(), pool.bytes());
  std::vector<std::uint64_t> planes;
  for (int i = 0; i < 128; ++i) planes.push_back(device_memory(kBlocks * (64U << 10)));
  std::vector<void*> joined = {reinterpret_cast<void*>(device_memory(4ULL << 30))};
  for (const std::uint32_t stage_below : {kNoStaging, kStageAll}) {
    open(stage_below);
    ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
    for (const std::int64_t run : {8, 18, 24, 32, 48, 64}) {
      for (const bool apart : {false, true}) {
        std::vector<layout::TensorDesc> tensors;
        const std::int64_t count = std::min<std::int64_t>(128, (7 << 10) / run);
        for (std::int64_t i = 0; i < count; ++i) {
          const std::uint64_t address =
              apart ? planes[static_cast<std::size_t>(i)]
                    : reinterpret_cast<std::uint64_t>(joined[0]) +
                          static_cast<std::uint64_t>(i) * kBlocks * static_cast<std::uint64_t>(run << 10);
          tensors.push_back(layout::dense_tensor("plane", address, 2, {kBlocks, 16, run, 32}));
        }
        const std::string what = std::to_string(run) + " KiB, " + (apart ? "apart" : "in step") +
                                 (stage_below == 0 ? ", in place" : ", staged");
        print_rate(*device_, what.c_str(), tensors, kBlocks, bytes);
      }
    }
    device_->unregister_pool();
  }
}

TEST_F(CudaRates, prints_rates) {
  constexpr std::uint32_t kBlocks = 256;
  constexpr std::uint64_t kPlane = std::uint64_t{kBlocks} * (32 << 10);
  const std::uint64_t base = device_memory(64 * kPlane * 2);
  memory::HostRegion pool = host_memory(64 * kPlane);
  const auto start = std::chrono::steady_clock::now();
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("[ INFO     ] pool on %s, pinned untouched at %.3f s/GiB\n", pool.description().c_str(),
              took.count() * (1ULL << 30) / static_cast<double>(pool.bytes()));
  const std::span<std::byte> bytes(pool.data(), pool.bytes());
  const layout::KvSize mha{.layers = 64, .blocks = kBlocks, .heads = 8, .tokens = 16, .content = 128};
  const layout::KvSize mla{.layers = 61, .blocks = kBlocks, .heads = 1, .tokens = 16, .content = 576};
  print_rate(*device_, "runs of 32 KiB, planes in step", layout::vllm_tensors("LBNHC", mha, base), kBlocks, bytes);
  print_rate(*device_, "runs of 18 KiB, planes in step", layout::vllm_tensors("LBNHC", mla, base), kBlocks, bytes);
  print_rate(*device_, "whole blocks of 2 MiB", layout::vllm_tensors("BLNHC", mha, base), kBlocks, bytes);
  std::vector<layout::TensorDesc> separate, descending;
  for (std::uint64_t i = 0; i < 32; ++i) {
    separate.push_back(layout::dense_tensor("k", base + i * kPlane, 2, {kBlocks, 16, 8, 128}));
    separate.push_back(layout::dense_tensor("v", base + (i + 32) * kPlane, 2, {kBlocks, 16, 8, 128}));
    descending.push_back(layout::dense_tensor("k", base + (63 - 2 * i) * kPlane, 2, {kBlocks, 16, 8, 128}));
    descending.push_back(layout::dense_tensor("v", base + (62 - 2 * i) * kPlane, 2, {kBlocks, 16, 8, 128}));
  }
  print_rate(*device_, "runs of 32 KiB, K and V apart", separate, kBlocks, bytes);
  print_rate(*device_, "runs of 32 KiB, descending planes", descending, kBlocks, bytes);
  device_->unregister_pool();
}

// Not a test: how long few blocks take, from the call to the return of synchronize().
void print_latency(Device& device, const char* what, const std::vector<layout::TensorDesc>& tensors,
                   std::uint32_t blocks, std::span<std::byte> pool) {
  const layout::BlockLayout layout = layout::BlockLayout::derive(tensors, blocks).value();
  const std::uint64_t slots = pool.size() / layout.shard_bytes();
  for (const Direction direction : {Direction::kToDevice, Direction::kToHost}) {
    auto stream = device.open_stream(direction, layout, pool);
    for (const std::uint32_t count : {1U, 8U, 64U}) {
      for (const bool fresh : {false, true}) {
        std::vector<double> took;
        for (std::uint32_t round = 0; round < 15; ++round) {
          std::vector<BlockCopy> copies;
          for (std::uint32_t i = 0; i < count; ++i) {
            const std::uint32_t n = fresh ? round * count + i : i;
            copies.push_back({(n * 61 + 7) % blocks, (n % slots) * layout.shard_bytes()});
          }
          const auto start = std::chrono::steady_clock::now();
          ASSERT_TRUE(stream.value()->submit(copies));
          const auto submitted = std::chrono::steady_clock::now();
          ASSERT_TRUE(stream.value()->synchronize());
          const std::chrono::duration<double> all = std::chrono::steady_clock::now() - start;
          const std::chrono::duration<double> submit = submitted - start;
          took.push_back(all.count() * 1e6);
          if (round == 14) std::printf("[ INFO     ]   (submit %.0f us) ", submit.count() * 1e6);
        }
        std::sort(took.begin(), took.end());
        std::printf("%s, %u block(s) of %u KiB, %s slots, to %s: %.0f us\n", what, count, layout.shard_bytes() >> 10,
                    fresh ? "fresh" : "same", direction == Direction::kToDevice ? "device" : "host",
                    took[took.size() / 2]);
      }
    }
  }
}

TEST_F(CudaRates, prints_latency) {
  constexpr std::uint32_t kBlocks = 1024;
  const std::uint64_t base = device_memory(8ULL << 30);
  memory::HostRegion pool = host_memory(4ULL << 30);
  ASSERT_TRUE(device_->register_pool(pool.data(), pool.bytes()));
  const std::span<std::byte> bytes(pool.data(), pool.bytes());
  const layout::KvSize mha{.layers = 128, .blocks = kBlocks, .heads = 8, .tokens = 16, .content = 128};
  print_latency(*device_, "planes", layout::vllm_tensors("LBNHC", mha, base), kBlocks, bytes);
  print_latency(*device_, "whole", layout::vllm_tensors("BLNHC", mha, base), kBlocks, bytes);
  device_->unregister_pool();
}

}  // namespace
}  // namespace flexkv::device
