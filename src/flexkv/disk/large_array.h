// A large array of zeros for random access: on large pages where the system has them, which spares a page walk for each
// cache miss, and on memory only where it is touched. Thread-compatible. Owns its memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>
#include <type_traits>

namespace flexkv::disk {

template <typename T>
class LargeArray {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);

 public:
  explicit LargeArray(std::size_t size) : size_(size), bytes_((size * sizeof(T) / kPage + 1) * kPage) {
    void* memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    (void)::madvise(memory, bytes_, MADV_HUGEPAGE);  // refused: only slower
    data_ = static_cast<T*>(memory);
  }
  ~LargeArray() { ::munmap(data_, bytes_); }
  LargeArray(const LargeArray&) = delete;
  LargeArray& operator=(const LargeArray&) = delete;

  T& operator[](std::size_t at) { return data_[at]; }
  const T& operator[](std::size_t at) const { return data_[at]; }
  std::size_t size() const { return size_; }

 private:
  static constexpr std::size_t kPage = 2 << 20;

  std::size_t size_;
  std::size_t bytes_;
  T* data_;
};

}  // namespace flexkv::disk
