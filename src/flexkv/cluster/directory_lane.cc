#include "flexkv/cluster/directory_lane.h"

#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <limits>
#include <system_error>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"

namespace flexkv::cluster {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
constexpr Nanos kQuiet = 60 * kSecond;  // between two lines about trouble

}  // namespace

Result<std::unique_ptr<DirectoryLane>> DirectoryLane::start(const DirectoryLaneOptions& options, ChangeSource& source,
                                                            std::function<void(std::uint64_t epoch)> reset) {
  auto wakeup = ipc::make_eventfd();
  if (!wakeup.ok()) return wakeup.error();
  std::unique_ptr<DirectoryLane> lane(new DirectoryLane(options, source, std::move(reset), std::move(wakeup).value()));
  try {
    lane->thread_ = start_thread([lane = lane.get()] { lane->run(); });
  } catch (const std::system_error& error) {
    return Error{ErrorCode::kNoSpace, std::string("cannot start the thread of the directory: ") + error.what()};
  }
  return Result<std::unique_ptr<DirectoryLane>>(std::move(lane));
}

DirectoryLane::DirectoryLane(const DirectoryLaneOptions& options, ChangeSource& source,
                             std::function<void(std::uint64_t epoch)> reset, Fd wakeup)
    : source_(source),
      reset_(std::move(reset)),
      wakeup_(std::move(wakeup)),
      replica_(options.replica_blocks_max),
      orders_(options.redis, options.directory.incarnation),
      reads_(options.redis, options.directory.incarnation + 1),
      directory_(options.directory, replica_) {}

DirectoryLane::~DirectoryLane() { stop(0); }

// ---- the lane's thread ---------------------------------------------------------------------------------------------

void DirectoryLane::run() {
  pthread_setname_np(pthread_self(), "flexkv-dir");
  while (true) {
    const bool more = read_source();
    enter_new_epoch();
    const Nanos now = monotonic_now();
    serve_orders(now);
    serve_reads(now);
    report(now);
    {
      MutexLock lock(mutex_);
      directory_.expire(now);
      if (stop_by_ && (directory_.left() || now >= *stop_by_)) return;
    }
    sleep(more);
  }
}

bool DirectoryLane::read_source() {
  changes_.clear();
  const bool more = source_.read(changes_);
  MutexLock lock(mutex_);
  const Nanos now = monotonic_now();
  for (const Change& change : changes_) directory_.apply(change, now);
  return more;
}

void DirectoryLane::enter_new_epoch() {
  std::optional<std::uint64_t> epoch;
  {
    MutexLock lock(mutex_);
    epoch = directory_.epoch_to_enter();
  }
  if (!epoch) return;
  reset_(*epoch);
  while (read_source()) {
  }
  MutexLock lock(mutex_);
  directory_.enter_epoch(monotonic_now());
}

void DirectoryLane::serve_orders(Nanos now) {
  orders_.step(now);
  std::optional<meta::Request> request;
  {
    MutexLock lock(mutex_);
    if (const auto answers = orders_.take_answer()) directory_.order_done(*answers, now);
    if (orders_.ready()) request = directory_.next_order(now);
  }
  if (request) orders_.submit(*request, now);
}

void DirectoryLane::serve_reads(Nanos now) {
  reads_.step(now);
  std::optional<meta::Request> request;
  {
    MutexLock lock(mutex_);
    if (const auto answers = reads_.take_answer()) directory_.read_done(*answers, now);
    if (reads_.ready()) request = directory_.next_read(now);
  }
  if (request) reads_.submit(*request, now);
}

void DirectoryLane::sleep(bool more) const {
  const Nanos now = monotonic_now();
  Nanos until = std::min(orders_.wakeup(), reads_.wakeup());
  {
    MutexLock lock(mutex_);
    if (orders_.ready()) until = std::min(until, directory_.order_due(now));
    if (reads_.ready()) until = std::min(until, directory_.read_due(now));
    if (directory_.epoch_to_enter()) until = now;
    if (stop_by_) until = std::min(until, *stop_by_);
  }
  std::array<pollfd, 3> fds{
      {{wakeup_.get(), POLLIN, 0}, {orders_.fd(), orders_.events(), 0}, {reads_.fd(), reads_.events(), 0}}};
  const Nanos wait = more ? 0 : std::max<Nanos>(until - now, 0);
  const timespec time{wait / kSecond, wait % kSecond};
  (void)::ppoll(fds.data(), fds.size(), until == kForever && !more ? nullptr : &time, nullptr);
  ipc::drain_eventfd(wakeup_.get());
}

void DirectoryLane::report(Nanos now) {
  const std::string& trouble = orders_.trouble().empty() ? reads_.trouble() : orders_.trouble();
  DirectoryStats stats;
  {
    MutexLock lock(mutex_);
    trouble_ = trouble;
    stats = directory_.stats();
  }
  if (trouble.empty() && !reported_trouble_.empty()) {
    log_info("directory: connected to Redis");
    reported_trouble_.clear();
  } else if (trouble != reported_trouble_ && now >= quiet_until_) {
    log_warning("directory: no other node's blocks until this is over: " + trouble);
    reported_trouble_ = trouble;
    quiet_until_ = now + kQuiet;
  }
  if (stats.same_name > 0 && !reported_same_name_) {
    log_warning("directory: another live node has this one's name; both are served, but give each its own node_id");
    reported_same_name_ = true;
  }
  if (stats.followed.refused > 0 && !reported_refused_) {
    log_warning("directory: " + stats.followed.last_refusal + "; more of these are counted, not logged");
    reported_refused_ = true;
  }
}

// ---- any thread ----------------------------------------------------------------------------------------------------

std::optional<SpaceIndex> DirectoryLane::add_space(const SpaceId& id) {
  std::optional<SpaceIndex> index;
  {
    MutexLock lock(mutex_);
    index = directory_.add_space(id, monotonic_now());
  }
  wake();
  return index;
}

void DirectoryLane::wake() { ipc::ring_eventfd(wakeup_.get()); }

void DirectoryLane::reset_cluster() {
  {
    MutexLock lock(mutex_);
    directory_.reset_cluster(monotonic_now());
  }
  wake();
}

DirectoryLaneStatus DirectoryLane::status() const {
  DirectoryLaneStatus status;
  status.replica = replica_.stats();
  MutexLock lock(mutex_);
  status.directory = directory_.stats();
  status.peers = directory_.peers(monotonic_now());
  status.trouble = trouble_;
  return status;
}

void DirectoryLane::stop(Nanos patience) {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    const Nanos now = monotonic_now();
    stop_by_ = now + patience;
    directory_.leave(now);
  }
  wake();
  thread_.join();
}

}  // namespace flexkv::cluster
