// Objects named by small numbers, in chunks that never move: growing costs no copy, and a freed place is the next used.
// Thread-compatible. Owns its objects. Memory grows with the most objects ever alive at once and does not shrink.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "flexkv/base/assert.h"

namespace flexkv::index {

inline constexpr std::uint32_t kNone = UINT32_MAX;  // no object of a slab

template <typename T>
class Slab {
 public:
  // Adds a default-constructed object.
  std::uint32_t add() {
    if (free_.empty()) {
      FLEXKV_ASSERT(end_ != kNone);
      if (end_ % kChunk == 0) chunks_.push_back(std::make_unique<T[]>(kChunk));
      return end_++;
    }
    const std::uint32_t id = free_.back();
    free_.pop_back();
    return id;
  }
  void remove(std::uint32_t id) {
    (*this)[id] = T{};
    free_.push_back(id);
  }
  void clear() { *this = Slab(); }

  T& operator[](std::uint32_t id) { return chunks_[id / kChunk][id % kChunk]; }
  const T& operator[](std::uint32_t id) const { return chunks_[id / kChunk][id % kChunk]; }

  std::uint32_t size() const { return end_ - static_cast<std::uint32_t>(free_.size()); }
  std::uint32_t end() const { return end_; }  // every id ever used is below it
  std::size_t memory_bytes() const {
    return chunks_.size() * kChunk * sizeof(T) + chunks_.capacity() * sizeof(chunks_[0]) +
           free_.capacity() * sizeof(std::uint32_t);
  }

 private:
  static constexpr std::uint32_t kChunk = 256;

  std::vector<std::unique_ptr<T[]>> chunks_;
  std::vector<std::uint32_t> free_;
  std::uint32_t end_ = 0;
};

}  // namespace flexkv::index
