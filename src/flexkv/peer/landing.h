// Memory that one-sided reads go to, in pieces. A read cannot be recalled: one that its reader has given up may write
// long afterwards, so its piece is not used again before it has ended. Thread-safe.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/memory/host_region.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

constexpr std::size_t kPiecesMax = 32;  // under way or with those who ordered them: 64 MiB

class Landing {
 public:
  static Result<std::shared_ptr<Landing>> create() {
    memory::HostRegion::Options options;
    options.huge_pages = false;
    auto memory = memory::HostRegion::create(kPiecesMax * kStride, options);
    if (!memory.ok()) return memory.error();
    return std::make_shared<Landing>(std::move(memory).value());
  }
  explicit Landing(memory::HostRegion memory) : memory_(std::move(memory)) {
    for (std::size_t piece = kPiecesMax; piece-- > 0;) free_.push_back(piece);
  }

  const memory::HostRegion& memory() const { return memory_; }
  std::optional<std::size_t> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::nullopt;
    const std::size_t piece = free_.back();
    free_.pop_back();
    return piece;
  }
  std::span<std::byte> bytes(std::size_t piece) const { return {memory_.data() + offset(piece), kPieceBytesMax}; }
  std::span<std::byte> word(std::size_t piece) const {
    return {memory_.data() + word_offset(piece), sizeof(std::uint64_t)};
  }
  static constexpr std::uint64_t offset(std::size_t piece) { return piece * kStride; }
  static constexpr std::uint64_t word_offset(std::size_t piece) { return offset(piece) + kPieceBytesMax; }

  // What a read has brought, which has ended. `landing`: whose piece it is, free again once that is let go.
  static Fetched fetched(const std::shared_ptr<Landing>& landing, std::size_t piece, std::size_t bytes, bool ok) {
    Fetched fetched;
    fetched.ok = ok;
    fetched.bytes = landing->bytes(piece).first(bytes);
    std::memcpy(&fetched.word, landing->word(piece).data(), sizeof(fetched.word));
    fetched.room = std::shared_ptr<void>(nullptr, [landing, piece](void*) { landing->give_back(piece); });
    return fetched;
  }

 private:
  static constexpr std::size_t kStride = kPieceBytesMax + 4096;  // a piece, and its lease's word behind it

  void give_back(std::size_t piece) {
    const std::lock_guard lock(mutex_);
    free_.push_back(piece);
  }

  const memory::HostRegion memory_;
  std::mutex mutex_;
  std::vector<std::size_t> free_;
};

}  // namespace flexkv::peer
