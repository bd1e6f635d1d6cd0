// Which seeds a simulation runs: FLEXKV_SEED, FLEXKV_FIRST_SEED, FLEXKV_SEEDS.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace flexkv::testing {

// Of the environment variable.
inline std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace flexkv::testing
