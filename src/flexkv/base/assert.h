// Programmer errors end the process, in release builds too: a broken invariant of a cache is wrong KV in waiting.
// Never reachable from user input, a device, a file or a peer: those are flexkv::Error.
#pragma once

#include <cstdio>
#include <cstdlib>

#define FLEXKV_ASSERT(condition)                                                                        \
  do {                                                                                                  \
    if (!(condition)) [[unlikely]] {                                                                    \
      std::fprintf(stderr, "flexkv: assertion failed: %s, at %s:%d\n", #condition, __FILE__, __LINE__); \
      std::abort();                                                                                     \
    }                                                                                                   \
  } while (false)
