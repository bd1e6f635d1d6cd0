#include "hashes.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "flexkv/key/namespace.h"
#include "flexkv/key/token_hashes.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace flexkv::bind {
namespace {

using Tokens = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

key::TokenHashes token_hashes(const Tokens& tokens, std::uint32_t block_tokens,
                              const std::vector<std::string>& name_space) {
  auto made = [&] {
    nb::gil_scoped_release release;
    return key::TokenHashes::of({tokens.data(), tokens.size()}, block_tokens, name_space);
  }();
  if (!made) throw nb::value_error(made.error().message.c_str());
  return std::move(made).value();
}

std::span<const std::byte> hash_bytes(PyObject* hash) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (hash == nullptr || PyBytes_AsStringAndSize(hash, &data, &size) != 0) throw nb::python_error();
  if (size == 0 || static_cast<std::size_t>(size) > key::kEngineHashBytesMax) {
    throw nb::value_error("a block hash must have 1 to 256 bytes");
  }
  return {reinterpret_cast<const std::byte*>(data), static_cast<std::size_t>(size)};
}

}  // namespace

std::vector<std::span<const std::byte>> hash_views(const nb::object& hashes, std::uint32_t first) {
  std::vector<std::span<const std::byte>> views;
  const std::size_t count = nb::len(hashes);
  if (count > first) views.reserve(count - first);
  if (nb::isinstance<key::TokenHashes>(hashes)) {
    const auto& of_tokens = nb::cast<const key::TokenHashes&>(hashes);
    for (std::size_t i = first; i < count; ++i) views.push_back(of_tokens[i]);
    return views;
  }
  if (!nb::isinstance<nb::list>(hashes)) throw nb::type_error("hashes must be a list of bytes, or TokenHashes");
  for (std::size_t i = first; i < count; ++i) {
    views.push_back(hash_bytes(PyList_GetItem(hashes.ptr(), static_cast<Py_ssize_t>(i))));  // borrowed
  }
  return views;
}

void add_token_hashes(nb::module_& m) {
  nb::class_<key::TokenHashes>(m, "TokenHashes",
                               "Stands for a list of block hashes: one for each whole block of the tokens, which also "
                               "depends on all tokens before it and on the namespace. Not for several threads at once.")
      .def(
          "__init__",
          [](key::TokenHashes* self, const Tokens& tokens, std::uint32_t block_tokens,
             const std::vector<std::string>& name_space) {
            new (self) key::TokenHashes(token_hashes(tokens, block_tokens, name_space));
          },
          "tokens"_a, "block_tokens"_a, "namespace"_a, "ValueError: a token does not fit 32 bits.")
      .def(
          "append",
          [](key::TokenHashes& self, const Tokens& tokens) {
            auto taken = [&] {
              nb::gil_scoped_release release;
              return self.append({tokens.data(), tokens.size()});
            }();
            if (!taken) throw nb::value_error(taken.error().message.c_str());
          },
          "tokens"_a, "Goes on with the tokens that follow. ValueError: one does not fit 32 bits; then none is taken.")
      .def("__len__", &key::TokenHashes::size);
}

}  // namespace flexkv::bind
