#include "flexkv/memory/available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>
#include <string>

namespace flexkv::memory {
namespace {

constexpr std::uint64_t kUnknown = std::numeric_limits<std::uint64_t>::max();

// The number behind `name` in a file of "name number" lines.
std::optional<std::uint64_t> field(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  std::uint64_t number = 0;
  for (std::string line; file >> word; std::getline(file, line)) {
    if (word == name && file >> number) return number;
  }
  return std::nullopt;
}

std::optional<std::uint64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (file >> number) return number;  // "max", that is no limit, is no number
  return std::nullopt;
}

std::uint64_t cgroup_room(const std::string& folder) {
  const auto limit = number_in(folder + "/memory.max");
  const auto current = number_in(folder + "/memory.current");
  if (!limit || !current) return kUnknown;
  const std::uint64_t cache = field(folder + "/memory.stat", "active_file").value_or(0) +
                              field(folder + "/memory.stat", "inactive_file").value_or(0);
  const std::uint64_t used = *current - std::min(*current, cache);
  return *limit - std::min(*limit, used);
}

// Path of this process in the cgroup v2 tree: "/" in a container with a namespace of its own.
std::string own_cgroup() {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("0::/")) return line.substr(3);
  }
  return "/";
}

}  // namespace

std::uint64_t available_memory() {
  std::uint64_t room = kUnknown;
  if (const auto kib = field("/proc/meminfo", "MemAvailable:")) room = *kib * 1024;
  std::string group = own_cgroup();
  while (!group.empty()) {
    room = std::min(room, cgroup_room("/sys/fs/cgroup" + group));
    group.resize(group.size() > 1 ? std::max<std::size_t>(group.rfind('/'), 1) : 0);
  }
  return room;
}

}  // namespace flexkv::memory
