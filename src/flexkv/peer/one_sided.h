// One-sided reads, as a seam: memory of other nodes is read without their doing, so it may be anything by the time it
// is read. What makes a read right is the lease's word (docs/decisions/0020, 0024): the owner changes it before it
// unpins the lease's blocks; a reader that finds it unchanged *after* it has read a block has read what the lease
// promised.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace flexkv::peer {

enum class Transport : std::uint8_t { kNone, kNixl, kMooncake };
constexpr std::uint8_t kTransportCount = 3;
const char* transport_name(Transport transport);

// Where a node's memory is to be read. Addresses mean something to that node only.
struct Window {
  Transport transport = Transport::kNone;  // kNone: nothing is to be read
  std::vector<std::byte> metadata{};       // for the transport of whoever reads
  std::uint64_t pool = 0;
  std::uint64_t pool_bytes = 0;
  std::uint64_t words = 0;  // of leases, 8 bytes each
  std::uint32_t word_count = 0;

  std::uint64_t words_bytes() const { return word_count * sizeof(std::uint64_t); }
  bool holds(std::uint64_t offset, std::uint64_t bytes) const {
    return bytes <= pool_bytes && offset <= pool_bytes - bytes;
  }
};

// One word for each lease that is read by itself. They begin at random numbers, so that those of a node that was
// started anew with its memory at the same place are others. Thread-compatible; readers elsewhere read them at any
// time.
class LeaseWords {
 public:
  // `memory`: a word each; it outlives this object.
  explicit LeaseWords(std::span<std::uint64_t> memory);

  std::optional<std::uint32_t> take();  // none: all are taken
  std::uint64_t generation(std::uint32_t word) const { return Word(words_[word]).load(std::memory_order_relaxed); }
  // The lease is over. REQUIRES: what it pinned is pinned still
  void end(std::uint32_t word);

 private:
  using Word = std::atomic_ref<std::uint64_t>;
  static_assert(Word::is_always_lock_free);

  const std::span<std::uint64_t> words_;
  std::vector<std::uint32_t> free_;
};

struct Piece {
  std::uint64_t address = 0;  // at the owner
  std::uint32_t bytes = 0;    // up to kPieceBytesMax
  std::uint64_t word_address = 0;
};
constexpr std::uint32_t kPieceBytesMax = 2U << 20;
constexpr std::uint32_t kLeasesByThemselves = 16384;

struct Fetched {
  bool ok = false;
  std::span<const std::byte> bytes;
  std::uint64_t word = 0;      // read after them
  std::shared_ptr<void> room;  // keeps the bytes; what is read next waits for it
};

class OneSided {
 public:
  virtual ~OneSided() = default;
  virtual Transport transport() const = 0;
  // Of this node, for others, as it is now; null: nothing can be read, here or there. Thread-safe.
  virtual std::shared_ptr<const Window> window() const = 0;
  // What the window shows, where it lies for this process.
  virtual std::span<const std::byte> pool() const = 0;
  // Its words; the caller's to use, from one thread.
  virtual LeaseWords& words() = 0;
  // Reads from `owner`, whose window this is. False: there is no room now. `done` is called once, on any thread, not
  // from inside; never when the read hangs. Nothing of the caller's is ever written to. Thread-safe; does not block.
  virtual bool fetch(const std::string& owner, const Window& window, const Piece& piece,
                     std::function<void(Fetched)> done) = 0;
  // Why nothing can be read now, though it should; empty: it can, or will in a moment. Thread-safe.
  virtual std::string trouble() const { return {}; }
  // This owner is gone. Thread-safe; does not block.
  virtual void forget(const std::string& owner) = 0;
  // Gives up reads that are under way; `done` of these is not called any more once this has returned. False: something
  // that hangs still knows the pool, which must stay mapped from now on. A second call answers at once. REQUIRES: no
  // other call meanwhile or after it
  virtual bool end() = 0;
};

}  // namespace flexkv::peer
