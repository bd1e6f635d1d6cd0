// Which blocks are worth writing to SSD. Most blocks of a prompt are never asked for again, so writing all wears the
// drives for nothing. A block is worth it when it was used twice, or when blocks that came in under like circumstances
// (depth in the prompt, length of what was new, how popular the prefix before it is) tend to be used again. How often
// they are is learned as it happens; so is how choosy to be: refused blocks that come back and are nowhere count as
// lost, and the filter keeps these below a share of all hits.
//
// Pure logic, thread-compatible: no thread, no lock, no clock, no I/O. O(1) a key: one cache line of the memory of
// keys. Memory: 8 bytes per Options::remembered_blocks (rounded up to a power of two), plus 14 KiB. It is not
// persistent: after a restart it learns anew, admitting everything first.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flexkv/key/block_key.h"

namespace flexkv::admission {

// Where the blocks of a save come from: known from the lookup of their request.
struct Origin {
  std::uint32_t depth = 0;                    // blocks of the prompt before the first of these
  std::uint32_t prompt = 0;                   // blocks of the prompt
  std::uint32_t found = 0;                    // of them, found by its lookup
  const key::BlockKey* last_found = nullptr;  // the key of the last of those found; null: none
};

enum class Refusal : std::uint8_t {
  kNone,
  kUnlikely,  // new, and blocks like it are rarely used again
  kOnce,      // under pressure: not used twice yet
  kRare,      // under more pressure: not used often enough
};
const char* to_string(Refusal refusal);

class AdmissionFilter {
 public:
  struct Options {
    bool enabled = true;  // false: admits everything, remembers nothing
    // Keys to remember: about twice the blocks of host memory and SSD together. A power of two of 64-byte buckets.
    std::size_t remembered_blocks = 1U << 17;
    double lost_hits_max = 0.03;  // share of hits that refusing may cost without pressure, 0..1
    // Of a block. What is learned is learned from tokens: with small blocks as fast as with large ones.
    std::uint32_t block_tokens = 512;
  };
  struct Verdict {
    std::size_t count = 0;         // leading keys worth writing
    Refusal why = Refusal::kNone;  // the reason for the first that is not; kNone if all are
  };
  struct Stats {
    std::uint64_t admitted = 0;  // blocks, as asked
    std::uint64_t refused_unlikely = 0;
    std::uint64_t refused_once = 0;
    std::uint64_t refused_rare = 0;
    std::uint64_t hits = 0;       // blocks told by on_hit()
    std::uint64_t lost_hits = 0;  // blocks refused as unlikely that had to be computed again
  };

  explicit AdmissionFilter(const Options& options);

  // A lookup that counts as a use (once per request, not once per call of the engine) found these blocks.
  void on_hit(std::span<const key::BlockKey> keys);
  // These blocks, consecutive in a prompt, have been computed and published. Call before admit().
  void on_save(std::span<const key::BlockKey> keys, const Origin& origin);

  // How many of these blocks, consecutive in a prompt, none of which is on SSD while all before them are (or are being
  // written), should be written. A block behind one that is refused is never admitted: it could not be found.
  // `pressure`: WriteBudget::pressure(), 0..1. Up to 0.5 the likelihood asked for rises; from there blocks must have
  // been used twice; from 0.75 on three times, rising to ten times at 1.
  Verdict admit(std::span<const key::BlockKey> keys, double pressure);

  const Stats& stats() const { return stats_; }
  // How likely a new block must be used again to be written, relative to the average new block; without pressure. At
  // most 4.
  double threshold() const { return threshold_; }
  std::size_t memory_bytes() const;

 private:
  struct Entry {
    std::uint32_t fingerprint = 0;
    std::uint16_t context = 0;
    std::uint8_t uses = 0;  // 0: empty; counted up to 255
    bool refused = false;   // as unlikely, when last asked
  };
  struct alignas(64) Bucket {
    std::array<Entry, 8> entries;  // latest used first
  };
  // New blocks that came in under the same circumstances, and how many of them were used again.
  struct Outcome {
    float fresh = 0;
    float reused = 0;
  };

  static constexpr unsigned kDepths = 24;  // powers of two
  static constexpr unsigned kLengths = 24;
  static constexpr unsigned kPopularities = 3;

  Bucket& bucket_of(const key::BlockKey& key);
  Entry* find(const key::BlockKey& key);
  // The entry of the key, now the latest used of its bucket; uses == 0 if it is new.
  Entry& touch(const key::BlockKey& key);
  void use_again(Entry& entry);
  std::uint16_t context_of(std::uint32_t depth, std::uint32_t length, unsigned popularity) const;
  bool knows_enough() const;
  double likelihood(std::uint16_t context) const;
  Refusal judge(unsigned uses, double likely, double pressure) const;

  const Options options_;
  const float scale_;            // blocks in which 512 tokens are counted
  std::vector<Bucket> buckets_;  // size is a power of two
  std::vector<Outcome> outcomes_;
  Outcome all_;
  double threshold_ = 0.5;
  Stats stats_;
};

}  // namespace flexkv::admission
