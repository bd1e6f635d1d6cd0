#include "flexkv/agent/rank_agent.h"

#include <pthread.h>
#include <sys/poll.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "flexkv/agent/copy_chunks.h"
#include "flexkv/base/block_sum.h"
#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/wait.h"

namespace flexkv::agent {
namespace {

// A lane looks for a cancellation after so many bytes: under 1 ms of copying over PCIe, a few ms of memcpy.
constexpr std::uint64_t kChunkBytes = 16ULL << 20;
constexpr std::size_t kChunkBlocksMax = 1024;
constexpr Nanos kHandshakeTimeout = 10 * kSecond;
constexpr Nanos kForever = std::numeric_limits<Nanos>::max() / 4;
constexpr device::Direction kDirections[] = {device::Direction::kToHost, device::Direction::kToDevice};

}  // namespace

RankAgent::Session::~Session() {
  streams[0].reset();
  streams[1].reset();
  if (pinning.joinable()) pinning.join();
  device->unregister_pool();
}

RankAgent::RankAgent(RankAgentOptions options, std::shared_ptr<device::Device> device, layout::BlockLayout layout)
    : options_(std::move(options)), device_(std::move(device)), layout_(std::move(layout)) {}

Result<std::unique_ptr<RankAgent>> RankAgent::start(RankAgentOptions options, std::shared_ptr<device::Device> device,
                                                    layout::BlockLayout layout) {
  std::unique_ptr<RankAgent> agent(new RankAgent(std::move(options), std::move(device), std::move(layout)));
  auto stop = ipc::make_eventfd();
  if (!stop) return stop.error();
  auto control = ipc::make_eventfd();
  if (!control) return control.error();
  agent->stop_ = std::move(stop).value();
  agent->control_ = std::move(control).value();
  RankAgent* self = agent.get();
  agent->control_thread_ = start_thread([self] { self->control_loop(); });
  for (const auto direction : kDirections) {
    agent->lanes_[static_cast<int>(direction)] = start_thread([self, direction] { self->lane_loop(direction); });
  }
  return agent;
}

RankAgent::~RankAgent() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    jobs_.node_lost();
  }
  if (stop_.valid()) ipc::ring_eventfd(stop_.get());
  wake_all();
  if (control_thread_.joinable()) control_thread_.join();
  for (auto& lane : lanes_) {
    if (lane.joinable()) lane.join();
  }
}

// ---- control lane --------------------------------------------------------------------------------------------------

void RankAgent::control_loop() {
  pthread_setname_np(pthread_self(), "flexkv-agent");
  while (true) {
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
    }
    auto connected = connect();
    {
      std::lock_guard lock(mutex_);
      if (stopping_) return;
      if (!connected) {
        if (counters_.refusal != connected.error().message) {
          log_warning("rank " + std::to_string(options_.rank) + ": not attached to node '" + options_.node_name +
                      "': " + connected.error().message);
        }
        counters_.refusal = connected.error().message;
      }
    }
    if (!connected) {
      // Refused by a live node, or out of resources: asking again at once would be answered alike.
      pollfd stop{stop_.get(), POLLIN, 0};
      (void)::poll(&stop, 1, 1000);
      continue;
    }
    serve(connected.value().channel);
    close_session();
  }
}

Result<ipc::Connection> RankAgent::connect() {
  auto socket = ipc::wait_for_socket(options_.runtime_dir, options_.node_name, stop_.get(), kForever);
  if (!socket) return socket.error();
  proto::AgentHello hello;
  hello.engine_id = options_.engine_id;
  hello.rank = options_.rank;
  hello.rank_count = options_.rank_count;
  hello.shard = options_.shard;
  static_assert(sizeof(hello.layout_id) == sizeof(layout_.id().bytes));
  std::memcpy(hello.layout_id.data(), layout_.id().bytes.data(), hello.layout_id.size());
  hello.shard_bytes = layout_.shard_bytes();
  hello.block_count = layout_.block_count();
  hello.device = std::string(device_->name());
  ipc::Hello frame;
  frame.role = static_cast<std::uint32_t>(proto::Role::kAgent);
  frame.payload = proto::encode(hello);
  auto connected = ipc::Channel::connect(std::move(socket).value(), frame, kHandshakeTimeout);
  if (!connected) return connected.error();
  ipc::Connection& connection = connected.value();
  const auto welcome = proto::decode_welcome(connection.payload);
  if (!welcome) return welcome.error();
  if (connection.fds.size() != 1) return Error{ErrorCode::kPeer, "the node handed over no pool descriptor"};
  if (auto opened = open_session(welcome.value(), std::move(connection.fds[0])); !opened) return opened.error();
  return connected;
}

Status RankAgent::open_session(const proto::Welcome& welcome, Fd pool) {
  auto mapped = memory::HostRegion::map(std::move(pool), welcome.pool_bytes);
  if (!mapped) return mapped.error();
  std::unique_ptr<Session> session(new Session{std::move(mapped).value(), device_, {}, {}});
  for (const auto direction : kDirections) {
    auto stream = device_->open_stream(direction, layout_, {session->pool.data(), session->pool.bytes()});
    if (!stream) return stream.error();
    session->streams[static_cast<int>(direction)] = std::move(stream).value();
  }
  // Copies work before and during pinning, only slower.
  session->pinning = std::jthread([this, region = &session->pool] {
    pthread_setname_np(pthread_self(), "flexkv-pin");
    if (auto pinned = device_->register_pool(region->data(), region->bytes()); !pinned) {
      log_warning("host pool is not pinned, copies will be slower: " + pinned.error().message);
      return;
    }
    std::lock_guard lock(mutex_);
    counters_.pool_registered = true;
  });
  std::lock_guard lock(mutex_);
  session_ = std::move(session);
  return {};
}

void RankAgent::serve(ipc::Channel& channel) {
  {
    std::lock_guard lock(mutex_);
    channel_ = &channel;
    counters_.attached = true;
    ++counters_.attach_count;
    counters_.refusal.clear();
    jobs_.node_found();
    done_.notify_all();
  }
  std::vector<std::byte> record;
  bool alive = true;
  while (alive) {
    Nanos wakeup = 0;
    ipc::PopResult popped = ipc::PopResult::kEmpty;
    while ((popped = channel.pop(record)) == ipc::PopResult::kRecord) {
      auto message = proto::decode_to_agent(record);
      if (!message) {
        log_error("node '" + options_.node_name + "': " + message.error().message);
        alive = false;
        break;
      }
      const Change change(*this);
      if (auto* copy = std::get_if<proto::CopyCommand>(&message.value())) {
        const bool save = copy->direction == device::Direction::kToHost;
        jobs_.command(std::move(*copy), monotonic_now() + (save ? options_.save_timeout : options_.load_timeout));
      } else {
        jobs_.cancel(std::get<proto::CancelCommand>(message.value()).job);
      }
    }
    if (popped == ipc::PopResult::kCorrupt) {
      log_error("node '" + options_.node_name + "' broke the ring format");
      alive = false;
    }
    {
      const Change change(*this);
      if (stopping_) break;
      const Nanos now = monotonic_now();
      jobs_.on_time(now);
      send_reports();
      if (channel_ == nullptr) break;  // given up by send_reports
      wakeup = jobs_.next_deadline().value_or(kForever);
      // Not later than before: the next job's deadline is hardly earlier, and need not wake this lane.
      if (control_wakeup_ > now) wakeup = std::min(wakeup, control_wakeup_);
      control_wakeup_ = wakeup;
    }
    if (!alive || !channel.arm_sleep()) continue;
    pollfd fds[] = {{channel.wake_fd(), POLLIN, 0},
                    {channel.socket_fd(), POLLIN, 0},
                    {stop_.get(), POLLIN, 0},
                    {control_.get(), POLLIN, 0}};
    const Nanos left = std::max<Nanos>(wakeup - monotonic_now(), 0);
    const timespec timeout{left / kSecond, left % kSecond};
    (void)::ppoll(fds, std::size(fds), &timeout, nullptr);
    channel.disarm();
    if (fds[3].revents != 0) ipc::drain_eventfd(control_.get());
    if (fds[2].revents != 0 || (fds[1].revents != 0 && channel.peer_gone())) alive = false;
  }
}

void RankAgent::close_session() {
  std::unique_lock lock(mutex_);
  channel_ = nullptr;
  counters_.attached = false;
  jobs_.node_lost();
  wake_all();
  // A lane stops after its current chunk; then this is the session's last owner, and unpins and unmaps the pool.
  done_.wait(lock, [&] { return jobs_.job_count() == 0; });
  std::unique_ptr<Session> session = std::move(session_);
  lock.unlock();
  session.reset();
  lock.lock();
  counters_.pool_registered = false;  // now that nobody pins it any more
}

RankAgent::Change::~Change() {
  agent_.send_reports();
  const bool ended = agent_.jobs_.take_ended();
  const bool ready[] = {agent_.jobs_.ready(kDirections[0]), agent_.jobs_.ready(kDirections[1])};
  lock_.unlock();
  for (const auto direction : kDirections) {
    if (ready[static_cast<int>(direction)]) agent_.work_[static_cast<int>(direction)].notify_one();
  }
  if (ended) agent_.done_.notify_all();
}

void RankAgent::wake_all() {
  for (auto& lane : work_) lane.notify_all();
  done_.notify_all();
}

void RankAgent::send_reports() {
  for (const auto& report : jobs_.take_reports()) {
    if (channel_ != nullptr && !channel_->send(proto::encode(report))) {
      // A node that leaves megabytes of reports unread is as good as gone. The socket stays open until the lanes are
      // quiet: once it is closed, the node gives the host blocks that they use to others.
      log_error("node '" + options_.node_name + "' does not read its reports: detaching");
      channel_ = nullptr;
      ipc::ring_eventfd(control_.get());
    }
  }
  if (jobs_.next_deadline().value_or(kForever) < control_wakeup_) ipc::ring_eventfd(control_.get());
}

// ---- copy lanes ----------------------------------------------------------------------------------------------------

void RankAgent::lane_loop(device::Direction direction) {
  pthread_setname_np(pthread_self(), direction == device::Direction::kToHost ? "flexkv-save" : "flexkv-load");
  while (true) {
    std::optional<RankJobs::Work> work;
    Session* session = nullptr;
    {
      std::unique_lock lock(mutex_);
      work_[static_cast<int>(direction)].wait(lock,
                                              [&] { return stopping_ || (work = jobs_.next(direction)).has_value(); });
      if (!work) return;
      session = session_.get();  // stays while a job runs: see close_session
    }
    auto [status, copied, sums] = run(*work, *session);
    const Change change(*this);
    if (status == JobStatus::kDone) {
      auto& blocks = direction == device::Direction::kToHost ? counters_.saved_blocks : counters_.loaded_blocks;
      blocks += copied;
    } else {
      ++counters_.failed_jobs;
    }
    jobs_.finished(*work, status, copied, std::move(sums));
  }
}

RankAgent::Outcome RankAgent::run(const RankJobs::Work& work, Session& session) {
  // Its slice is empty, or its blocks are all still on drives: there is nothing to wait for.
  if (work.command->runs.empty()) return {};
  device::CopyStream& stream = *session.streams[static_cast<int>(work.command->direction)];
  Status status;
  if (work.event != nullptr) status = stream.order_after(*work.event);
  bool canceled = false;
  // A load that comes in pieces has its first part only with the last piece.
  const bool in_parts = work.gate != nullptr && work.command->piece == 0 && work.command->last;
  const std::size_t parts = in_parts ? layout_.parts().size() : 0;
  std::size_t submitted = 0;
  std::vector<std::uint64_t> sums;
  if (status && work.command->direction == device::Direction::kToHost) status = sum(work, stream, sums);
  for (std::size_t part = 0; part < parts && status && !canceled; ++part) {
    status = submit(work, stream, part, canceled, submitted);
    if (status && !canceled) status = work.gate->raise_after(stream, static_cast<std::uint32_t>(part + 1));
  }
  if (!in_parts && status) status = submit(work, stream, device::CopyStream::kAllParts, canceled, submitted);
  // Also after an error: what was submitted must have ended before the job may be reported.
  const Status quiet = stream.synchronize();
  if (status.ok()) status = quiet;
  if (!status.ok()) {
    log_error("rank " + std::to_string(options_.rank) + ": copy failed: " + status.error().message);
    return {JobStatus::kFailed, 0};
  }
  if (!canceled) return {JobStatus::kDone, submitted, std::move(sums)};
  // A part is some layers of each block: none is whole before the last part.
  return {JobStatus::kCanceled, in_parts ? 0 : submitted};
}

Status RankAgent::submit(const RankJobs::Work& work, device::CopyStream& stream, std::size_t part, bool& canceled,
                         std::size_t& submitted) {
  const std::size_t chunk = std::clamp<std::size_t>(kChunkBytes / layout_.shard_bytes(), 1, kChunkBlocksMax);
  CopyChunks chunks(*work.command, chunk);
  submitted = 0;
  for (auto blocks = chunks.next(); !blocks.empty(); blocks = chunks.next()) {
    {
      std::lock_guard lock(mutex_);
      canceled = jobs_.canceled(work.job);
    }
    if (canceled) break;
    if (Status status = stream.submit(blocks, part); !status) return status;
    submitted += blocks.size();
  }
  return {};
}

// Before the copies: what is overwritten while they run has another sum then.
Status RankAgent::sum(const RankJobs::Work& work, device::CopyStream& stream, std::vector<std::uint64_t>& sums) {
  const std::vector<device::BlockCopy> blocks = work.command->blocks();
  const std::size_t count = std::min<std::size_t>(blocks.size(), proto::kSumsPerReportMax);
  sums.assign(count, kNoSum);
  const std::uint32_t step = device_->saves_per_sum();
  if (step == 1) return stream.sum(std::span(blocks).first(count), sums);
  std::size_t at = saves_until_sum_;
  Status status;
  for (; at < count && status; at += step) status = stream.sum({&blocks[at], 1}, {&sums[at], 1});
  saves_until_sum_ = static_cast<std::uint32_t>(at - std::min(at, count));
  return status;
}

// ---- the engine's worker -------------------------------------------------------------------------------------------

void RankAgent::arm(std::span<const JobId> jobs, bool loads, std::uintptr_t engine_stream, bool in_parts) {
  if (jobs.empty()) return;
  std::vector<std::shared_ptr<device::Gate>> gates(jobs.size());
  for (std::size_t i = 0; in_parts && i < gates.size(); ++i) {
    // Without one, hold_engine() waits for the whole load.
    if (auto made = device_->make_gate()) gates[i] = std::move(made).value();
  }
  auto event = device_->record(engine_stream);
  if (!event) log_error("cannot order copies after the engine's stream: " + event.error().message);
  const std::shared_ptr<device::EngineEvent> shared = event.ok() ? std::move(event).value() : nullptr;
  const Nanos deadline = monotonic_now() + (loads ? options_.load_timeout : options_.save_timeout);
  const Change change(*this);
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (gates[i] != nullptr) gates_[jobs[i]] = gates[i];
    jobs_.arm(jobs[i], loads, shared, deadline, gates[i]);
    // Without a point to wait for, the copy could run ahead of the engine.
    if (!event.ok()) jobs_.cancel(jobs[i]);
  }
}

void RankAgent::arm_loads(std::span<const JobId> jobs, std::uintptr_t engine_stream) {
  arm(jobs, true, engine_stream, false);
}
void RankAgent::arm_loads_in_parts(std::span<const JobId> jobs, std::uintptr_t engine_stream) {
  arm(jobs, true, engine_stream, true);
}
void RankAgent::arm_saves(std::span<const JobId> jobs, std::uintptr_t engine_stream) {
  arm(jobs, false, engine_stream, false);
}

void RankAgent::hold_engine(std::span<const JobId> jobs, std::uint32_t parts, std::uintptr_t engine_stream) {
  FLEXKV_ASSERT(parts <= layout_.parts().size());
  for (const JobId job : jobs) {
    std::shared_ptr<device::Gate> gate;
    {
      std::lock_guard lock(mutex_);
      if (const auto found = gates_.find(job); found != gates_.end()) gate = found->second;
    }
    if (gate != nullptr && gate->hold(engine_stream, parts)) continue;
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return !jobs_.pending(job); });
  }
}

std::vector<LoadResult> RankAgent::take_loads() {
  std::lock_guard lock(mutex_);
  std::vector<LoadResult> loads = jobs_.take_loads();
  for (const LoadResult& load : loads) gates_.erase(load.job);
  return loads;
}

std::vector<LoadResult> RankAgent::wait_loads(std::span<const JobId> jobs) {
  std::unique_lock lock(mutex_);
  done_.wait(lock,
             [&] { return std::none_of(jobs.begin(), jobs.end(), [&](JobId job) { return jobs_.pending(job); }); });
  for (const JobId job : jobs) gates_.erase(job);
  return jobs_.take_failed(jobs);
}

void RankAgent::fence(std::span<const JobId> jobs, Nanos patience) {
  const auto quiet = [&] {
    return std::none_of(jobs.begin(), jobs.end(), [&](JobId job) { return jobs_.pending(job); });
  };
  {
    std::unique_lock lock(mutex_);
    if (done_.wait_for(lock, std::chrono::nanoseconds(patience), quiet)) return;
  }
  cancel(jobs);
  std::unique_lock lock(mutex_);
  done_.wait(lock, quiet);
}

void RankAgent::cancel(std::span<const JobId> jobs) {
  const Change change(*this);
  for (const JobId job : jobs) jobs_.cancel(job);
}

bool RankAgent::wait_attached(Nanos timeout) {
  std::unique_lock lock(mutex_);
  return done_.wait_for(lock, std::chrono::nanoseconds(timeout), [&] { return counters_.attached; });
}

RankAgent::Counters RankAgent::counters() const {
  std::lock_guard lock(mutex_);
  return counters_;
}

}  // namespace flexkv::agent
