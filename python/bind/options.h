// The options that a Node is made with, as Python gives them: a dict that lacks what is to be the default.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "flexkv/server/node_server.h"

namespace flexkv::bind {

template <typename T>
T option(const nanobind::dict& options, const char* name, T fallback) {
  if (!options.contains(name)) return fallback;
  return nanobind::cast<T>(options[name]);
}

server::RemoteOptions remote_options(const nanobind::dict& options);

}  // namespace flexkv::bind
