#include "flexkv/ipc/ring.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <new>

namespace flexkv::ipc {
namespace {

constexpr int kRequiredSeals = F_SEAL_SHRINK | F_SEAL_GROW;
// In place of a length: nothing more up to the end of the ring, the record lies at its start.
constexpr std::uint32_t kSkip = 0xFFFF'FFFF;
constexpr std::uint64_t kLengthBytes = sizeof(std::uint32_t);

bool valid_capacity(std::size_t capacity) {
  return std::has_single_bit(capacity) && capacity >= kMinRingCapacity && capacity <= kMaxRingCapacity;
}

// With it the offsets of records stay multiples of 8, so a length never straddles the end of the ring.
std::uint64_t space_for(std::uint64_t length) { return (kLengthBytes + length + 7) & ~std::uint64_t{7}; }

std::uint64_t max_length(std::uint64_t capacity) { return capacity / 2 - kLengthBytes; }

void copy(std::byte* to, std::span<const std::byte> from) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size());
}

// `flag` says that the peer waits. The plain load keeps the common case free of a locked instruction.
void wake_if(std::atomic<std::uint32_t>& flag, int peer_wake) {
  if (flag.load(std::memory_order_seq_cst) == 0) return;
  if (flag.exchange(0, std::memory_order_seq_cst) != 0) ring_eventfd(peer_wake);
}

Error bad_memory(const std::string& why) { return {ErrorCode::kPeer, "the peer's ring memory is unusable: " + why}; }

}  // namespace

Result<Fd> make_eventfd() {
  Fd fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!fd.valid()) return errno_error("eventfd", errno);
  return fd;
}

// A failure means that the counter is at its limit, hence readable, or that the peer is broken, which shows elsewhere.
void ring_eventfd(int fd) {
  while (::eventfd_write(fd, 1) != 0 && errno == EINTR) {
  }
}

void drain_eventfd(int fd) {
  eventfd_t count = 0;
  while (::eventfd_read(fd, &count) != 0 && errno == EINTR) {
  }
}

// --- RingMemory

Result<RingMemory> RingMemory::create(std::size_t capacity) {
  FLEXKV_ASSERT(valid_capacity(capacity));
  Fd fd(::memfd_create("flexkv-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd.valid()) return errno_error("memfd_create", errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(kRingHeaderBytes + capacity)) != 0) {
    return errno_error("size ring memory", errno);
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, kRequiredSeals | F_SEAL_SEAL) != 0) return errno_error("seal ring memory", errno);
  auto memory = map(fd.get(), capacity);
  if (!memory) return memory;
  new (memory.value().base_) RingHeader{};
  memory.value().fd_ = std::move(fd);
  return memory;
}

Result<RingMemory> RingMemory::attach(const Fd& fd) {
  struct statfs filesystem {};
  struct stat info {};
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  if (seals < 0 || (seals & kRequiredSeals) != kRequiredSeals) return bad_memory("not sealed against resizing");
  if (::fstatfs(fd.get(), &filesystem) != 0 || filesystem.f_type != TMPFS_MAGIC) return bad_memory("not plain memory");
  if (::fstat(fd.get(), &info) != 0 || info.st_size < static_cast<off_t>(kRingHeaderBytes)) {
    return bad_memory("too small");
  }
  const std::size_t capacity = static_cast<std::size_t>(info.st_size) - kRingHeaderBytes;
  if (!valid_capacity(capacity)) return bad_memory("size " + std::to_string(info.st_size));
  return map(fd.get(), capacity);
}

Result<RingMemory> RingMemory::map(int fd, std::size_t capacity) {
  void* base = ::mmap(nullptr, kRingHeaderBytes + capacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return errno_error("map ring memory", errno);
  return RingMemory(base, capacity, Fd());
}

RingMemory::RingMemory(RingMemory&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)), capacity_(other.capacity_), fd_(std::move(other.fd_)) {}

RingMemory& RingMemory::operator=(RingMemory&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(capacity_, other.capacity_);
  std::swap(fd_, other.fd_);
  return *this;
}

RingMemory::~RingMemory() {
  if (base_ != nullptr) ::munmap(base_, kRingHeaderBytes + capacity_);
}

// --- RingProducer

RingProducer::RingProducer(const RingMemory& memory, int peer_wake)
    : header_(memory.header()), data_(memory.data()), capacity_(memory.capacity()), peer_wake_(peer_wake) {}

std::size_t RingProducer::max_record() const { return max_length(capacity_); }

bool RingProducer::push(std::span<const std::byte> a, std::span<const std::byte> b) {
  const std::uint64_t length = a.size() + b.size();
  FLEXKV_ASSERT(length <= max_record());
  const std::uint64_t space = space_for(length);
  const std::uint64_t offset = tail_ & (capacity_ - 1);
  // Records do not wrap. As space <= capacity / 2, skip + space < capacity: every record fits into an empty ring.
  const std::uint64_t skip = space > capacity_ - offset ? capacity_ - offset : 0;
  if (!reserve(skip + space)) return false;
  std::byte* record = data_ + offset;
  if (skip > 0) {
    std::memcpy(record, &kSkip, kLengthBytes);
    record = data_;
  }
  const auto stored_length = static_cast<std::uint32_t>(length);
  std::memcpy(record, &stored_length, kLengthBytes);
  copy(record + kLengthBytes, a);
  copy(record + kLengthBytes + a.size(), b);
  tail_ += skip + space;
  // Releases the record to the tail load in pop(). Sequentially consistent, against arm(): either that sees this tail,
  // or wake_if() sees its flag.
  header_->tail.store(tail_, std::memory_order_seq_cst);
  wake_if(header_->sleeping, peer_wake_);
  return true;
}

bool RingProducer::reserve(std::uint64_t need) {
  if (broken_) return false;
  if (fits(need)) return true;
  // Acquires, from the head store in pop(), that the consumer has finished reading what is overwritten next.
  load_head(std::memory_order_acquire);
  if (fits(need)) return !broken_;
  // Sequentially consistent, against the head store in pop(): either this sees the room, or that sees the flag.
  header_->starved.store(1, std::memory_order_seq_cst);
  load_head(std::memory_order_seq_cst);
  return fits(need) && !broken_;
}

void RingProducer::load_head(std::memory_order order) {
  const std::uint64_t head = header_->head.load(order);
  // An honest head lies between the last one seen and the tail, in this modular sense.
  if (tail_ - head > tail_ - head_) {
    broken_ = true;
  } else {
    head_ = head;
  }
}

// --- RingConsumer

RingConsumer::RingConsumer(const RingMemory& memory, int peer_wake)
    : header_(memory.header()), data_(memory.data()), capacity_(memory.capacity()), peer_wake_(peer_wake) {}

PopResult RingConsumer::corrupt() {
  corrupt_ = true;
  return PopResult::kCorrupt;
}

PopResult RingConsumer::pop(std::vector<std::byte>& out) {
  if (corrupt_) return PopResult::kCorrupt;
  if (head_ == tail_) {
    // Acquires the records from the tail store in push().
    const std::uint64_t tail = header_->tail.load(std::memory_order_acquire);
    if (tail - head_ > capacity_ || tail % 8 != 0) return corrupt();
    tail_ = tail;
    if (head_ == tail_) return PopResult::kEmpty;
  }
  std::uint64_t used = tail_ - head_;
  std::uint64_t offset = head_ & (capacity_ - 1);
  // Each length is read once, atomically, so that what is checked is what is used.
  const auto length_at = [this](std::uint64_t at) {
    return __atomic_load_n(reinterpret_cast<const std::uint32_t*>(data_ + at), __ATOMIC_RELAXED);
  };
  std::uint32_t length = length_at(offset);
  if (length == kSkip) {
    // The producer publishes a skip together with the record that follows it.
    const std::uint64_t skip = capacity_ - offset;
    if (skip >= used) return corrupt();
    used -= skip;
    head_ += skip;
    offset = 0;
    length = length_at(offset);
  }
  if (length > max_length(capacity_)) return corrupt();
  const std::uint64_t space = space_for(length);
  if (space > used || space > capacity_ - offset) return corrupt();
  const std::byte* payload = data_ + offset + kLengthBytes;
  out.assign(payload, payload + length);
  head_ += space;
  // Releases the room to the head loads in reserve(). Sequentially consistent, against the starved store there.
  header_->head.store(head_, std::memory_order_seq_cst);
  // Not for every record: a producer woken for a few bytes would fill the ring and sleep again. What remains unpopped
  // beyond tail_ can make this early, never late: the pop that empties the ring always gets here.
  if (used - space <= capacity_ / 2) wake_if(header_->starved, peer_wake_);
  return PopResult::kRecord;
}

bool RingConsumer::arm() {
  if (corrupt_ || head_ != tail_) return false;
  // Sequentially consistent, against the tail store in push().
  header_->sleeping.store(1, std::memory_order_seq_cst);
  if (header_->tail.load(std::memory_order_seq_cst) == head_) return true;
  disarm();
  return false;
}

void RingConsumer::disarm() { header_->sleeping.store(0, std::memory_order_relaxed); }

}  // namespace flexkv::ipc
