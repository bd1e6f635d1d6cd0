// The block hashes of a prompt as Python hands them over: bytes objects, or TokenHashes.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flexkv::bind {

// Views of the hashes from number `first` on. They live as long as `hashes`, which must not change meanwhile.
std::vector<std::span<const std::byte>> hash_views(const nanobind::object& hashes, std::uint32_t first);

// Adds the class TokenHashes to the module.
void add_token_hashes(nanobind::module_& m);

}  // namespace flexkv::bind
