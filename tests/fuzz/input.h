#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>

namespace flexkv::fuzz {

using Bytes = std::span<const std::byte>;

// The fuzzer's choices, read from the front of the input; zeros when it has ended.
class Input {
 public:
  explicit Input(Bytes rest) : rest_(rest) {}
  bool empty() const { return rest_.empty(); }
  Bytes bytes(std::size_t size) {
    const auto taken = rest_.first(std::min(size, rest_.size()));
    rest_ = rest_.subspan(taken.size());
    return taken;
  }
  template <typename T>
  T pod() {
    T value{};
    const auto raw = bytes(sizeof(T));
    if (!raw.empty()) std::memcpy(&value, raw.data(), raw.size());
    return value;
  }
  Bytes rest() const { return rest_; }

 private:
  Bytes rest_;
};

}  // namespace flexkv::fuzz
