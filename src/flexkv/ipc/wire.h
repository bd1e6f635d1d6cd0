// Encoding of messages between processes: little-endian PODs, length-prefixed strings and arrays. Writer appends to a
// buffer it owns; Reader walks bytes owned by the caller, which must be private (never shared memory: a peer could
// change it between the check and the use). Both thread-compatible.
// Bounds: every variable-length read names its cap. At a cap, or past the end, the Reader fails and stays failed: each
// later read gives zero or nothing, so a parser checks done() once at its end.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "flexkv/base/assert.h"

namespace flexkv::ipc {

static_assert(std::endian::native == std::endian::little, "PODs travel as they lie in memory");

// Without padding, so nothing uninitialised leaves the process; without bool or pointers, so any bytes are a valid
// value. A struct must not contain a bool either (not checkable here). An enum may hold a value that has no name.
template <typename T>
concept WirePod = std::is_trivially_copyable_v<T> && !std::same_as<T, bool> && !std::is_pointer_v<T> &&
                  (std::has_unique_object_representations_v<T> || std::same_as<T, float> || std::same_as<T, double>);

class Writer {
 public:
  template <WirePod T>
  void pod(const T& value) {
    append(std::as_bytes(std::span(&value, 1)));
  }
  // u32 count, then the elements. REQUIRES: fewer than 2^32 elements.
  template <WirePod T>
  void array(std::span<const T> values) {
    FLEXKV_ASSERT(values.size() <= std::numeric_limits<std::uint32_t>::max());
    pod(static_cast<std::uint32_t>(values.size()));
    append(std::as_bytes(values));
  }
  void bytes(std::span<const std::byte> value) { array(value); }
  void string(std::string_view value) { array(std::span<const char>(value)); }

  std::span<const std::byte> data() const { return buffer_; }
  std::vector<std::byte> take() { return std::exchange(buffer_, {}); }
  void clear() { buffer_.clear(); }

 private:
  // Inlined, g++ 12 takes it for an overflow in callers that write more than a few values.
  [[gnu::noinline]] void append(std::span<const std::byte> raw) {
    buffer_.insert(buffer_.end(), raw.begin(), raw.end());
  }

  std::vector<std::byte> buffer_;
};

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <WirePod T>
  T pod() {
    T value{};
    const auto raw = take(sizeof(T));
    if (ok_) std::memcpy(&value, raw.data(), sizeof(T));
    return value;
  }
  template <WirePod T>
  std::vector<T> array(std::size_t max_count) {
    const auto raw = counted(max_count, sizeof(T));
    std::vector<T> values(raw.size() / sizeof(T));
    if (!raw.empty()) std::memcpy(values.data(), raw.data(), raw.size());
    return values;
  }
  // Views into the Reader's bytes.
  std::span<const std::byte> bytes(std::size_t max_size) { return counted(max_size, 1); }
  std::string_view string(std::size_t max_size) {
    const auto raw = counted(max_size, 1);
    return {reinterpret_cast<const char*>(raw.data()), raw.size()};
  }

  bool ok() const { return ok_; }
  // Everything was read and nothing is left over.
  bool done() const { return ok_ && rest_.empty(); }

 private:
  // u32 count, then count * size bytes. The count is compared, never multiplied, before it is known to fit.
  std::span<const std::byte> counted(std::size_t max_count, std::size_t size) {
    const std::size_t count = pod<std::uint32_t>();
    if (count > max_count || count > rest_.size() / size) ok_ = false;
    return take(ok_ ? count * size : 0);
  }
  std::span<const std::byte> take(std::size_t size) {
    if (!ok_ || size > rest_.size()) {
      ok_ = false;
      return {};
    }
    const auto taken = rest_.first(size);
    rest_ = rest_.subspan(size);
    return taken;
  }

  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace flexkv::ipc
