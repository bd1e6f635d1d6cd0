#include <sys/random.h>

#include "flexkv/base/assert.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

const char* transport_name(Transport transport) {
  switch (transport) {
    case Transport::kNone:
      return "tcp";
    case Transport::kNixl:
      return "nixl";
    case Transport::kMooncake:
      return "mooncake";
  }
  return "?";
}

LeaseWords::LeaseWords(std::span<std::uint64_t> memory) : words_(memory) {
  for (auto word = static_cast<std::uint32_t>(words_.size()); word-- > 0;) {
    std::uint64_t begin = 0;
    FLEXKV_ASSERT(::getrandom(&begin, sizeof(begin), 0) == sizeof(begin));
    Word(words_[word]).store(begin, std::memory_order_relaxed);
    free_.push_back(word);
  }
}

std::optional<std::uint32_t> LeaseWords::take() {
  if (free_.empty()) return std::nullopt;
  const std::uint32_t word = free_.back();
  free_.pop_back();
  return word;
}

void LeaseWords::end(std::uint32_t word) {
  Word(words_[word]).fetch_add(1, std::memory_order_seq_cst);  // before anything that follows, for whoever looks
  free_.push_back(word);
}

}  // namespace flexkv::peer
