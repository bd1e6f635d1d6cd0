// Time as the core sees it: nanoseconds of a monotonic clock, always passed in, never read inside the core.
#pragma once

#include <cstdint>
#include <ctime>

namespace flexkv {

using Nanos = std::int64_t;

constexpr Nanos kMicrosecond = 1'000;
constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kSecond = 1'000'000'000;

// The real clock, for the shells around the core (server, agent and client threads).
inline Nanos monotonic_now() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return Nanos{now.tv_sec} * kSecond + now.tv_nsec;
}

}  // namespace flexkv
