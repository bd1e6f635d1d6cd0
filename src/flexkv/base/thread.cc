#include "flexkv/base/thread.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace flexkv {
namespace {

// As the kernel has it; not every C library does.
struct SchedulingAttributes {
  std::uint32_t size;
  std::uint32_t policy;
  std::uint64_t flags;
  std::int32_t nice;
  std::uint32_t priority;
  std::uint64_t runtime_nanos;
  std::uint64_t deadline_nanos;
  std::uint64_t period_nanos;
};

constexpr std::uint64_t kSliceNanos = 100'000;  // the shortest there is

}  // namespace

void ask_for_short_slices() {
  constexpr int kThisThread = 0;
  SchedulingAttributes now{};
  if (::syscall(SYS_sched_getattr, kThisThread, &now, sizeof(now), 0U) != 0 || now.policy != SCHED_OTHER) return;
  now.runtime_nanos = kSliceNanos;
  (void)::syscall(SYS_sched_setattr, kThisThread, &now, 0U);
}

}  // namespace flexkv
