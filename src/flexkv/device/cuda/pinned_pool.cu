#include <algorithm>

#include "flexkv/device/cuda/pinned_pool.h"

namespace flexkv::device {
namespace {

std::uintptr_t piece_end(std::uintptr_t at, std::uintptr_t end) {
  return std::min(end, (at / kPinPiece + 1) * kPinPiece);
}

}  // namespace

Status PinnedPool::register_all(std::byte* base, std::size_t bytes) {
  MutexLock lock(mutex_);
  if (end_ != 0) return Error{ErrorCode::kInvalidArgument, "a host pool is registered with this device already"};
  const auto begin = reinterpret_cast<std::uintptr_t>(base);
  const std::uintptr_t end = begin + bytes;
  begin_ = begin;
  for (std::uintptr_t at = begin; at < end;) {
    const std::uintptr_t next = piece_end(at, end);
    Status status = checked(cudaHostRegister(reinterpret_cast<void*>(at), next - at, cudaHostRegisterPortable),
                            "cudaHostRegister of the host pool");
    if (!status) {
      unpin();
      return status;
    }
    end_.store(next, std::memory_order_release);
    at = next;
  }
  return {};
}

void PinnedPool::unregister() {
  MutexLock lock(mutex_);
  unpin();
}

void PinnedPool::unpin() {
  const std::uintptr_t end = end_.exchange(0);
  for (std::uintptr_t at = begin_; at < end; at = piece_end(at, end)) {
    (void)checked(cudaHostUnregister(reinterpret_cast<void*>(at)), "cudaHostUnregister");
  }
}

bool PinnedPool::covers(const std::byte* begin, std::size_t bytes) const {
  const std::uintptr_t end = end_.load(std::memory_order_acquire);
  const auto first = reinterpret_cast<std::uintptr_t>(begin);
  return first >= begin_ && first + bytes <= end;
}

}  // namespace flexkv::device
