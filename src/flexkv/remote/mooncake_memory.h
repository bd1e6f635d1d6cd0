// Memory that this process and one that runs Mooncake both map: a piece for each operation that is under way, large
// enough for any. Only what was used once takes memory. Thread-compatible; the mapping stays while this object is
// there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"

namespace flexkv::remote {

class MooncakeMemory {
 public:
  static constexpr std::size_t kPieces = 8;
  // A block of kSlotBytesMax with what lies around it.
  static constexpr std::uint64_t kPieceBytes = (1ULL << 30) + (4ULL << 20);

  static Result<std::unique_ptr<MooncakeMemory>> create();
  ~MooncakeMemory();
  MooncakeMemory(const MooncakeMemory&) = delete;
  MooncakeMemory& operator=(const MooncakeMemory&) = delete;

  std::optional<std::size_t> take();
  // Nobody uses it any more. Keeps little of its memory.
  void give_back(std::size_t piece);
  // The first `bytes` of a piece, which are there from then on. An error: the machine has no memory for them.
  // REQUIRES: bytes <= kPieceBytes
  Result<std::span<std::byte>> first(std::size_t piece, std::uint64_t bytes);
  static std::uint64_t offset(std::size_t piece) { return piece * kPieceBytes; }
  int fd() const { return fd_.get(); }

 private:
  MooncakeMemory(Fd fd, std::byte* data) : fd_(std::move(fd)), data_(data) {}

  Fd fd_;
  std::byte* const data_;
  std::array<bool, kPieces> taken_{};
  std::array<std::uint64_t, kPieces> filled_{};  // bytes that are there
};

}  // namespace flexkv::remote
