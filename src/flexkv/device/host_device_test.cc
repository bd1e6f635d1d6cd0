#include "flexkv/device/host_device.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "flexkv/device/conformance.h"

namespace flexkv::device {
namespace {

// Memory aligned as example_cases() wants it.
struct alignas(256) Memory {
  std::byte bytes[256 << 10];
};

TEST(HostDevice, moves_every_example_layout) {
  auto memory = std::make_unique<Memory>();
  const auto base = reinterpret_cast<std::uint64_t>(memory->bytes);
  std::vector<std::byte> pool(1 << 20);
  const std::shared_ptr<Device> device = open_host_device().value();
  ASSERT_TRUE(device->register_pool(pool.data(), pool.size()));
  for (const layout::ExampleCase& example : layout::example_cases(base)) {
    ASSERT_LE(example.memory_bytes, sizeof(Memory));
    EXPECT_EQ(Conformance(*device, example, base, pool).run(7), "") << example.name;
  }
  device->unregister_pool();
}

TEST(HostDevice, orders_by_itself) {
  const std::shared_ptr<Device> device = open_host_device().value();
  const std::vector<layout::TensorDesc> tensors = layout::vllm_tensors("LBNHC", {}, 4096);
  const auto layout = layout::BlockLayout::derive(tensors, 7);
  std::vector<std::byte> pool(layout.value().shard_bytes());
  const auto stream = device->open_stream(Direction::kToHost, layout.value(), pool);
  const auto event = device->record(0);
  ASSERT_TRUE(event);
  EXPECT_TRUE(stream.value()->order_after(*event.value()));
  EXPECT_TRUE(device->order_engine_after(0, *stream.value()));
  EXPECT_TRUE(stream.value()->synchronize());
}

TEST(HostDevice, holds_the_engine_at_a_gate_until_it_is_raised_or_opened) {
  const std::shared_ptr<Device> device = open_host_device().value();
  const auto layout = layout::BlockLayout::derive(layout::vllm_tensors("LBNHC", {}, 4096), 7);
  std::vector<std::byte> pool(layout.value().shard_bytes());
  const auto stream = device->open_stream(Direction::kToDevice, layout.value(), pool);
  const std::shared_ptr<Gate> gate = device->make_gate().value();
  EXPECT_TRUE(gate->hold(0, 0));
  std::atomic<std::uint32_t> passed{0};
  std::jthread engine([&] {
    for (const std::uint32_t count : {1U, 2U, 7U}) {
      EXPECT_TRUE(gate->hold(0, count));
      passed = count;
    }
  });
  const auto wait_until_passed = [&](std::uint32_t count) {
    while (passed != count) std::this_thread::yield();
  };
  ASSERT_TRUE(gate->raise_after(*stream.value(), 1));
  wait_until_passed(1);
  ASSERT_TRUE(gate->raise_after(*stream.value(), 2));
  wait_until_passed(2);
  EXPECT_EQ(passed, 2U);
  gate->open();
  wait_until_passed(7);
}

}  // namespace
}  // namespace flexkv::device
