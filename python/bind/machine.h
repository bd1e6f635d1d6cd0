// What `flexkv doctor` asks the core about this machine: each function does what a node or an agent does at its start.
#pragma once

#include <nanobind/nanobind.h>

namespace flexkv::bind {

void bind_machine(nanobind::module_& m);

}  // namespace flexkv::bind
