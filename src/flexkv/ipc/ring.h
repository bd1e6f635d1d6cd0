// A byte ring of variable-length records between two processes, single producer and single consumer, in shared memory.
//
//   RingMemory    the sealed memfd and its mapping; outlives the two ends, which point into it
//   RingProducer  push(); owned by one thread at a time
//   RingConsumer  pop(); owned by one thread at a time
//
// Each process creates one end only. An end trusts nothing in the shared memory: it keeps its own index and the
// capacity in private memory, so a hostile peer can make it see kCorrupt, broken() or garbage records, but never read
// or write outside the ring. Records are copied to private memory before anyone parses them. Bounds: capacity is fixed
// at creation; a record takes its length + 4, rounded up to 8, and at most half the capacity. Full: push() says false,
// and the consumer rings once there is room again.
//
// Sleep protocol. A consumer that found the ring empty calls arm(); if that says true it may wait for its eventfd. The
// producer rings only for a consumer that armed itself: one system call per sleep, not per record.
// The eventfds are non-blocking, which is a property that both processes share: a peer that takes it away can stall us,
// as a process of the same user always can.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"

namespace flexkv::ipc {

// What both processes see at the start of the memory; the records follow at kRingHeaderBytes. Each field lies on cache
// lines of its own (two, because of the adjacent-line prefetcher).
struct RingHeader {
  alignas(128) std::atomic<std::uint64_t> tail;      // written by the producer: bytes ever pushed
  alignas(128) std::atomic<std::uint64_t> head;      // written by the consumer: bytes ever popped
  alignas(128) std::atomic<std::uint32_t> sleeping;  // the consumer waits for records
  alignas(128) std::atomic<std::uint32_t> starved;   // the producer waits for room
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

constexpr std::size_t kRingHeaderBytes = 4096;
constexpr std::size_t kMinRingCapacity = 4096;
constexpr std::size_t kMaxRingCapacity = 64 * 1024 * 1024;
static_assert(sizeof(RingHeader) <= kRingHeaderBytes);

// Thread-compatible. Memory is taken from the system as it is first touched.
class RingMemory {
 public:
  // REQUIRES: capacity is a power of two in [kMinRingCapacity, kMaxRingCapacity].
  static Result<RingMemory> create(std::size_t capacity);
  // Maps a ring made by another process. Fails unless it is memory that can never shrink (reading past the end of a
  // shrunken file kills) and has a size that create() gives.
  static Result<RingMemory> attach(const Fd& fd);

  RingMemory(RingMemory&& other) noexcept;
  RingMemory& operator=(RingMemory&& other) noexcept;
  ~RingMemory();

  // For passing it on; not needed for the mapping.
  int fd() const { return fd_.get(); }
  void close_fd() { fd_.reset(); }

  std::size_t capacity() const { return capacity_; }
  RingHeader* header() const { return static_cast<RingHeader*>(base_); }
  std::byte* data() const { return static_cast<std::byte*>(base_) + kRingHeaderBytes; }

 private:
  RingMemory(void* base, std::size_t capacity, Fd fd) : base_(base), capacity_(capacity), fd_(std::move(fd)) {}
  static Result<RingMemory> map(int fd, std::size_t capacity);

  void* base_ = nullptr;
  std::size_t capacity_ = 0;
  Fd fd_;
};

class RingProducer {
 public:
  // `peer_wake` is the eventfd that the consumer waits for; not owned. REQUIRES: the ring is fresh.
  RingProducer(const RingMemory& memory, int peer_wake);

  // Appends the record a + b. False: no room now (the peer rings our eventfd once half of the ring is free), or
  // broken(). REQUIRES: a.size() + b.size() <= max_record().
  bool push(std::span<const std::byte> a, std::span<const std::byte> b = {});

  std::size_t max_record() const;
  // The consumer's index made no sense; nothing can be pushed any more.
  bool broken() const { return broken_; }

 private:
  bool fits(std::uint64_t need) const { return need <= capacity_ - (tail_ - head_); }
  bool reserve(std::uint64_t need);
  void load_head(std::memory_order order);

  RingHeader* header_;
  std::byte* data_;
  std::uint64_t capacity_;
  std::uint64_t tail_ = 0;
  std::uint64_t head_ = 0;  // the newest valid value seen
  int peer_wake_;
  bool broken_ = false;
};

enum class PopResult { kRecord, kEmpty, kCorrupt };

class RingConsumer {
 public:
  // `peer_wake` is the eventfd that the producer waits for; not owned. REQUIRES: the ring is fresh.
  RingConsumer(const RingMemory& memory, int peer_wake);

  // kRecord: `out` is the oldest record. kCorrupt: the producer broke the format; stays so.
  PopResult pop(std::vector<std::byte>& out);

  // True: the ring is empty, and the next push rings. False: pop() has something to tell.
  bool arm();
  // After waking: the producer need not ring any more.
  void disarm();

 private:
  PopResult corrupt();

  RingHeader* header_;
  const std::byte* data_;
  std::uint64_t capacity_;
  std::uint64_t head_ = 0;
  std::uint64_t tail_ = 0;  // the newest valid value seen
  int peer_wake_;
  bool corrupt_ = false;
};

// A fresh non-blocking eventfd.
Result<Fd> make_eventfd();
// Makes an eventfd readable.
void ring_eventfd(int fd);
// Makes it unreadable until it is rung again.
void drain_eventfd(int fd);

}  // namespace flexkv::ipc
