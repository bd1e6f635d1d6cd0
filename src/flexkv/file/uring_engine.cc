#include "flexkv/file/uring_engine.h"

#include <liburing.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <map>

namespace flexkv::file {
namespace {

constexpr std::uint64_t kWakeTag = ~std::uint64_t{0} - 1;  // ~0 is liburing's own
constexpr std::uint32_t kFileSlots = 64;
constexpr std::uint32_t kMemorySlots = 4096;
constexpr Nanos kKernelBusyPause = kMillisecond;

class UringEngine final : public IoEngine {
 public:
  ~UringEngine() override;

  Status start(std::uint32_t slot_count) override;
  void begin(const Io& io, OpenFile& file) override;
  void flush() override;
  void wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) override;
  void wake() override;
  void stop() override;
  void forget(OpenFile& file) override;
  Status register_memory(std::span<std::byte> memory) override;
  std::string describe() const override {
    return file_table_ ? "io_uring with registered files" : "io_uring without registered files (they need Linux 5.19)";
  }

 private:
  io_uring_sqe* next_entry();
  void watch_wakeups();
  void reap(std::vector<EndedIo>& ended);
  void register_file(OpenFile& file);
  int memory_slot(const iovec& part) const;

  io_uring ring_{};
  bool ring_made_ = false;
  Fd wake_;
  std::uint64_t wake_count_ = 0;
  bool watching_ = false;
  bool file_table_ = false;  // like the next: not changed after start()
  bool memory_table_ = false;
  std::vector<int> free_file_slots_;
  struct Memory {
    const std::byte* end;
    int slot;
  };
  std::map<const std::byte*, Memory> memory_;  // by address
  std::uint32_t memory_slots_ = 0;             // used
};

Status UringEngine::start(std::uint32_t slot_count) {
  wake_ = Fd(::eventfd(0, EFD_CLOEXEC));
  if (!wake_.valid()) return errno_error("cannot make an eventfd", errno);
  constexpr unsigned kWays[] = {IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN,
                                IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN, 0};
  int result = -EINVAL;
  for (const unsigned flags : kWays) {
    io_uring_params params{};
    params.flags = flags;
    result = ::io_uring_queue_init_params(std::bit_ceil(slot_count + 1), &ring_, &params);
    if (result != -EINVAL) break;
  }
  if (result < 0) return Error{ErrorCode::kUnsupported, errno_error("no io_uring", -result).message};
  ring_made_ = true;
  if ((ring_.features & IORING_FEAT_EXT_ARG) == 0) {
    return Error{ErrorCode::kUnsupported, "no io_uring: that of this kernel is too old"};
  }
  file_table_ = ::io_uring_register_files_sparse(&ring_, kFileSlots) == 0;
  if (file_table_) {
    for (int slot = kFileSlots; slot > 0; --slot) free_file_slots_.push_back(slot - 1);
  }
  memory_table_ = ::io_uring_register_buffers_sparse(&ring_, kMemorySlots) == 0;
  return {};
}

UringEngine::~UringEngine() {
  if (ring_made_) ::io_uring_queue_exit(&ring_);
}

void UringEngine::stop() {
  // A read of ours that stays behind would write to memory that is gone.
  if (watching_) wake();
  while (watching_) {
    std::vector<EndedIo> none;
    (void)::io_uring_submit_and_wait(&ring_, 1);
    reap(none);
  }
  // Otherwise the kernel would let go of the files some time after the ring is gone.
  ::io_uring_unregister_files(&ring_);
}

io_uring_sqe* UringEngine::next_entry() {
  io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
  // The ring has an entry for every slot and one for wakeups.
  FLEXKV_ASSERT(entry != nullptr);
  return entry;
}

void UringEngine::watch_wakeups() {
  io_uring_sqe* entry = next_entry();
  ::io_uring_prep_read(entry, wake_.get(), &wake_count_, sizeof(wake_count_), 0);
  ::io_uring_sqe_set_data64(entry, kWakeTag);
  watching_ = true;
}

void UringEngine::begin(const Io& io, OpenFile& file) {
  register_file(file);
  io_uring_sqe* entry = next_entry();
  const int fd = file.ring_slot >= 0 ? file.ring_slot : file.fd.get();
  const int memory = io.parts.size() == 1 ? memory_slot(io.parts[0]) : -1;
  const auto part_count = static_cast<unsigned>(io.parts.size());
  if (io.op == Op::kSync) {
    ::io_uring_prep_fsync(entry, fd, IORING_FSYNC_DATASYNC);
  } else if (io.parts.size() > 1) {
    if (io.op == Op::kRead) ::io_uring_prep_readv(entry, fd, io.parts.data(), part_count, io.offset);
    if (io.op == Op::kWrite) ::io_uring_prep_writev(entry, fd, io.parts.data(), part_count, io.offset);
  } else {
    const iovec& part = io.parts[0];
    const auto bytes = static_cast<unsigned>(part.iov_len);
    if (io.op == Op::kRead && memory >= 0) {
      ::io_uring_prep_read_fixed(entry, fd, part.iov_base, bytes, io.offset, memory);
    } else if (io.op == Op::kRead) {
      ::io_uring_prep_read(entry, fd, part.iov_base, bytes, io.offset);
    } else if (memory >= 0) {
      ::io_uring_prep_write_fixed(entry, fd, part.iov_base, bytes, io.offset, memory);
    } else {
      ::io_uring_prep_write(entry, fd, part.iov_base, bytes, io.offset);
    }
  }
  if (file.ring_slot >= 0) entry->flags |= IOSQE_FIXED_FILE;
  ::io_uring_sqe_set_data64(entry, io.slot);
}

void UringEngine::flush() {
  while (::io_uring_sq_ready(&ring_) > 0) {
    // Short of memory, or completions to be reaped first: the rest goes with the next wait().
    if (const int submitted = ::io_uring_submit(&ring_); submitted <= 0 && submitted != -EINTR) return;
  }
}

void UringEngine::wait(std::optional<Nanos> until, std::vector<EndedIo>& ended) {
  if (!watching_) watch_wakeups();
  io_uring_cqe* first = nullptr;
  __kernel_timespec timeout{};
  if (until) {
    const Nanos left = std::max<Nanos>(*until - monotonic_now(), 0);
    timeout = {left / kSecond, left % kSecond};
  }
  (void)::io_uring_submit_and_wait_timeout(&ring_, &first, 1, until ? &timeout : nullptr, nullptr);
  if (::io_uring_sq_ready(&ring_) > 0 && ::io_uring_cq_ready(&ring_) == 0) {
    // The kernel is short of memory. It is asked again after a pause, or when something has ended.
    timeout = {0, kKernelBusyPause};
    (void)::io_uring_wait_cqe_timeout(&ring_, &first, &timeout);
  }
  reap(ended);
}

void UringEngine::reap(std::vector<EndedIo>& ended) {
  unsigned head = 0;
  unsigned count = 0;
  io_uring_cqe* each = nullptr;
  io_uring_for_each_cqe(&ring_, head, each) {
    ++count;
    if (each->user_data == kWakeTag) {
      watching_ = false;
    } else if (each->user_data != LIBURING_UDATA_TIMEOUT) {
      ended.push_back({static_cast<std::uint32_t>(each->user_data), each->res});
    }
  }
  ::io_uring_cq_advance(&ring_, count);
}

void UringEngine::wake() {
  const std::uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof(one));
}

// ---- registered files and memory -----------------------------------------------------------------------------------

void UringEngine::register_file(OpenFile& file) {
  if (file.ring_slot >= 0 || free_file_slots_.empty()) return;
  const int slot = free_file_slots_.back();
  const int fd = file.fd.get();
  if (::io_uring_register_files_update(&ring_, static_cast<unsigned>(slot), &fd, 1) != 1) return;
  free_file_slots_.pop_back();
  file.ring_slot = slot;
}

void UringEngine::forget(OpenFile& file) {
  if (file.ring_slot < 0) return;
  const int none = -1;
  if (::io_uring_register_files_update(&ring_, static_cast<unsigned>(file.ring_slot), &none, 1) == 1) {
    free_file_slots_.push_back(file.ring_slot);
  }
  file.ring_slot = -1;
}

Status UringEngine::register_memory(std::span<std::byte> memory) {
  if (!memory_table_) return Error{ErrorCode::kUnsupported, "needs Linux 5.19"};
  if (memory_slots_ == kMemorySlots) return Error{ErrorCode::kNoSpace, "too many pieces"};
  const iovec piece{memory.data(), memory.size()};
  const __u64 tag = 0;
  const int result = ::io_uring_register_buffers_update_tag(&ring_, memory_slots_, &piece, &tag, 1);
  if (result == -ENOMEM) return Error{ErrorCode::kNoSpace, "more than may be locked (ulimit -l)"};
  if (result != 1) return errno_error("refused by the system", -result);
  memory_.insert_or_assign(memory.data(), Memory{memory.data() + memory.size(), static_cast<int>(memory_slots_++)});
  return {};
}

int UringEngine::memory_slot(const iovec& part) const {
  const auto* begin = static_cast<const std::byte*>(part.iov_base);
  auto found = memory_.upper_bound(begin);
  if (found == memory_.begin()) return -1;
  const Memory& memory = (--found)->second;
  return begin + part.iov_len <= memory.end ? memory.slot : -1;
}

}  // namespace

std::unique_ptr<IoEngine> make_uring_engine() { return std::make_unique<UringEngine>(); }

}  // namespace flexkv::file
