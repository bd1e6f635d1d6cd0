// The pinning of one host pool. Private to the CUDA form. Thread-safe: one thread registers, others ask covers().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "flexkv/base/mutex.h"
#include "flexkv/device/cuda/cuda_owners.h"

namespace flexkv::device {

// Pinned in pieces that end where an address is a multiple of this: other CUDA calls of the process wait while the
// driver pins, so no piece may take long (about 20 to 40 ms per GiB). No copy may cross from one piece into the next.
constexpr std::uintptr_t kPinPiece = std::uintptr_t{1} << 30;

inline bool crosses_pieces(const std::byte* begin, std::size_t bytes) {
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  return first / kPinPiece != (first + bytes - 1) / kPinPiece;
}

// REQUIRES of register_all and unregister: a ContextScope.
class PinnedPool {
 public:
  // On an error nothing stays pinned.
  Status register_all(std::byte* base, std::size_t bytes) FLEXKV_EXCLUDES(mutex_);
  void unregister() FLEXKV_EXCLUDES(mutex_);
  bool covers(const std::byte* begin, std::size_t bytes) const;

 private:
  void unpin() FLEXKV_REQUIRES(mutex_);

  Mutex mutex_;
  // What is pinned by now. end_ grows, released after each piece; begin_ is set before end_ leaves 0.
  std::atomic<std::uintptr_t> begin_{0};
  std::atomic<std::uintptr_t> end_{0};
};

}  // namespace flexkv::device
