#include "flexkv/testing/faulty_device.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "flexkv/base/block_sum.h"
#include "flexkv/device/conformance.h"
#include "flexkv/device/host_device.h"

namespace flexkv::testing {
namespace {

using device::BlockCopy;
using device::Direction;

// Seven blocks of 384 bytes, block b filled with b + 1, and a pool of zeros.
class FaultyDeviceTest : public ::testing::Test {
 protected:
  FaultyDeviceTest() {
    for (std::uint32_t block = 0; block < size_.blocks; ++block) {
      layout_.for_each_run(block, [&](std::uint64_t address, std::uint32_t, std::uint32_t bytes) {
        std::memset(reinterpret_cast<void*>(address), static_cast<int>(block + 1), bytes);
      });
    }
  }

  std::unique_ptr<device::CopyStream> open() { return device_.open_stream(Direction::kToHost, layout_, pool_).value(); }
  int saved(std::uint32_t block) const { return static_cast<int>(pool_[block * layout_.shard_bytes()]); }

  const layout::KvSize size_;
  std::vector<std::byte> memory_ = std::vector<std::byte>(size_.bytes());
  const layout::BlockLayout layout_ =
      layout::BlockLayout::derive(layout::vllm_tensors("LBNHC", size_, reinterpret_cast<std::uint64_t>(memory_.data())),
                                  size_.blocks)
          .value();
  std::vector<std::byte> pool_ = std::vector<std::byte>(size_.bytes());
  FaultyDevice device_{device::open_host_device().value()};
  const std::vector<BlockCopy> first_two_ = {{0, 0}, {1, layout_.shard_bytes()}};
  const std::vector<BlockCopy> third_ = {{2, 2 * std::uint64_t{layout_.shard_bytes()}}};
};

TEST_F(FaultyDeviceTest, without_a_script_is_the_inner_device) {
  alignas(256) static std::byte memory[256 << 10];
  std::vector<std::byte> pool(1 << 20);
  const auto base = reinterpret_cast<std::uint64_t>(memory);
  for (const layout::ExampleCase& example : layout::example_cases(base)) {
    EXPECT_EQ(device::Conformance(device_, example, base, pool).run(1), "") << example.name;
  }
}

TEST_F(FaultyDeviceTest, refuses_the_scripted_submit_and_breaks_only_that_stream) {
  device_.add({.direction = Direction::kToHost, .submit = 1, .kind = Fault::Kind::kRefuse});
  const auto stream = open();
  EXPECT_TRUE(stream->submit(first_two_));
  EXPECT_FALSE(stream->submit(third_));
  EXPECT_FALSE(stream->synchronize());
  EXPECT_EQ(saved(0), 1);
  EXPECT_EQ(saved(2), 0);
  const auto other = open();
  EXPECT_TRUE(other->submit(third_));
  EXPECT_TRUE(other->synchronize());
  EXPECT_EQ(saved(2), 3);
}

TEST_F(FaultyDeviceTest, truncates) {
  device_.add({.direction = Direction::kToHost, .submit = 0, .kind = Fault::Kind::kTruncate, .keep_blocks = 1});
  const auto stream = open();
  EXPECT_TRUE(stream->submit(first_two_));
  EXPECT_FALSE(stream->synchronize());
  EXPECT_EQ(saved(0), 1);
  EXPECT_EQ(saved(1), 0);
}

TEST_F(FaultyDeviceTest, stalls_until_released_and_keeps_the_order) {
  device_.add({.direction = Direction::kToHost, .submit = 0, .kind = Fault::Kind::kStall});
  const auto stream = open();
  EXPECT_TRUE(stream->submit(first_two_));
  EXPECT_TRUE(stream->submit(third_));
  EXPECT_EQ(saved(0), 0);
  EXPECT_EQ(saved(2), 0);
  std::atomic<bool> released{false};
  std::jthread releaser([&] {
    released = true;
    device_.release();
  });
  EXPECT_TRUE(stream->synchronize());
  EXPECT_TRUE(released);
  EXPECT_EQ(saved(1), 2);
  EXPECT_EQ(saved(2), 3);
}

// The stream says nothing; sums do (here of the device's bytes before the copy).
TEST_F(FaultyDeviceTest, flips_a_bit_and_copies_the_wrong_block_unseen) {
  for (const Fault::Kind kind : {Fault::Kind::kFlipBit, Fault::Kind::kWrongBlock}) {
    FaultyDevice device(device::open_host_device().value());
    device.add({.direction = Direction::kToHost, .submit = 0, .kind = kind});
    const auto stream = device.open_stream(Direction::kToHost, layout_, pool_).value();
    for (const bool faulty : {true, false}) {
      std::uint64_t sums[2] = {kNoSum, kNoSum};
      EXPECT_TRUE(stream->sum(first_two_, sums));
      EXPECT_TRUE(stream->submit(first_two_));
      EXPECT_TRUE(stream->synchronize());
      EXPECT_EQ(saved(0), !faulty ? 1 : kind == Fault::Kind::kFlipBit ? 0x11 : 2);
      EXPECT_EQ(saved(1), 2);
      for (std::size_t i = 0; i < 2; ++i) {
        const auto extent = std::span(pool_).subspan(first_two_[i].host_offset, layout_.shard_bytes());
        EXPECT_EQ(block_sum(extent) == sums[i], !faulty || i == 1);
      }
    }
  }
}

TEST_F(FaultyDeviceTest, refuses_the_pool_as_often_as_told) {
  device_.refuse_pool(1);
  EXPECT_FALSE(device_.register_pool(pool_.data(), pool_.size()));
  EXPECT_TRUE(device_.register_pool(pool_.data(), pool_.size()));
}

}  // namespace
}  // namespace flexkv::testing
