#include "flexkv/file/lane_drive.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <future>
#include <limits>
#include <mutex>
#include <system_error>

#include "flexkv/base/thread.h"

namespace flexkv::file {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
// For the lane to leave, when nothing is in flight.
constexpr Nanos kLeavePatience = kSecond;
constexpr char kProbeName[] = ".flexkv-probe";

struct alignas(kDirectAlignment) Page {
  std::array<std::byte, kDirectAlignment> bytes{};
};

}  // namespace

class LaneDrive::Lane {
 public:
  Lane(const DriveOptions& options, std::unique_ptr<DriveFiles> drive_files, FileId probe,
       std::unique_ptr<IoEngine> engine, DriveSink& sink)
      : files(std::move(drive_files)),
        direct_(options.direct),
        bypasses_cache_(files->find(probe)->bypasses_cache),
        engine_(std::move(engine)),
        queue_(options.limits, probe, probe_page_.bytes.data()),
        holders_(queue_.slot_count()),
        sink_(&sink) {}

  void run(std::promise<Status> started);

  bool submit(std::span<const Request> requests);
  void cancel(std::uint64_t tag);
  void close_file(FileId file);
  Status allocate(FileId file, std::uint64_t offset, std::uint64_t bytes);
  // Of the caller's thread; the lane watches it.
  template <typename Body>
  auto call(const char* what, Wait wait, Body body);
  void register_memory(std::span<std::byte> memory);
  DriveStats stats() const;
  std::string describe() const;
  bool close(Nanos patience);

  const std::unique_ptr<DriveFiles> files;

 private:
  void begin_all(Nanos now);
  void begin(const Io& io);
  void wake_if_asleep(std::unique_lock<std::mutex>& lock);
  void register_next(std::unique_lock<std::mutex>& lock);
  std::vector<std::shared_ptr<OpenFile>> forget_closed();
  std::uint64_t begin_call(const char* what, Wait wait);
  void end_call(std::uint64_t call);

  const bool direct_;  // asked for
  const bool bypasses_cache_;
  const std::unique_ptr<IoEngine> engine_;
  Page probe_page_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // for those who close the drive, or a file
  DriveQueue queue_;
  std::vector<std::shared_ptr<OpenFile>> holders_;  // by slot: the file of the I/O in flight
  std::vector<EndedIo> ended_;                      // of the lane
  DriveSink* sink_;                                 // null: given up by close()
  bool calling_ = false;                            // the lane is in the sink
  bool asleep_ = false;                             // the lane is in, or on its way to, engine_->wait()
  bool closing_ = false;
  bool over_ = false;  // the lane has left
  std::vector<std::shared_ptr<OpenFile>> to_forget_;
  std::uint64_t turns_ = 0;          // of the lane
  std::uint32_t closing_files_ = 0;  // who waits for the next turn
  std::deque<std::span<std::byte>> to_register_;
  std::size_t registered_bytes_ = 0;
  std::string register_refusal_;
};

// ---- the lane's thread ---------------------------------------------------------------------------------------------

void LaneDrive::Lane::run(std::promise<Status> started) {
  pthread_setname_np(pthread_self(), "flexkv-drive");
  // A drive has nothing to do while its lane waits for a processor.
  ask_for_short_slices();
  const Status status = engine_->start(queue_.slot_count());
  started.set_value(status);
  if (!status) return;
  DriveEvents events;
  while (true) {
    std::optional<Nanos> until;
    DriveSink* sink = nullptr;
    std::vector<std::shared_ptr<OpenFile>> gone;  // not under the mutex: closing them may take long
    {
      std::unique_lock lock(mutex_);
      calling_ = asleep_ = false;
      register_next(lock);
      const Nanos now = monotonic_now();
      for (const EndedIo& ended : ended_) {
        holders_[ended.slot].reset();
        queue_.end(ended.slot, ended.result, now);
      }
      ended_.clear();
      gone = forget_closed();
      ++turns_;
      if (closing_ || closing_files_ > 0) changed_.notify_all();
      queue_.on_time(now);
      begin_all(now);
      queue_.take(events);
      if (!events.empty() && sink_ != nullptr) sink = sink_;
      calling_ = sink != nullptr;
      if (closing_ && queue_.idle() && !calling_) break;
      asleep_ = !calling_ && ended_.empty() && to_register_.empty();
      until = asleep_ ? queue_.wakeup() : std::optional<Nanos>(0);
    }
    gone.clear();
    if (sink != nullptr) {
      engine_->flush();
      events.give_to(*sink);
    } else {
      engine_->wait(until, ended_);
    }
  }
  engine_->stop();
  std::lock_guard lock(mutex_);
  over_ = true;
  changed_.notify_all();
}

void LaneDrive::Lane::begin_all(Nanos now) {
  while (const Io* io = queue_.begin(now)) begin(*io);
}

void LaneDrive::Lane::begin(const Io& io) {
  std::shared_ptr<OpenFile> file = files->find(io.file);
  if (file == nullptr) {
    ended_.push_back({io.slot, -EBADF});
    return;
  }
  if (file->direct && io.offset % kDirectAlignment != 0) {
    // The transfer was cut short inside a page. A read did that at the end of the file; a write never should.
    ended_.push_back({io.slot, io.op == Op::kRead ? 0 : -EIO});
    return;
  }
  holders_[io.slot] = std::move(file);
  engine_->begin(io, *holders_[io.slot]);
}

// Files that are no longer found, and that no I/O has: what the engine holds for them may go to another file.
std::vector<std::shared_ptr<OpenFile>> LaneDrive::Lane::forget_closed() {
  std::vector<std::shared_ptr<OpenFile>> gone;
  std::erase_if(to_forget_, [&](const std::shared_ptr<OpenFile>& file) {
    if (std::ranges::find(holders_, file) != holders_.end()) return false;
    engine_->forget(*file);
    if (file.use_count() == 1) gone.push_back(file);
    return true;
  });
  return gone;
}

// Registering can take long: one piece per turn.
void LaneDrive::Lane::register_next(std::unique_lock<std::mutex>& lock) {
  if (to_register_.empty()) return;
  const std::span<std::byte> piece = to_register_.front();
  lock.unlock();
  const Status status = engine_->register_memory(piece);
  lock.lock();
  to_register_.pop_front();
  if (status) {
    registered_bytes_ += piece.size();
  } else {
    register_refusal_ = status.error().message;
    to_register_.clear();
  }
}

// ---- any thread ----------------------------------------------------------------------------------------------------

void LaneDrive::Lane::wake_if_asleep(std::unique_lock<std::mutex>& lock) {
  const bool asleep = std::exchange(asleep_, false);
  lock.unlock();
  if (asleep) engine_->wake();
}

bool LaneDrive::Lane::submit(std::span<const Request> requests) {
  files->check(requests);
  std::unique_lock lock(mutex_);
  if (!queue_.submit(requests, monotonic_now())) return false;
  wake_if_asleep(lock);
  return true;
}

void LaneDrive::Lane::cancel(std::uint64_t tag) {
  std::unique_lock lock(mutex_);
  queue_.cancel(tag, monotonic_now());
  wake_if_asleep(lock);
}

std::uint64_t LaneDrive::Lane::begin_call(const char* what, Wait wait) {
  std::unique_lock lock(mutex_);
  const std::uint64_t call = queue_.begin_call(what, wait, monotonic_now());
  wake_if_asleep(lock);
  return call;
}

void LaneDrive::Lane::end_call(std::uint64_t call) {
  std::unique_lock lock(mutex_);
  queue_.end_call(call);
  wake_if_asleep(lock);
}

template <typename Body>
auto LaneDrive::Lane::call(const char* what, Wait wait, Body body) {
  const std::uint64_t number = begin_call(what, wait);
  auto result = body();
  end_call(number);
  return result;
}

Status LaneDrive::Lane::allocate(FileId file, std::uint64_t offset, std::uint64_t bytes) {
  const std::uint64_t call = begin_call("making a file longer", Wait::kSync);
  Status status = files->allocate(file, offset, bytes, [&] {
    std::lock_guard step(mutex_);
    queue_.step_call(call, monotonic_now());
  });
  end_call(call);
  return status;
}

// The last one who has the file closes it, and that should be who calls this: the lane has requests to serve, and the
// file may have been removed, so that its space is given back then. But for an I/O that has it, nobody is waited for.
void LaneDrive::Lane::close_file(FileId id) {
  std::shared_ptr<OpenFile> file = files->close_file(id);
  if (file == nullptr) return;
  {
    std::unique_lock lock(mutex_);
    if (!over_) {
      to_forget_.push_back(file);
      ++closing_files_;
      const std::uint64_t turn = turns_ + 1;  // one that begins now
      wake_if_asleep(lock);
      lock.lock();
      changed_.wait(lock, [&] { return turns_ >= turn || over_; });
      --closing_files_;
      if (over_) std::erase(to_forget_, file);
    }
  }
  (void)call("closing a file", Wait::kFree, [&] {
    file.reset();
    return true;
  });
}

void LaneDrive::Lane::register_memory(std::span<std::byte> memory) {
  std::unique_lock lock(mutex_);
  while (!memory.empty()) {
    const std::span<std::byte> piece = memory.first(std::min(memory.size(), kRegisterBytesMax));
    to_register_.push_back(piece);
    memory = memory.subspan(piece.size());
  }
  wake_if_asleep(lock);
}

DriveStats LaneDrive::Lane::stats() const {
  std::lock_guard lock(mutex_);
  return queue_.stats();
}

std::string LaneDrive::Lane::describe() const {
  std::string text = files->describe() + ": " + engine_->describe();
  text += bypasses_cache_ ? ", direct"
          : direct_       ? ", through the page cache: the file system takes no O_DIRECT"
                          : ", through the page cache, as asked for";
  std::lock_guard lock(mutex_);
  if (registered_bytes_ > 0) text += ", " + std::to_string(registered_bytes_ >> 20) + " MiB registered";
  if (!register_refusal_.empty()) text += ", memory not registered: " + register_refusal_;
  return text;
}

bool LaneDrive::Lane::close(Nanos patience) {
  std::unique_lock lock(mutex_);
  closing_ = true;
  queue_.close();
  wake_if_asleep(lock);
  lock.lock();
  const auto over = [&] { return over_; };
  if (patience == kForever) {
    changed_.wait(lock, over);
    return true;
  }
  const auto wait = [&](Nanos time, auto until) {
    return changed_.wait_for(lock, std::chrono::nanoseconds(std::max<Nanos>(time, 0)), until);
  };
  const bool idle = wait(patience, [&] { return over_ || (queue_.idle() && !calling_); });
  if (idle && wait(kLeavePatience, over)) return true;
  queue_.drop_waiting(ECANCELED, monotonic_now());
  changed_.wait(lock, [&] { return !calling_; });
  sink_ = nullptr;
  return over_;
}

// ---- LaneDrive -----------------------------------------------------------------------------------------------------

Result<std::unique_ptr<Drive>> LaneDrive::open(const DriveOptions& options, std::unique_ptr<IoEngine> engine,
                                               DriveSink& sink) {
  auto files =
      DriveFiles::open(options.directory, {options.keep_free_bytes, options.direct, options.reserve_by_writing});
  if (!files) return files.error();
  // Nameless from here on, so that it goes away with the process, however that ends.
  auto probe = files.value()->open_file(kProbeName, true);
  if (!probe) return probe.error();
  if (auto removed = files.value()->remove(kProbeName); !removed) return removed.error();
  // Without space for it, the drive serves reads all the same, and probing takes no space for an answer.
  (void)files.value()->allocate(probe.value(), 0, kDirectAlignment, [] {});
  auto lane = std::make_shared<Lane>(options, std::move(files).value(), probe.value(), std::move(engine), sink);
  std::promise<Status> started;
  std::future<Status> result = started.get_future();
  std::unique_ptr<LaneDrive> drive(new LaneDrive(lane));
  try {
    drive->thread_ = start_thread([lane, promise = std::move(started)]() mutable { lane->run(std::move(promise)); });
  } catch (const std::system_error& error) {
    return Error{ErrorCode::kNoSpace, std::string("cannot start the thread of a drive: ") + error.what()};
  }
  if (Status status = result.get(); !status) {
    drive->thread_.join();
    return status.error();
  }
  return Result<std::unique_ptr<Drive>>(std::move(drive));
}

LaneDrive::~LaneDrive() {
  if (thread_.joinable()) (void)close(kForever);
}

bool LaneDrive::close(Nanos patience) {
  const bool over = lane_->close(patience);
  if (over) {
    thread_.join();
  } else {
    thread_.detach();
  }
  return over;
}

Result<FileId> LaneDrive::open(const std::string& name, bool direct) {
  return lane_->call("opening a file", Wait::kSync, [&] { return lane_->files->open_file(name, direct); });
}

void LaneDrive::close_file(FileId file) { lane_->close_file(file); }

Status LaneDrive::remove(const std::string& name) {
  return lane_->call("removing a file", Wait::kFree, [&] { return lane_->files->remove(name); });
}

Result<std::uint64_t> LaneDrive::file_bytes(FileId file) {
  return lane_->call("asking for a file's size", Wait::kSync, [&] { return lane_->files->bytes(file); });
}

Status LaneDrive::allocate(FileId file, std::uint64_t offset, std::uint64_t bytes) {
  return lane_->allocate(file, offset, bytes);
}

Status LaneDrive::truncate(FileId file, std::uint64_t bytes) {
  return lane_->call("cutting a file off", Wait::kFree, [&] { return lane_->files->truncate(file, bytes); });
}

void LaneDrive::register_memory(std::span<std::byte> memory) { lane_->register_memory(memory); }
bool LaneDrive::submit(std::span<const Request> requests) { return lane_->submit(requests); }
void LaneDrive::cancel(std::uint64_t tag) { lane_->cancel(tag); }
DriveStats LaneDrive::stats() const { return lane_->stats(); }
std::string LaneDrive::describe() const { return lane_->describe(); }

}  // namespace flexkv::file
