#include "flexkv/cluster/directory_lane.h"

#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <limits>
#include <system_error>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"

namespace flexkv::cluster {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
constexpr Nanos kQuiet = 60 * kSecond;  // between two lines about trouble

}  // namespace

Result<std::unique_ptr<DirectoryLane>> DirectoryLane::start(const DirectoryLaneOptions& options, ChangeSource& source,
                                                            std::function<void(Epoch epoch)> reset,
                                                            std::function<void(std::optional<Epoch>)> current) {
  auto wakeup = ipc::make_eventfd();
  if (!wakeup.ok()) return wakeup.error();
  std::unique_ptr<DirectoryLane> lane(
      new DirectoryLane(options, source, std::move(reset), std::move(current), std::move(wakeup).value()));
  try {
    lane->thread_ = start_thread([lane = lane.get()] { lane->run(); });
  } catch (const std::system_error& error) {
    return Error{ErrorCode::kNoSpace, std::string("cannot start the thread of the directory: ") + error.what()};
  }
  return Result<std::unique_ptr<DirectoryLane>>(std::move(lane));
}

DirectoryLane::DirectoryLane(const DirectoryLaneOptions& options, ChangeSource& source,
                             std::function<void(Epoch epoch)> reset, std::function<void(std::optional<Epoch>)> current,
                             Fd wakeup)
    : source_(source),
      reset_(std::move(reset)),
      current_(std::move(current)),
      wakeup_(std::move(wakeup)),
      replica_(options.replica_blocks_max),
      directory_(options.directory, replica_),
      orders_(options.redis, options.directory.incarnation),
      reads_(options.redis, options.directory.incarnation + 1) {}

DirectoryLane::~DirectoryLane() { stop(0); }

// ---- the lane's thread ---------------------------------------------------------------------------------------------

void DirectoryLane::run() {
  pthread_setname_np(pthread_self(), "flexkv-dir");
  while (true) {
    const bool more = read_source();
    enter_new_epoch();
    const Nanos now = monotonic_now();
    serve_orders(now);
    tell_current();
    serve_reads(now);
    directory_.expire(now);
    report(now);
    {
      MutexLock lock(mutex_);
      if (stop_by_ && (directory_.left() || now >= *stop_by_)) return;
    }
    sleep(more);
  }
}

bool DirectoryLane::read_source() {
  changes_.clear();
  const bool more = source_.read(changes_);
  grant_wishes();  // spaces come before their changes
  const Nanos now = monotonic_now();
  for (const Change& change : changes_) directory_.apply(change, now);
  return more;
}

void DirectoryLane::grant_wishes() {
  std::vector<std::function<void(Nanos)>> wishes;
  {
    MutexLock lock(mutex_);
    wishes.swap(wishes_);
  }
  const Nanos now = monotonic_now();
  for (const auto& wish : wishes) wish(now);
}

void DirectoryLane::enter_new_epoch() {
  const std::optional<Epoch> epoch = directory_.epoch_to_enter();
  if (!epoch) return;
  reset_(*epoch);
  while (read_source()) {
  }
  directory_.enter_epoch(monotonic_now());
}

void DirectoryLane::tell_current() {
  const std::optional<Epoch> current = directory_.current_epoch();
  if (std::exchange(told_current_, current) != current) current_(current);
}

void DirectoryLane::serve_orders(Nanos now) {
  orders_.step(now);
  if (const auto answers = orders_.take_answer()) directory_.order_done(*answers, now);
  std::optional<meta::Request> request;
  if (orders_.ready()) request = directory_.next_order(now);
  if (request) orders_.submit(*request, now);
}

void DirectoryLane::serve_reads(Nanos now) {
  reads_.step(now);
  if (const auto answers = reads_.take_answer()) directory_.read_done(*answers, now);
  std::optional<meta::Request> request;
  if (reads_.ready()) request = directory_.next_read(now);
  if (request) reads_.submit(*request, now);
}

void DirectoryLane::sleep(bool more) const {
  const Nanos now = monotonic_now();
  Nanos until = std::min(orders_.wakeup(), reads_.wakeup());
  if (orders_.ready()) until = std::min(until, directory_.order_due(now));
  if (reads_.ready()) until = std::min(until, directory_.read_due(now));
  if (directory_.epoch_to_enter()) until = now;
  {
    MutexLock lock(mutex_);
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
  const DirectoryStats stats = directory_.stats();
  DirectoryLaneStatus status{stats, {}, directory_.peers(now), trouble};
  {
    MutexLock lock(mutex_);
    std::swap(status_, status);
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

void DirectoryLane::order(std::function<void(Nanos)> wish) {
  {
    MutexLock lock(mutex_);
    wishes_.push_back(std::move(wish));
  }
  wake();
}

std::optional<SpaceIndex> DirectoryLane::add_space(const SpaceId& id) {
  SpaceIndex index = 0;
  {
    MutexLock lock(mutex_);
    if (space_count_ == kSpacesMax) return std::nullopt;
    index = space_count_++;
    wishes_.push_back([this, id, index](Nanos now) { FLEXKV_ASSERT(directory_.add_space(id, now) == index); });
  }
  wake();
  return index;
}

void DirectoryLane::know_resets(std::uint64_t resets) {
  {
    MutexLock lock(mutex_);
    ++resets_unknown_;
  }
  order([this, resets](Nanos now) {
    directory_.know_resets(resets, now);
    MutexLock lock(mutex_);
    --resets_unknown_;
  });
}

bool DirectoryLane::knows_resets() const {
  MutexLock lock(mutex_);
  return resets_unknown_ == 0;
}

void DirectoryLane::wake() { ipc::ring_eventfd(wakeup_.get()); }

void DirectoryLane::reset_cluster(ResetId reset) {
  {
    MutexLock lock(mutex_);
    ++resets_ordered_;
  }
  order([this, reset](Nanos now) {
    directory_.reset_cluster(reset, now);
    MutexLock lock(mutex_);
    --resets_ordered_;
  });
}

bool DirectoryLane::reset_ordered() const {
  MutexLock lock(mutex_);
  return resets_ordered_ > 0;
}

DirectoryLaneStatus DirectoryLane::status() const {
  DirectoryLaneStatus status;
  {
    MutexLock lock(mutex_);
    status = status_;
  }
  status.replica = replica_.stats();
  return status;
}

void DirectoryLane::say(Condition condition) {
  order([this, condition](Nanos now) { directory_.say(condition, now); });
}

void DirectoryLane::stop(Nanos patience) {
  if (!thread_.joinable()) return;
  {
    MutexLock lock(mutex_);
    stop_by_ = monotonic_now() + patience;
  }
  order([this](Nanos now) { directory_.leave(now); });
  thread_.join();
}

}  // namespace flexkv::cluster
