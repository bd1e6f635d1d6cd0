#include "flexkv/testing/sim_drive.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

namespace flexkv::testing {
namespace {

using file::FileId;
using file::Io;
using file::Op;

constexpr Nanos kNever = std::numeric_limits<Nanos>::max();
constexpr std::byte kGarbage{0xA5};

std::size_t bytes_of(const Io& io) {
  std::size_t bytes = 0;
  for (const iovec& part : io.parts) bytes += part.iov_len;
  return bytes;
}

std::vector<std::byte> gather(const Io& io) {
  std::vector<std::byte> out;
  for (const iovec& part : io.parts) {
    const auto* data = static_cast<const std::byte*>(part.iov_base);
    out.insert(out.end(), data, data + part.iov_len);
  }
  return out;
}

std::uint64_t checksum_of(const Io& io) {
  std::uint64_t sum = 0;
  for (const std::byte byte : gather(io)) sum = Prng::mix(sum ^ static_cast<std::uint64_t>(byte));
  return sum;
}

}  // namespace

SimDrive::SimDrive(const SimDriveOptions& options, std::shared_ptr<SimMedium> medium, file::DriveSink& sink)
    : options_(options),
      medium_(std::move(medium)),
      sink_(sink),
      prng_(options.seed),
      queue_(options.limits, FileId{0}, probe_page_.data()),
      now_(options.start),
      faults_(options.faults),
      files_(1) {
  files_[0].file = std::make_shared<SimFile>();
}

// ---- files ---------------------------------------------------------------------------------------------------------

Result<FileId> SimDrive::open(const std::string& name, bool direct) {
  FLEXKV_ASSERT(!name.empty() && name.find('/') == std::string::npos);
  std::shared_ptr<SimFile>& file = medium_->files[name];
  if (file == nullptr) file = std::make_shared<SimFile>();
  files_.push_back({file, direct});
  return FileId{static_cast<std::uint32_t>(files_.size() - 1)};
}

void SimDrive::close_file(FileId file) { files_.at(static_cast<std::size_t>(file)).file = nullptr; }

Status SimDrive::remove(const std::string& name) {
  if (medium_->files.erase(name) == 0) return Error{ErrorCode::kNotFound, name + ": no such file"};
  return {};
}

Result<std::uint64_t> SimDrive::file_bytes(FileId file) {
  return std::uint64_t{files_.at(static_cast<std::size_t>(file)).file->size()};
}

Status SimDrive::allocate(FileId id, std::uint64_t offset, std::uint64_t bytes) {
  SimFile& file = *files_.at(static_cast<std::size_t>(id)).file;
  const std::uint64_t growth = std::max<std::uint64_t>(offset + bytes, file.size()) - file.size();
  if (medium_->used_bytes() + growth > medium_->capacity_bytes) {
    return Error{ErrorCode::kNoSpace, "the simulated drive is full"};
  }
  file.grow(offset + bytes);
  return {};
}

Status SimDrive::truncate(FileId id, std::uint64_t bytes) {
  files_.at(static_cast<std::size_t>(id)).file->truncate(bytes);
  return {};
}

// ---- requests ------------------------------------------------------------------------------------------------------

bool SimDrive::submit(std::span<const file::Request> requests) {
  if (dead_) return false;
  for (const file::Request& request : requests) {
    const OpenFile& file = files_.at(static_cast<std::size_t>(request.file));
    const auto address = reinterpret_cast<std::uintptr_t>(request.data);
    FLEXKV_ASSERT(!file.direct || (request.offset | request.bytes | address) % file::kDirectAlignment == 0);
  }
  return queue_.submit(requests, now_);
}

void SimDrive::begin_all() {
  while (const Io* io = queue_.begin(now_)) begin(*io);
}

void SimDrive::begin(const Io& io) {
  Flight flight{&io, files_.at(static_cast<std::size_t>(io.file)).file, 0, 0, medium_->sequence, 0};
  const auto spread = static_cast<std::uint64_t>(options_.io_time_max - options_.io_time_min + 1);
  Nanos time = options_.io_time_min + static_cast<Nanos>(prng_.below(spread));
  if (prng_.chance(faults_.slow)) time *= 100;
  flight.end = hanging_ ? kNever : now_ + time;
  flight.result = flight.file == nullptr ? -EBADF : draw_result(io);
  if (io.op == Op::kWrite) flight.checksum = checksum_of(io);
  if (io.op == Op::kRead) {
    for (const iovec& part : io.parts) std::memset(part.iov_base, static_cast<int>(kGarbage), part.iov_len);
  }
  flights_.push_back(std::move(flight));
}

std::int64_t SimDrive::draw_result(const Io& io) {
  const auto op = static_cast<std::size_t>(io.op);
  if (scripted_count_[op] > 0) {
    --scripted_count_[op];
    return -scripted_error_[op];
  }
  const auto bytes = static_cast<std::int64_t>(bytes_of(io));
  if (prng_.chance(faults_.retry)) return prng_.chance(50) ? -EINTR : -EAGAIN;
  if (prng_.chance(faults_.fail)) {
    const int errors[] = {EIO, ENXIO, ENOSPC};
    return -errors[prng_.below(io.op == Op::kWrite ? 3 : 2)];
  }
  const auto pages = static_cast<std::uint64_t>(bytes) / file::kDirectAlignment;
  if (pages > 1 && prng_.chance(faults_.partial)) {
    return static_cast<std::int64_t>((1 + prng_.below(pages - 1)) * file::kDirectAlignment);
  }
  return bytes;
}

void SimDrive::finish(const Flight& flight) {
  const Io& io = *flight.io;
  std::int64_t result = flight.result;
  if (io.op == Op::kWrite) {
    FLEXKV_ASSERT(flight.checksum == checksum_of(io));  // the buffer was the drive's, and was changed
    std::vector<std::byte> data = gather(io);
    if (result >= 0) {
      const std::uint64_t end = io.offset + static_cast<std::uint64_t>(result);
      const std::uint64_t growth = std::max<std::uint64_t>(end, flight.file->size()) - flight.file->size();
      if (growth > 0 && medium_->used_bytes() + growth > medium_->capacity_bytes) result = -ENOSPC;
    }
    if (result >= 0) {
      data.resize(static_cast<std::size_t>(result));
      flight.file->write(io.offset, data, ++medium_->sequence);
    } else if (flight.file != nullptr && result != -ENOSPC) {
      flight.file->tear(io.offset, data, ++medium_->sequence, prng_);
    }
  } else if (io.op == Op::kSync) {
    if (result >= 0) flight.file->sync(flight.sequence);
  } else if (result > 0) {
    std::vector<std::byte> data(static_cast<std::size_t>(result));
    result = static_cast<std::int64_t>(flight.file->read(io.offset, data));
    std::size_t moved = 0;
    for (const iovec& part : io.parts) {
      const std::size_t count = std::min(part.iov_len, static_cast<std::size_t>(result) - moved);
      std::memcpy(part.iov_base, data.data() + moved, count);
      moved += count;
    }
  }
  queue_.end(io.slot, result, now_);
}

// ---- the clock -----------------------------------------------------------------------------------------------------

std::optional<Nanos> SimDrive::next_event() const {
  if (dead_) return std::nullopt;
  std::optional<Nanos> at = queue_.wakeup();
  for (const Flight& flight : flights_) {
    if (flight.end != kNever) at = std::min(at.value_or(kNever), flight.end);
  }
  return at;
}

void SimDrive::dispatch() {
  file::DriveEvents events;
  for (queue_.take(events); !events.empty() && !dead_; queue_.take(events)) events.give_to(sink_);
}

void SimDrive::run_until(Nanos time) {
  while (!dead_) {
    dispatch();
    begin_all();
    const std::optional<Nanos> at = next_event();
    if (!at || *at > time) break;
    now_ = std::max(now_, *at);
    while (true) {
      const auto ended = std::find_if(flights_.begin(), flights_.end(), [&](const Flight& f) { return f.end <= now_; });
      if (ended == flights_.end()) break;
      const Flight flight = *ended;
      flights_.erase(ended);
      finish(flight);
    }
    queue_.on_time(now_);
  }
  now_ = std::max(now_, time);
}

bool SimDrive::step() {
  dispatch();
  begin_all();
  const std::optional<Nanos> at = next_event();
  if (at) run_until(std::max(*at, now_));
  return at.has_value();
}

bool SimDrive::run_until_idle() {
  do {
    if (dead_) return false;
    dispatch();
    if (queue_.idle()) return true;
  } while (step());
  return false;
}

bool SimDrive::close(Nanos patience) {
  if (dead_) return true;
  queue_.close();
  const Nanos until = now_ + patience;
  while (!dead_) {
    dispatch();
    if (queue_.idle()) break;
    begin_all();
    const std::optional<Nanos> at = next_event();
    if (!at || *at > until) break;
    run_until(*at);
  }
  dead_ = true;
  return queue_.idle();
}

// ---- faults --------------------------------------------------------------------------------------------------------

void SimDrive::fail_next(Op op, int error_number, std::uint32_t count) {
  scripted_error_[static_cast<std::size_t>(op)] = error_number;
  scripted_count_[static_cast<std::size_t>(op)] = count;
}

void SimDrive::hang(bool hanging) {
  hanging_ = hanging;
  if (hanging) return;
  for (Flight& flight : flights_) {
    if (flight.end == kNever) flight.end = now_ + options_.io_time_min;
  }
}

void SimDrive::hang_call(bool hanging) {
  if (hanging == hanging_call_.has_value()) return;
  if (hanging) {
    hanging_call_ = queue_.begin_call("a call", file::Wait::kSync, now_);
  } else {
    queue_.end_call(*hanging_call_);
    hanging_call_.reset();
  }
}

void SimDrive::flip_bit(const std::string& name, std::uint64_t offset) {
  std::byte& byte = medium_->files.at(name)->bytes()[offset];
  byte ^= std::byte{1} << prng_.below(8);
}

void SimDrive::power_cut() {
  crash(true);
  for (const auto& [name, file] : medium_->files) file->power_cut(prng_);
}

void SimDrive::kill() { crash(false); }

// What is in flight may be on the medium in part.
void SimDrive::crash(bool power) {
  for (const Flight& flight : flights_) {
    if (flight.io->op != Op::kWrite || flight.file == nullptr) continue;
    const std::vector<std::byte> data = gather(*flight.io);
    const bool whole = !power && flight.result >= 0 && prng_.chance(50);
    if (whole) {
      flight.file->write(flight.io->offset, data, ++medium_->sequence);
    } else {
      flight.file->tear(flight.io->offset, data, ++medium_->sequence, prng_);
    }
  }
  dead_ = true;
}

}  // namespace flexkv::testing
