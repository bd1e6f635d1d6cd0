// How many bytes this process can still take without driving the machine, or its control group, out of memory: the
// least of the kernel's MemAvailable and the room under every cgroup v2 limit above this process (page cache counts as
// room). A snapshot: others allocate too. Thread-safe.
#pragma once

#include <cstdint>

namespace flexkv::memory {

// UINT64_MAX where the machine tells nothing.
std::uint64_t available_memory();

}  // namespace flexkv::memory
