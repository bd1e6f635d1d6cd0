#include "flexkv/remote/mooncake_memory.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "flexkv/base/assert.h"

namespace flexkv::remote {
namespace {

constexpr std::uint64_t kBytes = MooncakeMemory::kPieces * MooncakeMemory::kPieceBytes;
constexpr std::uint64_t kKeptBytes = 16ULL << 20;  // of a piece that is not in use

}  // namespace

Result<std::unique_ptr<MooncakeMemory>> MooncakeMemory::create() {
  Fd fd(::memfd_create("flexkv-mooncake-store", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return errno_error("memory for Mooncake: memfd_create", errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(kBytes)) != 0) {
    return errno_error("memory for Mooncake: ftruncate", errno);
  }
  // Who has the descriptor could otherwise take away what this process is reading.
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return errno_error("memory for Mooncake: F_ADD_SEALS", errno);
  }
  void* const data = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd.get(), 0);
  if (data == MAP_FAILED) return errno_error("memory for Mooncake: mmap", errno);
  (void)::madvise(data, kBytes, MADV_DONTDUMP);
  return std::unique_ptr<MooncakeMemory>(new MooncakeMemory(std::move(fd), static_cast<std::byte*>(data)));
}

MooncakeMemory::~MooncakeMemory() { ::munmap(data_, kBytes); }

std::optional<std::size_t> MooncakeMemory::take() {
  const auto free = std::ranges::find(taken_, false);
  if (free == taken_.end()) return std::nullopt;
  *free = true;
  return static_cast<std::size_t>(free - taken_.begin());
}

void MooncakeMemory::give_back(std::size_t piece) {
  FLEXKV_ASSERT(taken_[piece]);
  taken_[piece] = false;
  if (filled_[piece] <= kKeptBytes) return;
  const auto begin = static_cast<off_t>(offset(piece) + kKeptBytes);
  const auto bytes = static_cast<off_t>(filled_[piece] - kKeptBytes);
  if (::fallocate(fd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, begin, bytes) == 0) {
    filled_[piece] = kKeptBytes;
  }
}

Result<std::span<std::byte>> MooncakeMemory::first(std::size_t piece, std::uint64_t bytes) {
  FLEXKV_ASSERT(bytes <= kPieceBytes);
  while (filled_[piece] < bytes) {
    const auto begin = static_cast<off_t>(offset(piece) + filled_[piece]);
    if (::fallocate(fd_.get(), 0, begin, static_cast<off_t>(bytes - filled_[piece])) == 0) {
      filled_[piece] = bytes;
    } else if (errno != EINTR) {
      return errno_error("no memory for " + std::to_string(bytes) + " bytes on their way to or from Mooncake", errno);
    }
  }
  return std::span(data_ + offset(piece), bytes);
}

}  // namespace flexkv::remote
