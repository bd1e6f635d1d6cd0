// Result<T>: a value or an Error. For operating errors (a file, a peer, a device, bad input); outcomes such as a miss
// or a full queue are values, programmer errors are FLEXKV_ASSERT. Thread-compatible.
#pragma once

#include <string>
#include <utility>
#include <variant>

#include "flexkv/base/assert.h"

namespace flexkv {

enum class ErrorCode {
  kInvalidArgument,  // the caller gave something that can never work
  kNotFound,
  kNoSpace,     // a bounded resource is full
  kIo,          // a system call failed
  kCorruption,  // bytes are not what they claim to be
  kDevice,      // the accelerator reported an error
  kPeer,        // another process is gone or broke the protocol
  kTimeout,
  kCanceled,
  kUnsupported,
};

// What was wrong, where, and what to do about it.
struct Error {
  ErrorCode code = ErrorCode::kInvalidArgument;
  std::string message;
};

template <typename T = std::monostate>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : state_(std::in_place_index<1>, std::move(error)) {}
  Result() requires std::is_same_v<T, std::monostate> : state_(std::in_place_index<0>) {}

  bool ok() const { return state_.index() == 0; }
  explicit operator bool() const { return ok(); }

  // REQUIRES: ok()
  T& value() & {
    FLEXKV_ASSERT(ok());
    return std::get<0>(state_);
  }
  const T& value() const& {
    FLEXKV_ASSERT(ok());
    return std::get<0>(state_);
  }
  T&& value() && {
    FLEXKV_ASSERT(ok());
    return std::get<0>(std::move(state_));
  }
  // REQUIRES: !ok()
  const Error& error() const {
    FLEXKV_ASSERT(!ok());
    return std::get<1>(state_);
  }

 private:
  std::variant<T, Error> state_;
};

using Status = Result<>;

// Builds the Error for a failed system call: "<what>: <strerror(saved_errno)>".
Error errno_error(const std::string& what, int saved_errno);

}  // namespace flexkv
