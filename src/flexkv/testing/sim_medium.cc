#include "flexkv/testing/sim_medium.h"

#include <algorithm>
#include <cstring>

namespace flexkv::testing {

std::size_t SimFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  if (offset >= bytes_.size()) return 0;
  const std::size_t count = std::min<std::size_t>(out.size(), bytes_.size() - offset);
  std::memcpy(out.data(), bytes_.data() + offset, count);
  return count;
}

SimFile::Sector SimFile::sector(std::uint64_t index) const {
  Sector out{};
  read(index * kSectorBytes, out);
  return out;
}

void SimFile::write(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t sequence) {
  if (data.empty()) return;
  const std::uint64_t first = offset / kSectorBytes;
  const std::uint64_t last = (offset + data.size() - 1) / kSectorBytes;
  for (std::uint64_t i = first; i <= last; ++i) {
    std::vector<Version>& versions = unsynced_[i];
    if (versions.empty()) versions.push_back({0, sector(i)});
  }
  if (offset + data.size() > bytes_.size()) bytes_.resize(offset + data.size());
  std::memcpy(bytes_.data() + offset, data.data(), data.size());
  for (std::uint64_t i = first; i <= last; ++i) unsynced_[i].push_back({sequence, sector(i)});
}

void SimFile::tear(std::uint64_t offset, std::span<const std::byte> data, std::uint64_t sequence, Prng& prng) {
  while (!data.empty()) {
    const std::size_t count = std::min<std::size_t>(data.size(), kSectorBytes - offset % kSectorBytes);
    if (prng.chance(50)) write(offset, data.first(count), sequence);
    offset += count;
    data = data.subspan(count);
  }
}

void SimFile::grow(std::size_t size) {
  bytes_.resize(std::max(size, bytes_.size()));
  durable_size_ = std::max(size, durable_size_);
}

void SimFile::truncate(std::size_t size) {
  if (size >= bytes_.size()) return;
  bytes_.resize(size);
  durable_size_ = std::min(durable_size_, size);
  // What lay beyond must not come back when the file grows again.
  unsynced_.erase(unsynced_.lower_bound((size + kSectorBytes - 1) / kSectorBytes), unsynced_.end());
}

void SimFile::sync(std::uint64_t sequence) {
  durable_size_ = bytes_.size();
  for (auto entry = unsynced_.begin(); entry != unsynced_.end();) {
    std::vector<Version>& versions = entry->second;
    const auto later = std::find_if(versions.begin(), versions.end(),
                                    [&](const Version& version) { return version.sequence > sequence; });
    versions.erase(versions.begin(), later - 1);
    entry = versions.size() == 1 ? unsynced_.erase(entry) : std::next(entry);
  }
}

void SimFile::power_cut(Prng& prng) {
  // Whole cuts of one kind find what mixtures hide: nothing survives, all does, or any.
  const std::uint64_t kind = prng.below(4);
  for (const auto& [index, versions] : unsynced_) {
    const std::size_t kept = kind == 0 ? 0 : kind == 1 ? versions.size() - 1 : prng.below(versions.size());
    const std::uint64_t offset = index * kSectorBytes;
    std::memcpy(bytes_.data() + offset, versions[kept].bytes.data(),
                std::min<std::size_t>(kSectorBytes, bytes_.size() - offset));
  }
  unsynced_.clear();
  if (kind == 0 || (kind > 1 && prng.chance(50))) bytes_.resize(std::min(bytes_.size(), durable_size_));
  durable_size_ = bytes_.size();
}

std::uint64_t SimMedium::used_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& [name, file] : files) bytes += file->size();
  return bytes;
}

}  // namespace flexkv::testing
