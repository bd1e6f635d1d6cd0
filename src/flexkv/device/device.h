// The seam to the memory that holds an engine's KV blocks: copies between device blocks and their host form, ordered
// with the engine's own work. Forms: this process's own memory (host_device.h), CUDA (cuda_device.h), and a wrapper
// with scripted faults (testing/faulty_device.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "flexkv/base/result.h"
#include "flexkv/layout/block_layout.h"

namespace flexkv::device {

enum class Direction : std::uint8_t { kToHost, kToDevice };

struct BlockCopy {
  std::uint32_t device_block = 0;
  std::uint64_t host_offset = 0;  // bytes from the pool's base to the block's extent of shard_bytes
};

// A point in an engine's stream of device work. Made and used by any thread, one at a time.
class EngineEvent {
 public:
  virtual ~EngineEvent() = default;
};

class CopyStream;

// A count that a copy stream raises when copies have arrived, and that the engine's streams wait for, on the device: no
// thread of the host has a part in it. It starts at 0. Outlived by its device; destroying it is open().
class Gate {
 public:
  // No count is above this.
  static constexpr std::uint32_t kMax = 63;

  virtual ~Gate() = default;
  // Raises it to `count` once all that was submitted to `stream` so far has arrived. By the thread that owns `stream`.
  virtual Status raise_after(CopyStream& stream, std::uint32_t count) = 0;
  // What is given to the engine's stream from now on starts once the count has been reached. Any thread. The host
  // device has no streams: there the caller waits.
  virtual Status hold(std::uintptr_t engine_stream, std::uint32_t count) = 0;
  // Lets everything pass, now and later. REQUIRES: no raise_after() is under way (synchronize() the stream first).
  virtual void open() = 0;
};

// Copies in one direction, in the order submitted. Owned by one thread. Closing it waits for what was submitted.
// Once a call failed on the device all later ones return that error; a new stream can be opened.
class CopyStream {
 public:
  virtual ~CopyStream() = default;

  // Copies submitted from now on start only when the engine has reached that point.
  virtual Status order_after(const EngineEvent& event) = 0;

  // May copy at once or queue; blocks, without spinning, while the device's queue is full. A block or an extent out of
  // range is refused before anything is copied, and does not harm the stream. The extents must stay in place, unread
  // (kToHost) or unwritten (kToDevice) by others, until synchronize() returned.
  // `part`: only these bytes of each block (an index into the layout's parts()), or all of them.
  static constexpr std::size_t kAllParts = ~std::size_t{0};
  virtual Status submit(std::span<const BlockCopy> copies, std::size_t part) = 0;
  Status submit(std::span<const BlockCopy> copies) { return submit(copies, kAllParts); }

  // Of what the device blocks of these copies hold, from this point of the stream on, the sums (base/block_sum.h), in
  // their order. `sums` is filled when synchronize() has returned, and must stay in place until then; kNoSum where
  // there is none. Not ordered with copies: neither they nor others may write to the blocks meanwhile. REQUIRES:
  // kToHost; copies and sums are equally many, and at most kSumsMax between two calls of synchronize().
  static constexpr std::size_t kSumsMax = 1U << 14;
  virtual Status sum(std::span<const BlockCopy> copies, std::span<std::uint64_t> sums) = 0;

  // Blocks, without spinning, until nothing submitted will read or write any more. An error says that some may not have
  // been copied; even then nothing is in flight.
  virtual Status synchronize() = 0;
};

// One accelerator (or this process's memory) as one engine rank sees it. Thread-safe; outlives its streams and events.
class Device {
 public:
  virtual ~Device() = default;

  virtual std::string_view name() const = 0;
  // Shorter copies than this do not fill its link.
  virtual std::uint32_t efficient_copy_bytes() const = 0;
  // Of how many blocks that are saved one may be summed, for that to take under 2 % of the time of their copies.
  virtual std::uint32_t saves_per_sum() const = 0;

  // Makes [base, base + bytes) fast to copy from and to. May run in a thread of its own while streams copy, more
  // slowly, through memory not registered yet. One pool at a time; it must stay mapped until unregister_pool().
  virtual Status register_pool(std::byte* base, std::size_t bytes) = 0;
  // No copy may be in flight. Nothing happens if no pool is registered.
  virtual void unregister_pool() = 0;

  // `pool` is all memory that host offsets may point into; it outlives the stream. The layout is copied.
  virtual Result<std::unique_ptr<CopyStream>> open_stream(Direction direction, const layout::BlockLayout& layout,
                                                          std::span<std::byte> pool) = 0;

  // The point that `engine_stream` (a cudaStream_t; 0 is the default stream) has been given work up to.
  virtual Result<std::unique_ptr<EngineEvent>> record(std::uintptr_t engine_stream) = 0;

  // Makes the engine's stream wait, on the device, for all that was submitted to `stream` so far. To be called by the
  // thread that owns `stream`.
  virtual Status order_engine_after(std::uintptr_t engine_stream, CopyStream& stream) = 0;

  // Not where the driver cannot do it.
  virtual Result<std::shared_ptr<Gate>> make_gate() = 0;

  // Plain access to device memory, slow and synchronous, for self_test().
  virtual Status read(std::uint64_t address, std::span<std::byte> bytes) = 0;
  virtual Status write(std::uint64_t address, std::span<const std::byte> bytes) = 0;
};

// What every form checks before it touches memory: all blocks and extents are in range. Names the first that is not.
Status check_copies(std::span<const BlockCopy> copies, const layout::BlockLayout& layout, std::size_t pool_bytes);

}  // namespace flexkv::device
