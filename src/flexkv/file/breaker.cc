#include "flexkv/file/breaker.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace flexkv::file {

bool is_drive_fault(int error_number) {
  switch (error_number) {
    case EIO:
    case ENXIO:
    case ENODEV:
    case ETIMEDOUT:
    case ESTALE:
    case ENODATA:  // as the kernel reports a bad sector; the end of a file is not an error of the kernel's
    case EREMOTEIO:
    case ENOLINK:
    case ENOMEDIUM:
    case EILSEQ:
    case EBADE:
      return true;
    default:
      return false;
  }
}

Nanos Breaker::stall_after(Wait wait) const {
  constexpr Nanos kFactors[] = {1, 5, 30};
  return kFactors[static_cast<std::size_t>(wait)] * limits_.stall_after;
}

bool Breaker::failed(int error_number, Nanos now) {
  if (!is_drive_fault(error_number)) return false;
  if (++failures_in_row_ < limits_.failures_in_row_max) return false;
  trip(std::to_string(failures_in_row_) + " failures in a row, the last: " + std::strerror(error_number), error_number,
       now);
  return true;
}

void Breaker::stalled(const char* what, Nanos age, Nanos now) {
  trip(std::string(what) + " hangs for " + std::to_string(age / kMillisecond) + " ms", ETIMEDOUT, now);
}

void Breaker::probed(int error_number, Nanos now) {
  if (error_number == 0) {
    why_.clear();
    failures_in_row_ = 0;
    available_since_ = now;
    return;
  }
  backoff_ = std::min(2 * backoff_, limits_.probe_after_max);
  probe_at_ = now + backoff_;
}

void Breaker::trip(std::string why, int error_number, Nanos now) {
  // A drive that passes its probes and then fails at once again must not flap.
  const bool soon = tripped_before_ && now - available_since_ < limits_.probe_after_max;
  backoff_ = soon ? std::min(2 * backoff_, limits_.probe_after_max) : limits_.probe_after;
  tripped_before_ = true;
  why_ = std::move(why);
  error_number_ = error_number;
  probe_at_ = now + backoff_;
}

}  // namespace flexkv::file
