#include "flexkv/device/self_test.h"

#include <gtest/gtest.h>

#include <cstring>

#include "flexkv/device/host_device.h"
#include "flexkv/layout/example_tensors.h"

namespace flexkv::device {
namespace {

struct alignas(256) Memory {
  std::byte bytes[256 << 10];
};

class SelfTestTest : public testing::Test {
 protected:
  SelfTestTest() { std::memset(memory_->bytes, 0x3C, sizeof(Memory)); }

  bool untouched() const {
    return std::all_of(std::begin(memory_->bytes), std::end(memory_->bytes),
                       [](std::byte byte) { return byte == std::byte{0x3C}; });
  }

  std::unique_ptr<Memory> memory_ = std::make_unique<Memory>();
  const std::uint64_t base_ = reinterpret_cast<std::uint64_t>(memory_->bytes);
  const std::shared_ptr<Device> device_ = open_host_device().value();
};

TEST_F(SelfTestTest, accepts_right_plans_and_puts_everything_back) {
  for (const layout::ExampleCase& example : layout::example_cases(base_)) {
    const auto layout = layout::BlockLayout::derive(example.tensors, example.blocks);
    const Status status = self_test(*device_, layout.value(), example.tensors);
    EXPECT_TRUE(status) << example.name << ": " << status.error().message;
    EXPECT_TRUE(untouched()) << example.name;
  }
}

// Host memory whose copies also change one byte that they have no business with.
class Scribbler final : public Device {
 public:
  Scribbler(std::shared_ptr<Device> inner, std::byte* victim) : inner_(std::move(inner)), victim_(victim) {}

  std::uint32_t efficient_copy_bytes() const override { return inner_->efficient_copy_bytes(); }
  std::uint32_t saves_per_sum() const override { return inner_->saves_per_sum(); }
  Result<std::shared_ptr<Gate>> make_gate() override { return inner_->make_gate(); }
  std::string_view name() const override { return "scribbler"; }
  Status register_pool(std::byte* base, std::size_t bytes) override { return inner_->register_pool(base, bytes); }
  void unregister_pool() override { inner_->unregister_pool(); }
  Result<std::unique_ptr<CopyStream>> open_stream(Direction direction, const layout::BlockLayout& layout,
                                                  std::span<std::byte> pool) override {
    *victim_ = static_cast<std::byte>(std::to_integer<unsigned>(*victim_) + 1);
    return inner_->open_stream(direction, layout, pool);
  }
  Result<std::unique_ptr<EngineEvent>> record(std::uintptr_t stream) override { return inner_->record(stream); }
  Status order_engine_after(std::uintptr_t engine, CopyStream& stream) override {
    return inner_->order_engine_after(engine, stream);
  }
  Status read(std::uint64_t address, std::span<std::byte> bytes) override { return inner_->read(address, bytes); }
  Status write(std::uint64_t address, std::span<const std::byte> bytes) override {
    return inner_->write(address, bytes);
  }

 private:
  const std::shared_ptr<Device> inner_;
  std::byte* const victim_;
};

TEST_F(SelfTestTest, sees_a_changed_byte_in_the_next_block) {
  const layout::KvSize size;
  const std::vector<layout::TensorDesc> tensors = layout::vllm_tensors("LBNHC", size, base_);
  const auto layout = layout::BlockLayout::derive(tensors, size.blocks);
  Scribbler scribbler(device_, memory_->bytes + 128 + 5);  // layer 0 has 128 bytes a block
  const Status status = self_test(scribbler, layout.value(), tensors);
  ASSERT_FALSE(status);
  EXPECT_NE(status.error().message.find("writing beside block 0"), std::string::npos) << status.error().message;
  EXPECT_NE(status.error().message.find("\"layer0\", byte 5"), std::string::npos) << status.error().message;
}

// A plan that belongs to other tensors stands for a plan with a mistake in it.
TEST_F(SelfTestTest, rejects_wrong_plans_naming_the_tensor_and_puts_everything_back) {
  const layout::KvSize size;
  const std::vector<layout::TensorDesc> tensors = layout::vllm_tensors("LBNHC", size, base_);
  const auto rejected = [&](std::vector<layout::TensorDesc> wrong, const std::string& name) {
    const auto layout = layout::BlockLayout::derive(wrong, size.blocks);
    const Status status = self_test(*device_, layout.value(), tensors);
    ASSERT_FALSE(status);
    EXPECT_NE(status.error().message.find('"' + name + '"'), std::string::npos) << status.error().message;
  };
  std::vector<layout::TensorDesc> swapped = tensors;
  std::swap(swapped[1].address, swapped[2].address);
  rejected(swapped, "layer1");
  EXPECT_TRUE(untouched());
  rejected(layout::vllm_tensors("BLNHC", size, base_), "layer1");

  // Twice the bytes.
  std::vector<layout::TensorDesc> twice = layout::vllm_tensors("LBNHC", {.blocks = 14}, base_);
  for (layout::TensorDesc& tensor : twice) tensor.kernel_blocks_per_block = 2;
  const auto layout = layout::BlockLayout::derive(twice, size.blocks);
  const Status status = self_test(*device_, layout.value(), tensors);
  ASSERT_FALSE(status);
  EXPECT_NE(status.error().message.find("another size"), std::string::npos) << status.error().message;
}

}  // namespace
}  // namespace flexkv::device
