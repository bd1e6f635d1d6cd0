#include "flexkv/base/result.h"

#include <system_error>

namespace flexkv {

Error errno_error(const std::string& what, int saved_errno) {
  return {ErrorCode::kIo, what + ": " + std::generic_category().message(saved_errno)};
}

}  // namespace flexkv
