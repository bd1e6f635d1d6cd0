// How many blocks of a load have come without a gap, from its first one on; they come in any order. Thread-compatible.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

#include "flexkv/proto/messages.h"

namespace flexkv::agent {

class LeadingBlocks {
 public:
  void add(const proto::BlockSpan& span) {
    std::uint32_t& end = ends_[span.first];
    end = std::max(end, span.first + span.count);
    while (!ends_.empty() && ends_.begin()->first <= count_) {
      count_ = std::max(count_, ends_.begin()->second);
      ends_.erase(ends_.begin());
    }
  }
  std::uint32_t count() const { return count_; }

 private:
  std::uint32_t count_ = 0;
  std::map<std::uint32_t, std::uint32_t> ends_;  // of those behind a gap, by their first block
};

}  // namespace flexkv::agent
