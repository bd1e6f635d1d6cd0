// Log lines of the process, through spdlog, to stderr. Level by set_log_level(); info at first.
// Lines carry numbers and names, never keys, tokens or secrets. Thread-safe.
#pragma once

#include <string_view>

namespace flexkv {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

void set_log_level(LogLevel level);
void log(LogLevel level, std::string_view line);

inline void log_debug(std::string_view line) { log(LogLevel::kDebug, line); }
inline void log_info(std::string_view line) { log(LogLevel::kInfo, line); }
inline void log_warning(std::string_view line) { log(LogLevel::kWarning, line); }
inline void log_error(std::string_view line) { log(LogLevel::kError, line); }

}  // namespace flexkv
