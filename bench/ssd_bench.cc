// The suite `ssd`: `flexkv-bench ssd BYTES DIR...` makes a file of BYTES in a new folder of each directory and then
// does what the lines on its input say, each answered by one line of JSON:
//
//   fill                                                       writes the files
//   drive|threads read|write sequential|random BLOCK SECONDS SEED DIRECTORIES FLIGHTS
//
// `flexkv bench ssd` is the command for people: it runs fio in between, on the same files. `flexkv bench transfer --ssd`
// loads blocks in between. The files and folders go
// when the input ends, so also when whoever gave it was killed.
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "bench/ssd_load.h"
#include "bench/suites.h"
#include "flexkv/memory/host_region.h"

namespace flexkv::bench {
namespace {

using Json = nlohmann::json;

// A new folder that goes with its owner.
class Folder {
 public:
  explicit Folder(const std::string& parent) : path_(parent + "/flexkv-bench-XXXXXX") {
    made_ = ::mkdtemp(path_.data()) != nullptr;
    if (!made_) error_ = errno_error("cannot make a folder in " + parent, errno).message;
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  ~Folder() {
    std::error_code failed;
    if (made_) std::filesystem::remove_all(path_, failed);
  }
  const std::string& path() const { return path_; }
  const std::string& error() const { return error_; }

 private:
  std::string path_;
  bool made_ = false;
  std::string error_;
};

void answer(const Json& line) { std::cout << line.dump() << std::endl; }

int fail(const std::string& message) {
  answer({{"error", message}});
  return 1;
}

using Loads = std::vector<std::unique_ptr<SsdLoad>>;

Json fill(Loads& loads) {
  for (const auto& load : loads) {
    if (Status status = load->fill(); !status) return {{"error", status.error().message}};
  }
  return Json::object();
}

Json measure(Loads& loads, const std::string& way, std::istringstream& words) {
  std::string op, order;
  Traffic traffic;
  double seconds = 0;
  std::size_t directories = 0;
  words >> op >> order >> traffic.block_bytes >> seconds >> traffic.seed >> directories >> traffic.flights;
  if (words.fail() || (way != "drive" && way != "threads") || (op != "read" && op != "write") ||
      (order != "sequential" && order != "random") || traffic.block_bytes == 0 ||
      traffic.block_bytes % file::kDirectAlignment != 0 || traffic.block_bytes > kSsdBlockMax || directories == 0 ||
      directories > loads.size() || traffic.flights == 0 || traffic.flights > kSsdFlights) {
    return {{"error", "not understood"}};
  }
  traffic.write = op == "write";
  traffic.random = order == "random";
  traffic.duration = static_cast<Nanos>(seconds * 1e9);
  const Nanos began = monotonic_now();
  for (std::size_t i = 0; i < directories; ++i) {
    way == "drive" ? loads[i]->start_drive(traffic) : loads[i]->start_threads(traffic);
  }
  Moved all;
  for (std::size_t i = 0; i < directories; ++i) {
    const Moved moved = loads[i]->wait();
    all.bytes += moved.bytes;
    all.ended = std::max(all.ended, moved.ended);
    if (all.error.empty()) all.error = moved.error;
  }
  if (!all.error.empty()) return {{"error", all.error}};
  return {{"bytes", all.bytes}, {"seconds", static_cast<double>(all.ended - began) / 1e9}};
}

}  // namespace

int run_ssd(std::uint64_t file_bytes, const std::vector<std::string>& directories) {
  // Whoever asked may be killed before the answer: the files are to go all the same.
  ::signal(SIGPIPE, SIG_IGN);
  // Each block twice as often there as it may be under way: no two flights meet.
  if (file_bytes < 2 * kSsdMemoryBytes) return fail("a file needs at least 256 MiB");
  auto pool =
      memory::HostRegion::create(directories.size() * kSsdMemoryBytes, {.huge_pages = false});  // as a node by default
  if (!pool) return fail(pool.error().message);
  if (Status status = pool.value().touch(); !status) return fail(status.error().message);
  const std::span<std::byte> memory(pool.value().data(), pool.value().bytes());
  std::vector<std::unique_ptr<Folder>> folders;
  Loads loads;
  Json files = Json::array();
  for (const std::string& directory : directories) {
    folders.push_back(std::make_unique<Folder>(directory));
    if (!folders.back()->error().empty()) return fail(folders.back()->error());
    auto load =
        SsdLoad::open(folders.back()->path(), file_bytes, memory, memory.data() + loads.size() * kSsdMemoryBytes);
    if (!load) return fail(load.error().message);
    loads.push_back(std::move(load).value());
    files.push_back(loads.back()->path());
  }
  answer({{"files", files}});
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string way;
    words >> way;
    Json result = way == "fill" ? fill(loads) : measure(loads, way, words);
    if (way == "fill") {
      result["memory"] = pool.value().description();
      for (const auto& load : loads) result["drives"].push_back(load->describe());
    }
    answer(result);
  }
  return 0;
}

}  // namespace flexkv::bench
