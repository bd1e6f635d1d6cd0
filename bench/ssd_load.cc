#include "bench/ssd_load.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "flexkv/base/prng.h"
#include "flexkv/base/thread.h"

namespace flexkv::bench {
namespace {

constexpr std::size_t kPage = file::kDirectAlignment;
constexpr std::size_t kWordsOfPage = kPage / sizeof(std::uint64_t);
constexpr std::size_t kReadBack = 4;  // blocks of a run

using Page = std::uint64_t[kWordsOfPage];

// What the file is filled with: words that no drive can compress, and that say where they belong.
void fill_page(std::byte* page, std::uint64_t offset) {
  Page words;
  for (std::size_t i = 0; i < kWordsOfPage; ++i) words[i] = Prng::mix(offset + i * sizeof(std::uint64_t) + 1);
  std::memcpy(page, words, kPage);
}

bool is_filled_page(const std::byte* page, std::uint64_t offset) {
  alignas(kPage) std::byte expected[kPage];
  fill_page(expected, offset);
  return std::memcmp(page, expected, kPage) == 0;
}

void later_of(std::atomic<Nanos>& latest, Nanos now) {
  for (Nanos seen = latest; seen < now && !latest.compare_exchange_weak(seen, now);) {
  }
}

}  // namespace

Result<std::unique_ptr<SsdLoad>> SsdLoad::open(const std::string& directory, std::uint64_t file_bytes,
                                               std::span<std::byte> pool, std::byte* memory) {
  constexpr char kName[] = "blocks";
  std::unique_ptr<SsdLoad> load(new SsdLoad(directory + "/" + kName, file_bytes, memory));
  auto drive = file::open_drive({.directory = directory}, *load);
  if (!drive) return drive.error();
  load->drive_ = std::move(drive).value();
  auto opened = load->drive_->open(kName, true);
  if (!opened) return opened.error();
  load->file_ = opened.value();
  // Says so before anything is written where the drive has too little room.
  if (Status status = load->drive_->allocate(load->file_, 0, file_bytes); !status) return status.error();
  load->fd_ = Fd(::open(load->path_.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  if (!load->fd_.valid() && errno == EINVAL) load->fd_ = Fd(::open(load->path_.c_str(), O_RDWR | O_CLOEXEC));
  if (!load->fd_.valid()) return errno_error("cannot open " + load->path_, errno);
  load->drive_->register_memory(pool);
  return load;
}

SsdLoad::~SsdLoad() {
  drive_.reset();
  ::unlink(path_.c_str());
}

Status SsdLoad::fill() {
  for (std::uint64_t at = 0; at < file_bytes_; at += kSsdBlockMax) {
    const std::size_t bytes = std::min<std::uint64_t>(kSsdBlockMax, file_bytes_ - at);
    for (std::size_t page = 0; page < bytes; page += kPage) fill_page(memory_ + page, at + page);
    const ssize_t written = ::pwrite(fd_.get(), memory_, bytes, static_cast<off_t>(at));
    if (written != static_cast<ssize_t>(bytes)) return errno_error("cannot write " + path_, written < 0 ? errno : EIO);
  }
  if (::fsync(fd_.get()) != 0) return errno_error("cannot sync " + path_, errno);
  return {};
}

// ---- one run -------------------------------------------------------------------------------------------------------

void SsdLoad::prepare(const Traffic& traffic) {
  traffic_ = traffic;
  blocks_ = file_bytes_ / traffic.block_bytes;
  order_.clear();
  if (traffic.random) {
    order_.resize(blocks_);
    std::iota(order_.begin(), order_.end(), 0U);
    Prng prng(traffic.seed);
    for (std::size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[prng.below(i)]);
  }
  turns_ = 0;
  bytes_ = 0;
  ended_ = 0;
  error_.clear();
  flights_.assign(traffic.flights, {});
  running_ = traffic.flights;
  for (std::size_t flight = 0; flight < traffic.flights; ++flight) {
    const std::span<std::byte> memory = memory_of(flight);
    // What an earlier run left must not pass for what this one reads.
    if (!traffic.write) std::fill_n(memory.begin(), kPage, std::byte{0});
    if (!traffic.write) std::fill_n(memory.end() - kPage, kPage, std::byte{0});
  }
}

std::uint64_t SsdLoad::offset_of(std::uint64_t turn) const {
  const std::uint64_t block = turn % blocks_;
  return (order_.empty() ? block : order_[block]) * traffic_.block_bytes;
}

std::span<std::byte> SsdLoad::memory_of(std::size_t flight) const {
  return {memory_ + flight * traffic_.block_bytes, traffic_.block_bytes};
}

std::uint64_t SsdLoad::board(std::size_t flight) {
  const std::uint64_t turn = turns_++;
  flights_[flight].turn = turn;
  const std::span<std::byte> memory = memory_of(flight);
  if (traffic_.write) {
    const std::uint64_t stamp = Prng::mix(traffic_.seed) + turn;
    std::memcpy(memory.data(), &stamp, sizeof(stamp));
    std::memcpy(memory.data() + memory.size() - sizeof(stamp), &stamp, sizeof(stamp));
  }
  return offset_of(turn);
}

void SsdLoad::land(std::size_t flight, Nanos now) {
  flights_[flight].done = true;
  bytes_ += traffic_.block_bytes;
  later_of(ended_, now);
}

void SsdLoad::fail(std::string error) {
  std::lock_guard lock(mutex_);
  if (error_.empty()) error_ = std::move(error);
}

Moved SsdLoad::wait() {
  for (auto left = running_.load(); left > 0; left = running_.load()) running_.wait(left);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  std::lock_guard lock(mutex_);
  if (error_.empty()) error_ = check();
  return {bytes_, ended_, error_};
}

std::string SsdLoad::check() {
  const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(kPage, traffic_.block_bytes),
                                                            &std::free);
  std::size_t read_back = 0;
  for (std::size_t i = 0; i < flights_.size(); ++i) {
    const Flight& flight = flights_[i];
    // Another flight may have had the same block again.
    if (!flight.done || flight.turn + blocks_ < turns_) continue;
    const std::uint64_t offset = offset_of(flight.turn);
    const std::span<std::byte> memory = memory_of(i);
    bool right = true;
    if (!traffic_.write) {
      const std::size_t last = memory.size() - kPage;
      right = is_filled_page(memory.data(), offset) && is_filled_page(memory.data() + last, offset + last);
    } else if (read_back++ < kReadBack) {
      const ssize_t bytes = ::pread(fd_.get(), scratch.get(), memory.size(), static_cast<off_t>(offset));
      right =
          bytes == static_cast<ssize_t>(memory.size()) && std::memcmp(scratch.get(), memory.data(), memory.size()) == 0;
    }
    if (!right) return path_ + " at " + std::to_string(offset) + ": wrong bytes";
  }
  return {};
}

// ---- through the drive ---------------------------------------------------------------------------------------------

void SsdLoad::start_drive(const Traffic& traffic) {
  prepare(traffic);
  requests_.clear();
  for (std::size_t flight = 0; flight < traffic.flights; ++flight) {
    const std::uint64_t offset = board(flight);
    requests_.push_back({.tag = flight,
                         .op = traffic.write ? file::Op::kWrite : file::Op::kRead,
                         .urgency = traffic.write ? file::Urgency::kSave : file::Urgency::kLoad,
                         .file = file_,
                         .offset = offset,
                         .data = memory_of(flight).data(),
                         .bytes = traffic.block_bytes});
  }
  until_ = monotonic_now() + traffic.duration;
  const std::vector<file::Request> first = requests_;  // the sink may be called before submit() is back
  if (drive_->submit(first)) return;
  fail("the drive takes no requests");
  running_ = 0;
}

void SsdLoad::on_completions(std::span<const file::Completion> completions) {
  const Nanos now = monotonic_now();
  std::vector<file::Request> next;
  std::size_t over = 0;
  for (const file::Completion& completion : completions) {
    if (completion.outcome == file::Outcome::kDone) {
      land(completion.tag, now);
    } else {
      fail(errno_error("drive", completion.error_number).message);
    }
    if (completion.outcome != file::Outcome::kDone || now >= until_) {
      ++over;
      continue;
    }
    file::Request& request = requests_[completion.tag];
    request.offset = board(completion.tag);
    next.push_back(request);
  }
  if (!next.empty() && !drive_->submit(next)) {
    fail("the drive takes no requests");
    over += next.size();
  }
  if (over > 0 && (running_ -= over) == 0) running_.notify_all();
}

void SsdLoad::on_availability(bool available, const std::string& why) {
  if (!available) fail("the drive stopped serving: " + why);
}

// ---- by threads ----------------------------------------------------------------------------------------------------

void SsdLoad::start_threads(const Traffic& traffic) {
  prepare(traffic);
  until_ = monotonic_now() + traffic.duration;
  for (std::size_t flight = 0; flight < traffic.flights; ++flight) {
    threads_.push_back(start_thread([this, flight] { work(flight, fd_.get()); }));
  }
}

void SsdLoad::work(std::size_t flight, int fd) {
  while (monotonic_now() < until_) {
    const auto at = static_cast<off_t>(board(flight));
    const std::span<std::byte> memory = memory_of(flight);
    const ssize_t done =
        traffic_.write ? ::pwrite(fd, memory.data(), memory.size(), at) : ::pread(fd, memory.data(), memory.size(), at);
    if (done != static_cast<ssize_t>(memory.size())) {
      fail(errno_error(traffic_.write ? "pwrite" : "pread", done < 0 ? errno : EIO).message);
      break;
    }
    land(flight, monotonic_now());
  }
  if (--running_ == 0) running_.notify_all();
}

}  // namespace flexkv::bench
