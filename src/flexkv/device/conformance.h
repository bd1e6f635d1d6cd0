// What every device form has to do, checked on one example layout. For tests of the forms.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/prng.h"
#include "flexkv/device/device.h"
#include "flexkv/layout/element_walk.h"
#include "flexkv/layout/example_tensors.h"

namespace flexkv::device {

class Conformance {
 public:
  // `base`: device memory of example.memory_bytes, in which example's tensors lie. `pool`: where host extents go.
  Conformance(Device& device, const layout::ExampleCase& example, std::uint64_t base, std::span<std::byte> pool)
      : device_(device),
        example_(example),
        base_(base),
        pool_(pool),
        layout_(layout::BlockLayout::derive(example.tensors, example.blocks).value()),
        memory_(example.memory_bytes) {}

  // Empty when all is well, else what was wrong.
  std::string run(std::uint64_t seed) {
    Prng prng(seed);
    for (std::byte& byte : memory_) byte = static_cast<std::byte>(prng.next() >> 40);
    if (!device_.write(base_, memory_)) return "write failed";
    if (std::string wrong = save_all(prng); !wrong.empty()) return "to host: " + wrong;
    if (std::string wrong = load_some(prng, false); !wrong.empty()) return "to device: " + wrong;
    if (std::string wrong = load_some(prng, true); !wrong.empty()) return "to device, by parts: " + wrong;
    return refusals();
  }

 private:
  static constexpr std::byte kPoison{0xC3};

  // Every block once, in any order, to extents in any order with gaps of odd sizes between them.
  std::vector<BlockCopy> any_copies(Prng& prng) {
    std::vector<BlockCopy> copies;
    for (std::uint32_t block = 0; block < example_.blocks; ++block) {
      copies.push_back({block, block * (std::uint64_t{layout_.shard_bytes()} + 37) + 11});
    }
    for (std::size_t i = copies.size(); i > 1; --i) {
      const std::size_t j = prng.below(i);
      std::swap(copies[i - 1].host_offset, copies[j].host_offset);
      std::swap(copies[i - 1], copies[prng.below(i)]);
    }
    return copies;
  }

  std::string copy(Direction direction, std::span<const BlockCopy> copies, bool by_parts = false) {
    auto stream = device_.open_stream(direction, layout_, pool_);
    if (!stream) return stream.error().message;
    for (std::size_t part = 0; by_parts && part < layout_.parts().size(); ++part) {
      if (Status status = stream.value()->submit(copies, part); !status) return status.error().message;
    }
    if (direction == Direction::kToHost) {
      sums_.assign(copies.size(), kNoSum);
      if (Status status = stream.value()->sum(copies, sums_); !status) return status.error().message;
    }
    if (!by_parts) {
      if (Status status = stream.value()->submit(copies); !status) return status.error().message;
    }
    if (Status status = stream.value()->synchronize(); !status) return status.error().message;
    return {};
  }

  std::string save_all(Prng& prng) {
    std::fill(pool_.begin(), pool_.end(), kPoison);
    std::vector<std::byte> expected(pool_.size(), kPoison);
    const std::vector<BlockCopy> copies = any_copies(prng);
    for (const BlockCopy& one : copies) {
      for (const layout::Piece& piece : layout::pieces_of_block(example_.tensors, one.device_block)) {
        std::memcpy(expected.data() + one.host_offset + piece.host_offset, memory_.data() + (piece.address - base_),
                    piece.bytes);
      }
    }
    if (std::string wrong = copy(Direction::kToHost, copies); !wrong.empty()) return wrong;
    for (std::size_t i = 0; i < copies.size(); ++i) {
      const auto extent = std::span(expected).subspan(copies[i].host_offset, layout_.shard_bytes());
      if (sums_[i] != block_sum(extent)) return "wrong sum of block " + std::to_string(copies[i].device_block);
    }
    return std::equal(pool_.begin(), pool_.end(), expected.begin()) ? "" : "wrong bytes in the pool";
  }

  std::string load_some(Prng& prng, bool by_parts) {
    for (std::byte& byte : pool_) byte = static_cast<std::byte>(prng.next() >> 40);
    std::vector<BlockCopy> copies = any_copies(prng);
    copies.resize(copies.size() / 2);
    for (const BlockCopy& one : copies) {
      for (const layout::Piece& piece : layout::pieces_of_block(example_.tensors, one.device_block)) {
        std::memcpy(memory_.data() + (piece.address - base_), pool_.data() + one.host_offset + piece.host_offset,
                    piece.bytes);
      }
    }
    if (std::string wrong = copy(Direction::kToDevice, copies, by_parts); !wrong.empty()) return wrong;
    return memory_unchanged() ? "" : "wrong bytes on the device";
  }

  // `memory_` is what the device should hold.
  bool memory_unchanged() {
    std::vector<std::byte> found(memory_.size());
    return device_.read(base_, found).ok() && found == memory_;
  }

  std::string refusals() {
    const std::uint64_t end = pool_.size() - layout_.shard_bytes();
    for (const BlockCopy bad : {BlockCopy{example_.blocks, 0}, BlockCopy{~0U, 0}, BlockCopy{0, end + 1},
                                BlockCopy{0, pool_.size()}, BlockCopy{0, ~std::uint64_t{0}}}) {
      auto stream = device_.open_stream(Direction::kToDevice, layout_, pool_);
      if (!stream) return stream.error().message;
      const std::vector<BlockCopy> copies = {{0, 0}, bad};
      if (stream.value()->submit(copies)) return "a copy out of range was accepted";
      if (!stream.value()->submit({})) return "a refused copy harmed the stream";
      if (!stream.value()->synchronize()) return "a refused copy harmed the stream";
    }
    return memory_unchanged() ? "" : "a refused submit copied something";
  }

  Device& device_;
  const layout::ExampleCase& example_;
  const std::uint64_t base_;
  const std::span<std::byte> pool_;
  const layout::BlockLayout layout_;
  std::vector<std::byte> memory_;
  std::vector<std::uint64_t> sums_;
};

}  // namespace flexkv::device
