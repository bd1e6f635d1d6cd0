#include "flexkv/memory/numa.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string_view>

namespace flexkv::memory {
namespace {

constexpr std::string_view kNvidia = "0x10de";
// Classes of PCI devices: display controllers, which GPUs without a display are as well.
constexpr std::string_view kDisplay = "0x03";

std::string first_line(const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

std::optional<unsigned> number_in(std::string_view text) {
  unsigned number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

// As the kernel writes sets of numbers: "0-3,8".
std::set<unsigned> numbers_in(std::string_view list) {
  std::set<unsigned> numbers;
  while (!list.empty()) {
    const std::string_view part = list.substr(0, list.find(','));
    list.remove_prefix(std::min(list.size(), part.size() + 1));
    const std::size_t dash = part.find('-');
    const auto first = number_in(part.substr(0, dash));
    const auto last = dash == std::string_view::npos ? first : number_in(part.substr(dash + 1));
    if (!first || !last || *last >= CPU_SETSIZE) continue;
    for (unsigned number = *first; number <= *last; ++number) numbers.insert(number);
  }
  return numbers;
}

// Of the GPUs that say where they are.
std::set<unsigned> nodes_of_gpus(const std::filesystem::path& sysfs) {
  std::set<unsigned> nodes;
  std::error_code error;
  for (const auto& device : std::filesystem::directory_iterator(sysfs / "bus/pci/devices", error)) {
    if (first_line(device.path() / "vendor") != kNvidia) continue;
    if (!first_line(device.path() / "class").starts_with(kDisplay)) continue;
    if (const auto node = number_in(first_line(device.path() / "numa_node"))) nodes.insert(*node);  // "-1": not known
  }
  return nodes;
}

std::string text_of(const std::vector<NumaNode>& nodes) {
  std::string text = nodes.size() == 1 ? "on NUMA node " : "in turns on NUMA nodes ";
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    if (i > 0) text += i + 1 == nodes.size() ? " and " : ", ";
    text += std::to_string(nodes[i].number);
  }
  return text + ", where the GPUs are";
}

}  // namespace

NumaPlacement place_near_gpus(const std::string& sysfs) {
  const std::filesystem::path root(sysfs);
  const std::set<unsigned> with_memory = numbers_in(first_line(root / "devices/system/node/has_memory"));
  const std::set<unsigned> of_gpus = nodes_of_gpus(root);
  if (with_memory.size() < 2) return {};
  if (of_gpus.empty()) return {{}, "on any NUMA node (no GPU here says which is its own)"};
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  (void)sched_getaffinity(0, sizeof allowed, &allowed);
  NumaPlacement placement;
  for (const unsigned number : of_gpus) {
    NumaNode node{number, {}};
    CPU_ZERO(&node.cpus);
    const auto cpus = root / "devices/system/node" / ("node" + std::to_string(number)) / "cpulist";
    for (const unsigned cpu : numbers_in(first_line(cpus))) CPU_SET(cpu, &node.cpus);
    CPU_AND(&node.cpus, &node.cpus, &allowed);
    if (with_memory.contains(number) && CPU_COUNT(&node.cpus) > 0) placement.nodes.push_back(node);
  }
  placement.text = placement.nodes.empty() ? "on any NUMA node (this process may not run where the GPUs are)"
                                           : text_of(placement.nodes);
  return placement;
}

NearNode::NearNode(std::span<const NumaNode> nodes, std::size_t turn) {
  if (nodes.empty() || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
  moved_ = sched_setaffinity(0, sizeof(cpu_set_t), &nodes[turn % nodes.size()].cpus) == 0;
}

NearNode::~NearNode() {
  if (moved_) (void)sched_setaffinity(0, sizeof before_, &before_);
}

}  // namespace flexkv::memory
