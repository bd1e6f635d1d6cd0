#include "flexkv/device/self_test.h"

#include <algorithm>
#include <string>
#include <vector>

#include "flexkv/base/block_sum.h"
#include "flexkv/base/prng.h"
#include "flexkv/layout/element_walk.h"

namespace flexkv::device {
namespace {

using layout::Piece;

// Host bytes before and behind the extent, to see that a copy to the host stays inside.
constexpr std::size_t kGuardBytes = 4096;
constexpr std::byte kPoison{0xA5};

class SelfTest {
 public:
  SelfTest(Device& device, const layout::BlockLayout& layout, std::span<const layout::TensorDesc> tensors)
      : device_(device), layout_(layout), tensors_(tensors) {}

  Status test_block(std::uint32_t block) {
    const std::vector<Piece> pieces = layout::pieces_of_block(tensors_, block);
    if (pieces.empty() || pieces.back().host_offset + pieces.back().bytes != layout_.shard_bytes()) {
      return Error{ErrorCode::kDevice, "self test: the plan's block has another size than the tensors' elements"};
    }
    Result<std::vector<std::byte>> original = read(pieces);
    if (!original) return original.error();
    Status tested = write_and_check(block, pieces);
    if (Status restored = write(pieces, original.value()); tested && !restored) return restored;
    return tested;
  }

 private:
  Status write_and_check(std::uint32_t block, const std::vector<Piece>& pieces) {
    std::vector<Piece> neighbours;
    if (layout_.block_count() > 1) {
      neighbours = layout::pieces_of_block(tensors_, block == 0 ? 1 : block - 1);
    }
    const Result<std::vector<std::byte>> neighbours_before = read(neighbours);
    if (!neighbours_before) return neighbours_before.error();

    std::vector<std::byte> pattern(layout_.shard_bytes());
    Prng prng(0x5E1F7E57 + block);
    for (std::byte& byte : pattern) byte = static_cast<std::byte>(prng.next() >> 32);
    std::vector<std::byte> pool(layout_.shard_bytes() + 2 * kGuardBytes, kPoison);
    // First by parts, with other bytes, so that the second writing shows what it did.
    std::transform(pattern.begin(), pattern.end(), pool.begin() + kGuardBytes, [](std::byte byte) { return ~byte; });
    if (Status status = copy_parts(block, pool); !status) return status;
    const Result<std::vector<std::byte>> by_parts = read(pieces);
    if (!by_parts) return by_parts.error();
    const std::vector<std::byte> complement(pool.begin() + kGuardBytes, pool.end() - kGuardBytes);
    if (by_parts.value() != complement) {
      return mismatch("writing parts of", block, pieces, by_parts.value(), complement);
    }

    std::copy(pattern.begin(), pattern.end(), pool.begin() + kGuardBytes);
    if (Status status = copy(Direction::kToDevice, block, pool); !status) return status;

    const Result<std::vector<std::byte>> written = read(pieces);
    if (!written) return written.error();
    if (written.value() != pattern) {
      return mismatch("writing", block, pieces, written.value(), pattern);
    }
    const Result<std::vector<std::byte>> neighbours_after = read(neighbours);
    if (!neighbours_after) return neighbours_after.error();
    if (neighbours_after.value() != neighbours_before.value()) {
      return mismatch("writing beside", block, neighbours, neighbours_after.value(), neighbours_before.value());
    }

    std::fill(pool.begin(), pool.end(), kPoison);
    if (Status status = copy(Direction::kToHost, block, pool); !status) return status;
    const std::vector<std::byte> back(pool.begin() + kGuardBytes, pool.end() - kGuardBytes);
    if (back != pattern) return mismatch("reading", block, pieces, back, pattern);
    if (sum_ != kNoSum && sum_ != block_sum(pattern)) {
      return Error{ErrorCode::kDevice, "self test: the device adds up the bytes of block " + std::to_string(block) +
                                           " to another sum than the host. The cache must stay off for these tensors."};
    }
    const auto is_poison = [](std::byte byte) { return byte == kPoison; };
    if (!std::all_of(pool.begin(), pool.begin() + kGuardBytes, is_poison) ||
        !std::all_of(pool.end() - kGuardBytes, pool.end(), is_poison)) {
      return Error{ErrorCode::kDevice, "self test: reading block " + std::to_string(block) + " wrote past its extent"};
    }
    return {};
  }

  Status copy(Direction direction, std::uint32_t block, std::span<std::byte> pool) {
    Result<std::unique_ptr<CopyStream>> stream = device_.open_stream(direction, layout_, pool);
    if (!stream) return stream.error();
    const BlockCopy one{block, kGuardBytes};
    Status submitted = stream.value()->submit({&one, 1});
    if (submitted && direction == Direction::kToHost) submitted = stream.value()->sum({&one, 1}, {&sum_, 1});
    const Status done = stream.value()->synchronize();
    return submitted ? done : submitted;
  }

  Status copy_parts(std::uint32_t block, std::span<std::byte> pool) {
    Result<std::unique_ptr<CopyStream>> stream = device_.open_stream(Direction::kToDevice, layout_, pool);
    if (!stream) return stream.error();
    const BlockCopy one{block, kGuardBytes};
    Status submitted;
    for (std::size_t part = 0; part < layout_.parts().size() && submitted; ++part) {
      submitted = stream.value()->submit({&one, 1}, part);
    }
    const Status done = stream.value()->synchronize();
    return submitted ? done : submitted;
  }

  Result<std::vector<std::byte>> read(const std::vector<Piece>& pieces) {
    std::vector<std::byte> bytes(pieces.empty() ? 0 : pieces.back().host_offset + pieces.back().bytes);
    for (const Piece& piece : pieces) {
      Status status = device_.read(piece.address, std::span(bytes).subspan(piece.host_offset, piece.bytes));
      if (!status) return status.error();
    }
    return bytes;
  }

  Status write(const std::vector<Piece>& pieces, std::span<const std::byte> bytes) {
    for (const Piece& piece : pieces) {
      Status status = device_.write(piece.address, bytes.subspan(piece.host_offset, piece.bytes));
      if (!status) return status;
    }
    return {};
  }

  Error mismatch(const std::string& what, std::uint32_t block, const std::vector<Piece>& pieces,
                 std::span<const std::byte> found, std::span<const std::byte> wanted) {
    const auto at = std::mismatch(found.begin(), found.end(), wanted.begin()).first - found.begin();
    const auto piece = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& p) {
      return p.host_offset + p.bytes > static_cast<std::uint64_t>(at);
    });
    return Error{ErrorCode::kDevice, "self test: " + what + " block " + std::to_string(block) +
                                         " through the copy plan moved wrong bytes in tensor \"" +
                                         tensors_[piece->tensor].name + "\", byte " + std::to_string(at) +
                                         " of the block. The cache must stay off for these tensors."};
  }

  Device& device_;
  const layout::BlockLayout& layout_;
  const std::span<const layout::TensorDesc> tensors_;
  std::uint64_t sum_ = kNoSum;  // of the block read last
};

}  // namespace

Status self_test(Device& device, const layout::BlockLayout& layout, std::span<const layout::TensorDesc> tensors) {
  SelfTest test(device, layout, tensors);
  if (Status status = test.test_block(0); !status) return status;
  return layout.block_count() > 1 ? test.test_block(layout.block_count() - 1) : Status{};
}

}  // namespace flexkv::device
