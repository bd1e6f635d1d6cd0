// The simulated medium under a SimDrive: files that outlive drives, and forget what was not synced when power is cut.
// Of every 512-byte sector it keeps all contents since the last completed sync; a power cut leaves any one of them,
// each sector for itself. Names are durable at once. One thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/prng.h"

namespace flexkv::testing {

class SimFile {
 public:
  static constexpr std::size_t kSectorBytes = 512;

  std::size_t size() const { return bytes_.size(); }
  std::span<std::byte> bytes() { return bytes_; }
  // Bytes copied; less than asked for at the end of the file.
  std::size_t read(std::uint64_t offset, std::span<std::byte> out) const;
  void write(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t sequence);
  // Writes a random subset of the sectors.
  void tear(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t sequence, Prng& prng);
  // Zeros at the end, durable at once.
  void grow(std::size_t size);
  // Durable at once.
  void truncate(std::size_t size);
  // What writes up to `sequence` left is durable.
  void sync(std::uint64_t sequence);
  void power_cut(Prng& prng);

 private:
  struct Version {
    std::uint64_t sequence;
    std::array<std::byte, kSectorBytes> bytes;
  };
  using Sector = std::array<std::byte, kSectorBytes>;

  Sector sector(std::uint64_t index) const;

  std::vector<std::byte> bytes_;
  std::size_t durable_size_ = 0;
  std::map<std::uint64_t, std::vector<Version>> unsynced_;  // by sector; the durable one first
};

// Shared by the drives that follow one another on it.
struct SimMedium {
  std::uint64_t capacity_bytes = ~std::uint64_t{0};
  std::map<std::string, std::shared_ptr<SimFile>> files;
  std::uint64_t sequence = 0;  // of the last write

  std::uint64_t used_bytes() const;
};

}  // namespace flexkv::testing
