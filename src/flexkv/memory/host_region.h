// HostRegion: host memory that several processes can map: a memfd and this process's shared mapping of it.
//
// Thread-compatible; touch() may run in one thread while others use the bytes. Owns the descriptor and the mapping.
// Bounds: holds at most the bytes asked for (rounded down to whole pages). create() returns only memory that is there,
// so a later access cannot fail; when the machine has too little it is refused, nothing is taken, nothing is killed.
// The size is sealed: no process that holds the descriptor can shrink the file under another one's feet.
// The bytes are left out of core dumps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/memory/numa.h"

namespace flexkv::memory {

class HostRegion {
 public:
  struct Options {
    // Use 2 MiB pages that the administrator set aside; without enough of them the region has normal pages. Those the
    // kernel is asked to join, which succeeds as far as it finds 2 MiB together, within 5 s and 2 s for each GiB.
    bool huge_pages = true;
    unsigned touch_threads = 8;  // of touch() and of filling huge pages, 1 to kMaxTouchThreads
    NumaPlacement numa{};        // where its pages should lie
  };
  static constexpr unsigned kMaxTouchThreads = 64;

  // Zeroed memory of `bytes`, rounded down to whole pages.
  static Result<HostRegion> create(std::uint64_t bytes, const Options& options);

  // Maps the first `bytes` (whole pages) of a region that another process created. A file that is smaller, or whose
  // size is not sealed, is refused: reading past its end would kill this process.
  static Result<HostRegion> map(Fd fd, std::uint64_t bytes);

  HostRegion(HostRegion&& other) noexcept;
  HostRegion& operator=(HostRegion&& other) noexcept;
  ~HostRegion();

  // Brings all pages into this process's page table, so that first use and pinning are fast. Changes no byte.
  Status touch();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }
  // For people: "2 MiB huge pages", or "4 KiB pages, 100 % joined to 2 MiB (...why not huge ones)".
  const std::string& description() const { return description_; }

 private:
  HostRegion() = default;
  explicit HostRegion(const Options& options);
  void describe(const std::string& place) { description_ += place.empty() ? "" : ", " + place; }

  static Result<HostRegion> create_huge(std::uint64_t bytes, const Options& options);
  static Result<HostRegion> create_normal(std::uint64_t bytes, const Options& options);
  Status open_sealed(std::uint64_t bytes, unsigned memfd_flags);
  Status map_bytes();

  Fd fd_;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  std::size_t page_bytes_ = 0;
  unsigned touch_threads_ = 1;
  std::vector<NumaNode> nodes_;
  std::string description_;
};

}  // namespace flexkv::memory
