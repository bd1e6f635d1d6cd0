#include "flexkv/memory/host_region.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <thread>
#include <vector>

#include "flexkv/base/time.h"
#include "flexkv/memory/available_memory.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack it
#endif

namespace flexkv::memory {
namespace {

constexpr std::uint64_t kHugePage = 2ULL << 20;
// Memory is taken this much at a time and the machine's room looked at before each step, as others allocate meanwhile:
// the kernel would rather kill a process than refuse the last of it.
constexpr std::uint64_t kReserveStep = 1ULL << 30;
constexpr std::uint64_t kLeaveFree = 64ULL << 20;
constexpr std::uint64_t kTouchStep = 64ULL << 20;
// Joining takes a fifth of the time of as many normal pages; a kernel that has to move others about first may take ever
// so long. The bound is wide because on a busy machine all takes long.
constexpr std::uint64_t kJoinStep = 64ULL << 20;
constexpr Nanos kJoinPatience = 5 * kSecond;
constexpr Nanos kJoinPatiencePerGiB = 2 * kSecond;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::uint64_t normal_page() { return static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE)); }

std::string size_text(std::uint64_t bytes) {
  if (bytes % (1ULL << 30) == 0 && bytes != 0) return std::to_string(bytes >> 30) + " GiB";
  if (bytes >= 1ULL << 20) return std::to_string(bytes >> 20) + " MiB";
  return std::to_string(bytes >> 10) + " KiB";
}

Error no_room(std::uint64_t wanted, std::uint64_t reserved, const std::string& why) {
  const std::uint64_t available = available_memory();
  return Error{ErrorCode::kNoSpace, "host memory: " + std::to_string(wanted) + " bytes (" + size_text(wanted) +
                                        ") wanted, " + why + " after " + size_text(reserved) +
                                        "; still available: " + std::to_string(available) + " bytes (" +
                                        size_text(available) + "). Configure a smaller host pool."};
}

constexpr char kTooLittle[] = "the machine has too little";

bool has_room(std::uint64_t bytes) { return available_memory() >= bytes + kLeaveFree; }

// Fills a file with huge pages of the kernel's own, where it finds them: a device then gets few long pieces of memory
// in place of many short ones. Linux 6.1 joins pages when asked to, whatever `shmem_enabled` says. Changes no byte.
class Joiner {
 public:
  Joiner(int fd, std::byte* data) : fd_(fd), data_(data), began_(monotonic_now()) {}

  // What it does not fill, is left as it was.
  void join(std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t at = begin; !given_up_ && at + kHugePage <= end; at += kJoinStep) {
      join_step(at, std::min(kJoinStep, (end - at) / kHugePage * kHugePage));
    }
  }
  std::uint64_t joined_bytes() const { return joined_bytes_; }

 private:
  void join_step(std::uint64_t begin, std::uint64_t bytes) {
    // A huge page is made of what is there, so one page has to be.
    for (std::uint64_t at = begin; at < begin + bytes; at += kHugePage) {
      if (fallocate(fd_, 0, static_cast<off_t>(at), static_cast<off_t>(normal_page())) != 0) given_up_ = true;
    }
    if (given_up_) return;
    if (madvise(data_ + begin, bytes, MADV_COLLAPSE) == 0) {
      joined_bytes_ += bytes;
    } else if (errno != EAGAIN) {
      given_up_ = true;
    }
    const auto joined_mib = static_cast<Nanos>(joined_bytes_ >> 20);
    if (monotonic_now() - began_ > kJoinPatience + joined_mib * kJoinPatiencePerGiB / 1024) given_up_ = true;
  }

  const int fd_;
  std::byte* const data_;
  const Nanos began_;
  std::uint64_t joined_bytes_ = 0;
  bool given_up_ = false;
};

// Gives the file its pages, so that no later access can fail.
Status reserve(int fd, std::uint64_t bytes, std::span<const NumaNode> nodes, Joiner& joiner) {
  for (std::uint64_t done = 0; done < bytes;) {
    const NearNode near(nodes, done / kReserveStep);
    const std::uint64_t step = std::min(kReserveStep, bytes - done);
    if (!has_room(bytes - done)) return no_room(bytes, done, kTooLittle);
    joiner.join(done, done + step);
    while (fallocate(fd, 0, static_cast<off_t>(done), static_cast<off_t>(step)) != 0) {
      const int saved_errno = errno;
      if (saved_errno == EINTR) continue;
      if (saved_errno == ENOMEM || saved_errno == ENOSPC) return no_room(bytes, done, "the kernel refused");
      return errno_error("host memory: fallocate", saved_errno);
    }
    done += step;
  }
  return {};
}

// An error, not a signal, where a page cannot be had.
Status populate(std::byte* data, std::size_t bytes, std::size_t page_bytes) {
  while (madvise(data, bytes, MADV_POPULATE_WRITE) != 0) {
    const int saved_errno = errno;
    if (saved_errno == EINTR || saved_errno == EAGAIN) continue;
    if (saved_errno != EINVAL) return errno_error("host memory: populating pages", saved_errno);
    // Kernel older than 5.14. Reading is enough (a shared file has no common zero page) and cannot undo a write of
    // another thread.
    for (std::size_t at = 0; at < bytes; at += page_bytes) static_cast<volatile std::byte*>(data)[at];
    break;
  }
  return {};
}

}  // namespace

HostRegion::HostRegion(HostRegion&& other) noexcept { *this = std::move(other); }

HostRegion& HostRegion::operator=(HostRegion&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(page_bytes_, other.page_bytes_);
  std::swap(touch_threads_, other.touch_threads_);
  std::swap(nodes_, other.nodes_);
  std::swap(description_, other.description_);
  return *this;
}

HostRegion::~HostRegion() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

HostRegion::HostRegion(const Options& options)
    : touch_threads_(std::clamp(options.touch_threads, 1U, kMaxTouchThreads)), nodes_(options.numa.nodes) {}

Result<HostRegion> HostRegion::create(std::uint64_t bytes, const Options& options) {
  if (bytes < normal_page() || bytes > static_cast<std::uint64_t>(PTRDIFF_MAX)) {
    return Error{ErrorCode::kInvalidArgument, "host memory: cannot make a region of " + std::to_string(bytes) +
                                                  " bytes; the least is one page of " + std::to_string(normal_page()) +
                                                  " bytes"};
  }
  std::string why_normal;
  if (options.huge_pages && bytes >= kHugePage) {
    Result<HostRegion> huge = create_huge(bytes, options);
    if (huge) {
      huge.value().describe(options.numa.text);
      return huge;
    }
    why_normal = " (" + huge.error().message + ")";
  }
  Result<HostRegion> normal = create_normal(bytes, options);
  if (normal) normal.value().description_ += why_normal;
  if (normal) normal.value().describe(options.numa.text);
  return normal;
}

Result<HostRegion> HostRegion::create_huge(std::uint64_t bytes, const Options& options) {
  HostRegion region(options);
  const std::uint64_t whole = bytes - bytes % kHugePage;
  if (Status status = region.open_sealed(whole, MFD_HUGETLB | MFD_HUGE_2MB); !status) return status.error();
  // Mapping books the pages. Filling them at once catches what booking does not know of: a control group's limit on
  // huge pages, which would otherwise end the process at first use.
  Status status = region.map_bytes();
  if (status) status = region.touch();
  if (!status) {
    return Error{ErrorCode::kNoSpace, "no huge pages free: " + std::to_string(whole / kHugePage) +
                                          " of 2 MiB wanted, see /proc/sys/vm/nr_hugepages"};
  }
  return region;
}

Result<HostRegion> HostRegion::create_normal(std::uint64_t bytes, const Options& options) {
  HostRegion region(options);
  const std::uint64_t whole = bytes - bytes % normal_page();
  if (Status status = region.open_sealed(whole, 0); !status) return status.error();
  if (!has_room(whole)) return no_room(whole, 0, kTooLittle);
  if (Status status = region.map_bytes(); !status) return status.error();
  Joiner joiner(region.fd(), region.data());
  if (Status status = reserve(region.fd(), whole, region.nodes_, joiner); !status) return status.error();
  if (joiner.joined_bytes() > 0) {
    region.description_ += ", " + std::to_string(joiner.joined_bytes() * 100 / whole) + " % joined to 2 MiB";
  }
  return region;
}

Result<HostRegion> HostRegion::map(Fd fd, std::uint64_t bytes) {
  struct stat info {};
  if (fstat(fd.get(), &info) != 0) return errno_error("host memory: fstat of a received descriptor", errno);
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return Error{ErrorCode::kPeer, "host memory: the received descriptor is no memory file sealed against shrinking"};
  }
  const auto page = static_cast<std::uint64_t>(info.st_blksize);
  if (bytes == 0 || bytes % page != 0 || bytes > static_cast<std::uint64_t>(info.st_size)) {
    return Error{ErrorCode::kPeer, "host memory: cannot map " + std::to_string(bytes) + " bytes of a file of " +
                                       std::to_string(info.st_size) + " bytes in pages of " + std::to_string(page)};
  }
  HostRegion region;
  region.fd_ = std::move(fd);
  region.bytes_ = bytes;
  region.page_bytes_ = page;
  region.touch_threads_ = Options{}.touch_threads;
  if (Status status = region.map_bytes(); !status) return status.error();
  return region;
}

Status HostRegion::open_sealed(std::uint64_t bytes, unsigned memfd_flags) {
  fd_ = Fd(memfd_create("flexkv", MFD_CLOEXEC | MFD_ALLOW_SEALING | memfd_flags));
  if (!fd_.valid()) return errno_error("host memory: memfd_create", errno);
  if (ftruncate(fd_.get(), static_cast<off_t>(bytes)) != 0) return errno_error("host memory: ftruncate", errno);
  if (fcntl(fd_.get(), F_ADD_SEALS, kSeals) != 0) return errno_error("host memory: sealing the size", errno);
  bytes_ = bytes;
  page_bytes_ = (memfd_flags & MFD_HUGETLB) != 0 ? kHugePage : normal_page();
  return {};
}

Status HostRegion::map_bytes() {
  // Only at a multiple of 2 MiB can a huge page of the file be mapped as one: room for it is taken, the rest given
  // back.
  const std::string what = "host memory: mmap of " + std::to_string(bytes_) + " bytes";
  void* const room = mmap(nullptr, bytes_ + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return errno_error(what, errno);
  const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(room) % kHugePage) % kHugePage;
  std::byte* const start = static_cast<std::byte*>(room) + before;
  if (before > 0) munmap(room, before);
  munmap(start + bytes_, kHugePage - before);
  void* const mapped = mmap(start, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_.get(), 0);
  if (mapped == MAP_FAILED) {
    const int saved_errno = errno;
    munmap(start, bytes_);
    return errno_error(what, saved_errno);
  }
  data_ = static_cast<std::byte*>(mapped);
  madvise(mapped, bytes_, MADV_DONTDUMP);
  description_ = size_text(page_bytes_) + (page_bytes_ > normal_page() ? " huge pages" : " pages");
  return {};
}

Status HostRegion::touch() {
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::optional<Error> first_error;  // guarded by mutex
  auto work = [&] {
    for (std::size_t at; (at = next.fetch_add(kTouchStep)) < bytes_;) {
      const NearNode near(nodes_, at / kTouchStep);
      Status status = populate(data_ + at, std::min<std::size_t>(kTouchStep, bytes_ - at), page_bytes_);
      if (status) continue;
      next = bytes_;
      std::lock_guard lock(mutex);
      if (!first_error) first_error = status.error();
    }
  };
  {
    std::vector<std::jthread> helpers;
    const std::size_t steps = (bytes_ + kTouchStep - 1) / kTouchStep;
    try {
      while (helpers.size() + 1 < std::min<std::size_t>(touch_threads_, steps)) helpers.emplace_back(work);
    } catch (const std::system_error&) {
      // No more threads to be had: this one does what the others do not.
    }
    work();
  }
  if (first_error) return *first_error;
  return {};
}

}  // namespace flexkv::memory
