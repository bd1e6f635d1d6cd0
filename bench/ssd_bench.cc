#include "bench/ssd_bench.h"

#include <fcntl.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "flexkv/base/fd.h"
#include "flexkv/base/prng.h"
#include "flexkv/base/time.h"
#include "flexkv/file/open_drive.h"

namespace flexkv::bench {
namespace {

constexpr char kName[] = "flexkv-ssd-bench";
constexpr std::size_t kFlights = 32;  // blocks at a drive at once

struct Point {
  bool write;
  bool random;
  std::size_t block_bytes;
  std::uint64_t blocks;  // of the file
  Nanos until;
};

std::uint64_t offset_of(const Point& point, std::uint64_t i) {
  return (point.random ? Prng::mix(i) : i) % point.blocks * point.block_bytes;
}

class Load final : public file::DriveSink {
 public:
  void start(const Point& point, std::byte* memory) {
    point_ = point;
    memory_ = memory;
    auto opened = drive->open(kName, true);
    FLEXKV_ASSERT(opened.ok());
    file_ = opened.value();
    running_ = kFlights;
    for (std::uint64_t i = 0; i < kFlights; ++i) submit(i);
  }
  std::uint64_t wait() {
    for (auto left = running_.load(); left > 0; left = running_.load()) running_.wait(left);
    drive->close_file(file_);
    return bytes_.exchange(0);
  }
  void on_completions(std::span<const file::Completion> completions) override {
    for (const file::Completion& completion : completions) {
      if (completion.outcome == file::Outcome::kDone) bytes_ += point_.block_bytes;
      if (completion.outcome == file::Outcome::kDone && monotonic_now() < point_.until) {
        submit(completion.tag);
      } else if (--running_ == 0) {
        running_.notify_all();
      }
    }
  }
  void on_overdue(std::uint64_t) override {}
  void on_availability(bool, const std::string&) override {}

  std::unique_ptr<file::Drive> drive;

 private:
  void submit(std::uint64_t flight) {
    const file::Request request{.tag = flight,
                                .op = point_.write ? file::Op::kWrite : file::Op::kRead,
                                .file = file_,
                                .offset = offset_of(point_, next_++),
                                .data = memory_ + flight * point_.block_bytes,
                                .bytes = point_.block_bytes};
    FLEXKV_ASSERT(drive->submit({&request, 1}));
  }

  Point point_{};
  std::byte* memory_ = nullptr;
  file::FileId file_{};
  std::atomic<std::uint64_t> next_ = 0;
  std::atomic<std::uint64_t> bytes_ = 0;
  std::atomic<std::size_t> running_ = 0;
};

std::uint64_t run_threads(const std::string& path, const Point& point, std::byte* memory) {
  const Fd fd(::open(path.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  std::atomic<std::uint64_t> next = 0, bytes = 0;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kFlights; ++i) {
    threads.emplace_back([&, data = memory + i * point.block_bytes] {
      while (monotonic_now() < point.until) {
        const auto at = static_cast<off_t>(offset_of(point, next++));
        const ssize_t done = point.write ? ::pwrite(fd.get(), data, point.block_bytes, at)
                                         : ::pread(fd.get(), data, point.block_bytes, at);
        if (done <= 0) return;
        bytes += static_cast<std::uint64_t>(done);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return bytes;
}

}  // namespace

Result<std::vector<SsdBenchRow>> run_ssd(const SsdBenchOptions& options) {
  std::size_t largest = 0;
  for (const std::size_t bytes : options.block_bytes) largest = std::max(largest, bytes);
  const std::size_t share = kFlights * largest;  // of one directory
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(2 << 20, (options.directories.size() * share + (2 << 20) - 1) >> 21 << 21), &std::free);
  auto* const base = static_cast<std::byte*>(memory.get());
  std::fill_n(base, options.directories.size() * share, std::byte{1});
  std::vector<std::unique_ptr<Load>> plain, registered;
  for (auto* loads : {&plain, &registered}) {
    for (const std::string& directory : options.directories) {
      loads->push_back(std::make_unique<Load>());
      auto drive = file::open_drive({.directory = directory, .keep_free_bytes = 0}, *loads->back());
      if (!drive) return drive.error();
      loads->back()->drive = std::move(drive).value();
    }
  }
  for (auto& load : registered) load->drive->register_memory({base, options.directories.size() * share});
  std::vector<SsdBenchRow> rows;
  const auto run = [&](const std::string& what, Point point, auto transfer) {
    const Nanos began = monotonic_now();
    point.until = began + static_cast<Nanos>(options.seconds * 1e9);
    const std::uint64_t bytes = transfer(point);
    rows.push_back({what + (point.write ? " write" : " read") + (point.random ? " random" : " sequential"),
                    point.block_bytes, static_cast<double>(bytes) / static_cast<double>(monotonic_now() - began)});
  };
  const auto drives = [&](std::vector<std::unique_ptr<Load>>& loads, const Point& point) {
    for (std::size_t i = 0; i < loads.size(); ++i) loads[i]->start(point, base + i * share);
    std::uint64_t bytes = 0;
    for (auto& load : loads) bytes += load->wait();
    return bytes;
  };
  const auto loops = [&](const Point& point) {
    std::atomic<std::uint64_t> bytes = 0;
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < options.directories.size(); ++i) {
      threads.emplace_back(
          [&, i] { bytes += run_threads(options.directories[i] + "/" + kName, point, base + i * share); });
    }
    for (std::thread& thread : threads) thread.join();
    return bytes.load();
  };
  for (std::size_t i = 0; i < plain.size(); ++i) {  // real bytes: unwritten extents read as zeros from no drive
    auto opened = plain[i]->drive->open(kName, true);
    if (!opened) return opened.error();
    auto status = plain[i]->drive->allocate(opened.value(), 0, options.file_bytes);
    if (!status) return status.error();
    plain[i]->drive->close_file(opened.value());
    const Fd fd(::open((options.directories[i] + "/" + kName).c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC));
    for (std::uint64_t at = 0; at + largest <= options.file_bytes; at += largest) {
      if (::pwrite(fd.get(), base, largest, static_cast<off_t>(at)) <= 0) return errno_error("cannot fill", errno);
    }
  }
  for (const std::size_t bytes : options.block_bytes) {
    for (const bool write : {false, true}) {
      for (const bool random : {false, true}) {
        const Point point{write, random, bytes, options.file_bytes / bytes, 0};
        run("drive", point, [&](const Point& each) { return drives(plain, each); });
        run("drive registered", point, [&](const Point& each) { return drives(registered, each); });
        run("threads", point, loops);
      }
    }
  }
  return rows;
}

}  // namespace flexkv::bench
