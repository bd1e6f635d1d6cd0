#include "flexkv/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace flexkv {
namespace {

spdlog::logger& logger() {
  // Never destroyed: threads may still log while the process exits.
  static spdlog::logger* instance = [] {
    auto* created = new spdlog::logger("flexkv", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    created->set_pattern("%L %m-%d %H:%M:%S.%e [flexkv %P] %v");
    created->flush_on(spdlog::level::info);
    return created;
  }();
  return *instance;
}

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

}  // namespace

void set_log_level(LogLevel level) { logger().set_level(to_spdlog(level)); }

void log(LogLevel level, std::string_view line) { logger().log(to_spdlog(level), "{}", line); }

}  // namespace flexkv
