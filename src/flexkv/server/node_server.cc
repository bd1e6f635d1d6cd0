#include "flexkv/server/node_server.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/syscall.h>

#include <algorithm>
#include <limits>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/runtime_dir.h"
#include "flexkv/proto/messages.h"

namespace flexkv::server {
namespace {

constexpr std::size_t kRingCapacity = 4U << 20;  // touched only as far as it is used
constexpr std::size_t kPendingMax = 64;
constexpr Nanos kPatience = 5 * kSecond;
constexpr std::size_t kPeersMax = 4096;
constexpr std::size_t kEndedMax = 65536;
constexpr std::size_t kChangesAtOnce = 4096;  // of them a reader in this process gets so many under the lock
constexpr Nanos kForever = std::numeric_limits<Nanos>::max();
// At the end, for what waits to be written, and then for drives that hang.
constexpr Nanos kWritePatience = 3 * kSecond;
constexpr Nanos kDrivePatience = 2 * kSecond;
// For the farewell to the cluster, should Redis not answer.
constexpr Nanos kLeavePatience = 1 * kSecond;

// epoll tokens: what the event is about, and which one.
enum Kind : std::uint64_t { kListener = 0, kWake = 1, kPending = 2, kPeerRing = 3, kPeerSocket = 4, kPeerProcess = 5 };
constexpr std::uint64_t token(Kind kind, std::uint64_t id) { return id << 3 | kind; }

void fill_random(void* data, std::size_t size) {
  // 32 bytes or less after boot cannot fail or come short.
  FLEXKV_ASSERT(::getrandom(data, size, 0) == static_cast<ssize_t>(size));
}

// Readable once the process has ended, even while a child that it forked still holds its socket. Not valid where the
// system has no such descriptor, or the process is in a namespace that we do not see.
Result<Fd> open_process(pid_t pid) {
  Fd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!process.valid() && errno == ESRCH) return Error{ErrorCode::kPeer, "it has ended"};
  return process;
}

}  // namespace

NodeServer::NodeServer(NodeServerOptions options, memory::HostRegion pool, ipc::Listener listener)
    : options_(std::move(options)),
      pool_(std::move(pool)),
      started_at_(monotonic_now()),
      cluster_(open_cluster()),
      remote_(open_remote()),
      disk_(open_disk()),
      listener_(std::move(listener)),
      pending_(kPendingMax, kPatience),
      node_(options_.node, *this, disk_.get(), beyond_.empty() ? nullptr : &beyond_, remote_.get()) {
  if (cluster_ != nullptr) {
    key_secret_ = cluster_->key_secret();
  } else if (remote_ != nullptr) {
    key_secret_ = remote_->key_secret();
  } else if (disk_ != nullptr) {
    key_secret_ = disk_->secret();
  } else {
    fill_random(key_secret_.data(), key_secret_.size());
  }
  fill_random(&epoch_, sizeof epoch_);
  if (disk_ != nullptr) resets_seen_ = disk_->resets_seen().value_or(ResetsSeen());
}

void NodeServer::call_node(const std::function<void(node::Node&)>& call) {
  MutexLock lock(mutex_);
  call(node_);
  if (stopping_ && node_.disk_queues().writes == 0 && node_.store_queue() == 0) written_.notify_all();
  if (drain_) advance_drain(monotonic_now());
  wake_if_earlier();
}

std::unique_ptr<ClusterBridge> NodeServer::open_cluster() {
  if (!options_.cluster) return nullptr;
  auto opened = ClusterBridge::create(
      *options_.cluster, pool_, beyond_, [this](const auto& call) { call_node(call); },
      [this](cluster::Epoch epoch) {
        if (remote_ != nullptr) remote_->enter_epoch(epoch);
        note_resets([&](ResetsSeen& seen) {
          seen.cluster = hash_of_cluster(options_.cluster->cluster);
          seen.epoch = epoch;
        });
      },
      [this](std::optional<cluster::Epoch> epoch) {
        if (remote_ != nullptr) remote_->know_epoch(epoch);
      });
  if (opened) {
    beyond_.add(*opened.value());
    return std::move(opened).value();
  }
  cluster_off_why_ = "the cluster is off: " + opened.error().message;
  log_warning(cluster_off_why_);
  return nullptr;
}

std::unique_ptr<RemoteBridge> NodeServer::open_remote() {
  if (!options_.remote) return nullptr;
  auto opened = RemoteBridge::create(
      *options_.remote, {pool_.data(), pool_.bytes()}, beyond_, [this](const auto& call) { call_node(call); },
      [this](const std::set<remote::Mark>& marks) {
        note_resets([&](ResetsSeen& seen) { seen.marks = hash_of_marks(marks); });
      });
  if (opened && !opened.value()->keeps_marks() && cluster_ == nullptr) {
    opened = Error{
        ErrorCode::kInvalidArgument,
        options_.remote->url + " needs a cluster, which knows of resets: Mooncake Store may lose all that is in it"};
  }
  if (opened) {
    beyond_.add(*opened.value());
    return std::move(opened).value();
  }
  remote_off_why_ = "the remote tier is off: " + opened.error().message;
  log_warning(remote_off_why_);
  return nullptr;
}

// What drives hold is of after the resets that this node knows of by then, as it has just forgotten the rest.
void NodeServer::note_resets(const std::function<void(ResetsSeen&)>& change) {
  change(resets_seen_);
  if (disk_ != nullptr) disk_->note_resets(resets_seen_);
  if (cluster_ != nullptr) tell_marks();
}

// Who has no store that keeps marks knows of the cluster's resets only, as who has no store.
void NodeServer::tell_marks() {
  if (remote_ != nullptr && remote_->keeps_marks()) cluster_->know_resets(resets_seen_.marks);
}

void NodeServer::join_cluster(const ResetsSeen& held) {
  if (cluster_ == nullptr) return;
  const bool needs_reset = remote_ != nullptr && !remote_->keeps_marks();
  if (const Status started = cluster_->start(held.epoch_of(options_.cluster->cluster), needs_reset); !started) {
    cluster_off_why_ = "the cluster is off: " + started.error().message;
    log_warning(cluster_off_why_);
    MutexLock lock(mutex_);
    beyond_.drop(*cluster_);
    return;
  }
  MutexLock lock(mutex_);
  tell_marks();
}

std::unique_ptr<DiskBridge> NodeServer::open_disk() {
  if (options_.disk.directories.empty() || options_.disk.bytes == 0) return nullptr;
  DiskOptions disk = options_.disk;
  if (remote_ != nullptr) disk.secret = remote_->key_secret();
  if (cluster_ != nullptr) disk.secret = cluster_->key_secret();
  auto opened = DiskBridge::open(disk, {pool_.data(), pool_.bytes()}, [this](const auto& call) { call_node(call); });
  if (opened) return std::move(opened).value();
  disk_off_why_ = "SSD cache is off: " + opened.error().message;
  log_warning(disk_off_why_);
  return nullptr;
}

void NodeServer::open_door() {
  if (!options_.door) return;
  auto opened = EngineDoor::open(*options_.door, *this);
  if (opened) {
    door_ = std::move(opened).value();
    return;
  }
  door_off_why_ = "engines of other machines are not served: " + opened.error().message;
  log_warning(door_off_why_);
}

Result<std::unique_ptr<NodeServer>> NodeServer::start(NodeServerOptions options) {
  if (auto swept = ipc::sweep_stale(options.runtime_dir); !swept) return swept.error();
  // Seen only once nothing can fail any more: who connects before would only be told that it is closed.
  auto listener = ipc::Listener::claim(options.runtime_dir, options.name);
  if (!listener) return listener.error();
  memory::HostRegion::Options region;
  region.huge_pages = options.huge_pages;
  region.touch_threads = options.touch_threads;
  region.numa = memory::place_near_gpus();
  auto pool = memory::HostRegion::create(options.node.pool_bytes, region);
  if (!pool) return pool.error();
  options.node.pool_bytes = pool.value().bytes();
  options.node.disk_bytes = options.disk.bytes;
  std::unique_ptr<NodeServer> server(
      new NodeServer(std::move(options), std::move(pool).value(), std::move(listener).value()));
  auto wake = ipc::make_eventfd();
  if (!wake) return wake.error();
  server->wake_ = std::move(wake).value();
  server->epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!server->epoll_.valid()) return errno_error("epoll_create1", errno);
  server->watch(server->listener_.fd(), token(kListener, 0));
  server->watch(server->wake_.get(), token(kWake, 0));
  const std::optional<ResetsSeen> held = server->disk_ == nullptr ? std::nullopt : server->disk_->resets_seen();
  if (server->remote_ != nullptr) server->remote_->start(held ? std::optional(held->marks) : std::nullopt);
  server->join_cluster(held.value_or(ResetsSeen()));
  server->open_door();
  if (Status shown = server->listener_.show(); !shown) return shown.error();
  NodeServer* self = server.get();
  server->lane_ = start_thread([self] { self->lane(); });
  server->toucher_ = start_thread([self] {
    pthread_setname_np(pthread_self(), "flexkv-touch");
    if (auto touched = self->pool_.touch(); !touched) log_warning("host pool: " + touched.error().message);
  });
  return server;
}

NodeServer::~NodeServer() {
  door_.reset();
  if (cluster_ != nullptr) cluster_->leave(kLeavePatience);
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    node_.stop_scrub(monotonic_now());
  }
  ipc::ring_eventfd(wake_.get());
  if (lane_.joinable()) lane_.join();
  if (toucher_.joinable()) toucher_.join();
  bool quiet = cluster_ == nullptr || cluster_->close();
  finish_writes();
  if (remote_ != nullptr) remote_->close();
  quiet = (disk_ == nullptr || disk_->close(kDrivePatience)) && quiet;
  if (quiet) return;
  // A drive or NIXL that hangs may still use the pool: it stays mapped for the rest of the process's life.
  static auto* const kept = new std::vector<memory::HostRegion>;
  kept->push_back(std::move(pool_));
}

// Nobody asks for blocks any more, but what was saved last should be found at the next start.
void NodeServer::finish_writes() {
  MutexLock lock(mutex_);
  const Nanos end = monotonic_now() + kWritePatience;
  node_.flush_store(monotonic_now());
  while (node_.disk_queues().writes > 0 || node_.store_queue() > 0) {
    const Nanos left = end - monotonic_now();
    if (left <= 0) {
      log_warning(std::to_string(node_.disk_queues().writes) + " blocks were not written to drives in time, " +
                  std::to_string(node_.store_queue()) + " not to the remote tier");
      return;
    }
    written_.wait_for(mutex_, std::chrono::nanoseconds(left));
  }
}

// ---- direct calls --------------------------------------------------------------------------------------------------

Result<node::EngineHandle> NodeServer::attach_client(const proto::ClientHello& hello, int results_fd) {
  MutexLock lock(mutex_);
  auto attached = node_.attach_client(hello);
  if (attached.ok()) ended_[attached.value()].results_fd = results_fd;
  return attached;
}

void NodeServer::detach_client(node::EngineHandle engine) {
  MutexLock lock(mutex_);
  ended_.erase(engine);
  node_.detach_client(engine);
  if (drain_) done_.notify_all();
}

node::Node::Lookup NodeServer::lookup(node::EngineHandle engine, const proto::LookupRequest& request) {
  MutexLock lock(mutex_);
  const auto found = node_.lookup(engine, request, monotonic_now());
  wake_if_earlier();  // what was found may have to be kept elsewhere soon
  return found;
}

proto::Reason NodeServer::post(node::EngineHandle engine, const proto::FromClient& message) {
  MutexLock lock(mutex_);
  const proto::Reason reason = take(engine, message, monotonic_now());
  wake_if_earlier();
  if (drain_) done_.notify_all();
  return reason;
}

void NodeServer::reset_all() {
  node::ResetId reset = 0;
  while (reset == 0) fill_random(&reset, sizeof reset);
  MutexLock lock(mutex_);
  last_reset_ = reset;
  node_.reset_all(reset, monotonic_now());
}

bool NodeServer::read_changes(events::Subscription& subscription, node::EngineHandle engine,
                              std::vector<events::Change>& out) {
  MutexLock lock(mutex_);
  node_.follow();
  const bool more = node_.read_changes(subscription, engine, kChangesAtOnce, out);
  if (changes_fd_.valid() && !more) {
    ipc::drain_eventfd(changes_fd_.get());
    node_.want_changes();
  }
  return more;
}

Result<int> NodeServer::changes_fd() {
  MutexLock lock(mutex_);
  if (!changes_fd_.valid()) {
    auto made = ipc::make_eventfd();
    if (!made) return made.error();
    changes_fd_ = std::move(made).value();
    ipc::ring_eventfd(changes_fd_.get());
  }
  return changes_fd_.get();
}

Status NodeServer::scrub(std::uint64_t bytes_per_second) {
  if (disk_ == nullptr) {
    return Error{ErrorCode::kUnsupported, disk_off_why_.empty() ? "this node has no SSD tier" : disk_off_why_};
  }
  MutexLock lock(mutex_);
  if (node_.draining()) return Error{ErrorCode::kUnsupported, "this node drains: start it anew first"};
  if (bytes_per_second > 0) {
    node_.begin_scrub(bytes_per_second, monotonic_now());
  } else {
    node_.stop_scrub(monotonic_now());
  }
  wake_if_earlier();
  return {};
}

bool NodeServer::ready(node::EngineHandle engine) const {
  MutexLock lock(mutex_);
  return node_.ready(engine);
}

std::vector<proto::JobResult> NodeServer::take_ended_jobs(node::EngineHandle engine) {
  MutexLock lock(mutex_);
  const auto found = ended_.find(engine);
  return found == ended_.end() ? std::vector<proto::JobResult>{} : std::exchange(found->second.results, {});
}

bool NodeServer::wait_ended_jobs(node::EngineHandle engine, Nanos timeout) const {
  const Nanos end = monotonic_now() + timeout;
  MutexLock lock(mutex_);
  while (true) {
    const auto found = ended_.find(engine);
    if (found == ended_.end() || !found->second.results.empty()) return true;
    if (!wait_for_news(end)) return false;
  }
}

bool NodeServer::wait_ready(node::EngineHandle engine, Nanos timeout) const {
  const Nanos end = monotonic_now() + timeout;
  MutexLock lock(mutex_);
  while (!node_.ready(engine)) {
    if (!wait_for_news(end)) return false;
  }
  return true;
}

bool NodeServer::wait_for_news(Nanos end) const {
  const Nanos left = end - monotonic_now();
  if (left <= 0) return false;
  news_.wait_for(mutex_, std::chrono::nanoseconds(left));
  return true;
}

std::string NodeServer::socket_path() const { return ipc::socket_path(options_.runtime_dir, options_.name); }

std::string NodeServer::describe() const {
  char gib[32];
  std::snprintf(gib, sizeof gib, "%.2f GiB", static_cast<double>(pool_.bytes()) / (1U << 30));
  std::string text = "host pool of " + std::string(gib) + " in " + pool_.description();
  if (disk_ != nullptr || !disk_off_why_.empty()) {
    const auto drives = disk_ != nullptr ? disk_->status().drives : std::vector<DiskBridge::DriveStatus>();
    const auto usable = std::ranges::count_if(drives, [](const auto& drive) { return drive.volume.health.reads; });
    text += usable == 0 ? ", SSD cache OFF" : ", SSD cache in " + std::to_string(usable) + " directories";
    if (usable > 0 && usable < std::ssize(drives)) text += " of " + std::to_string(drives.size());
  }
  if (options_.remote) text += remote_ == nullptr ? ", remote tier OFF" : ", remote tier at " + options_.remote->url;
  text += ", listening at " + socket_path();
  if (door_ != nullptr) text += " and for engines of other machines at " + door_->address();
  return text;
}

std::string NodeServer::status_json() const {
  MutexLock lock(mutex_);
  NodeIdentity identity;
  identity.name = options_.name;
  identity.mode = options_.mode;
  identity.now = monotonic_now();
  identity.uptime = identity.now - started_at_;
  identity.page_kind = pool_.description();
  identity.pool_bytes = pool_.bytes();
  identity.peers = peers_.size();
  if (drain_) identity.drain = drain_status(identity.now);
  identity.last_reset = last_reset_;
  if (door_ != nullptr) identity.door_address = door_->address();
  if (!door_off_why_.empty()) identity.messages.push_back(door_off_why_);
  if (!cluster_off_why_.empty()) identity.messages.push_back(cluster_off_why_);
  if (!remote_off_why_.empty()) identity.messages.push_back(remote_off_why_);
  if (!disk_off_why_.empty()) identity.messages.push_back(disk_off_why_);
  std::optional<DiskBridge::Status> disk;
  if (disk_ != nullptr) disk = disk_->status();
  std::optional<ClusterBridge::Status> cluster;
  if (cluster_ != nullptr) cluster = cluster_->status();
  std::optional<RemoteBridge::Status> remote;
  if (remote_ != nullptr) remote = remote_->status();
  return render_status(identity, node_, disk ? &*disk : nullptr, cluster ? &*cluster : nullptr,
                       remote ? &*remote : nullptr);
}

// ---- outbox (the mutex is held: the node is only called with it) ---------------------------------------------------

bool NodeServer::send(node::AgentHandle agent, const proto::ToAgent& message) {
  const auto found = agents_.find(agent);
  if (found == agents_.end()) return false;
  const auto bytes = proto::encode(message);
  return bytes.size() <= found->second->channel.max_record() && found->second->channel.send(bytes);
}

void NodeServer::send(node::EngineHandle engine, const proto::JobResult& result) {
  const auto found = clients_.find(engine);
  // A client that does not read its results loses some: they are for its statistics only.
  if (found != clients_.end()) {
    (void)found->second->channel.send(proto::encode(proto::ToClient{result}));
    return;
  }
  const auto direct = ended_.find(engine);
  if (direct == ended_.end()) return;
  auto& results = direct->second.results;
  if (results.size() == kEndedMax) results.erase(results.begin());
  results.push_back(result);
  if (direct->second.results_fd >= 0) ipc::ring_eventfd(direct->second.results_fd);
  news_.notify_all();
}

void NodeServer::changed() {
  if (changes_fd_.valid()) ipc::ring_eventfd(changes_fd_.get());
  changed_ = true;
  ipc::ring_eventfd(wake_.get());
  if (cluster_ != nullptr) cluster_->changed();
}

void NodeServer::lent(node::Loan loan) { cluster_->lent(loan); }

void NodeServer::tell_changes(Peer& peer) {
  proto::ChangesReply reply;
  (void)node_.read_changes(peer.changes, peer.engine, proto::kChangesMax, reply.changes);
  if (reply.changes.empty()) {
    node_.want_changes();
    return;
  }
  const auto bytes = proto::encode(proto::ToClient{std::move(reply)});
  if (bytes.size() <= peer.channel.max_record() && peer.channel.send(bytes)) {
    peer.wants_changes = false;
  } else {
    peer.changes = {};  // what could not be told is told anew
    node_.want_changes();
  }
}

void NodeServer::wake_if_earlier() {
  if (node_.next_deadline().value_or(kForever) < lane_wakeup_) ipc::ring_eventfd(wake_.get());
}

// ---- the lane ------------------------------------------------------------------------------------------------------

void NodeServer::watch(int fd, std::uint64_t tok) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = tok;
  FLEXKV_ASSERT(::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0);
}

void NodeServer::lane() {
  pthread_setname_np(pthread_self(), "flexkv-node");
  std::array<epoll_event, 64> events;
  while (true) {
    Nanos wakeup = kForever;
    {
      MutexLock lock(mutex_);
      if (stopping_) break;
      const Nanos now = monotonic_now();
      node_.on_time(now);
      if (drain_) advance_drain(now);
      if (std::exchange(changed_, false)) {
        for (const auto& [engine, peer] : clients_) {
          if (peer->wants_changes) tell_changes(*peer);
        }
      }
      wakeup = std::min(node_.next_deadline().value_or(kForever), pending_.next_deadline().value_or(kForever));
      if (drain_ && now < drain_->lends_until) wakeup = std::min(wakeup, drain_->lends_until);
      // Not later than before: the next job's deadline is hardly earlier, and need not wake this lane.
      if (lane_wakeup_ > now) wakeup = std::min(wakeup, lane_wakeup_);
      lane_wakeup_ = wakeup;
    }
    int timeout_ms = -1;
    if (wakeup != kForever) {
      timeout_ms = static_cast<int>(
          std::clamp<Nanos>((wakeup - monotonic_now() + kMillisecond - 1) / kMillisecond, 0, 1000 * 3600));
    }
    const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), timeout_ms);
    for (int i = 0; i < count; ++i) {
      const std::uint64_t id = events[static_cast<std::size_t>(i)].data.u64 >> 3;
      switch (events[static_cast<std::size_t>(i)].data.u64 & 7) {
        case kListener:
          accept_clients();
          break;
        case kWake:
          ipc::drain_eventfd(wake_.get());
          break;
        case kPending:
          advance_pending(static_cast<int>(id));
          break;
        case kPeerRing:
          serve(id, false);
          break;
        case kPeerSocket:
          serve(id, true);
          break;
        case kPeerProcess:
          drop(id);
          break;
        default:
          break;
      }
    }
    (void)pending_.expire(monotonic_now());
  }
  MutexLock lock(mutex_);
  agents_.clear();
  clients_.clear();
  peers_.clear();
}

void NodeServer::accept_clients() {
  while (auto socket = listener_.accept()) {
    if (const auto fd = pending_.add(std::move(*socket), monotonic_now())) {
      watch(*fd, token(kPending, static_cast<std::uint64_t>(*fd)));
    }
  }
}

void NodeServer::advance_pending(int fd) {
  ipc::PendingChannel* waiting = pending_.find(fd);
  if (waiting == nullptr) return;  // expired in this very round
  auto step = waiting->advance();
  if (step.ok() && step.value() == ipc::PendingChannel::Step::kWaiting) return;
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  ipc::PendingChannel pending = pending_.take(fd);
  if (!step.ok()) {
    log_debug("a client left during the handshake: " + step.error().message);
    return;
  }
  auto admitted = admit(pending);
  if (!admitted) {
    log_warning("process " + std::to_string(pending.peer_pid()) + " refused: " + admitted.error().message);
    pending.refuse(admitted.error());
    return;
  }
  if (admitted.value() == nullptr) return;  // a question, answered
  const std::uint64_t id = next_peer_++;
  Peer& peer = *admitted.value();
  watch(peer.channel.wake_fd(), token(kPeerRing, id));
  watch(peer.channel.socket_fd(), token(kPeerSocket, id));
  if (peer.process.valid()) watch(peer.process.get(), token(kPeerProcess, id));
  {
    MutexLock lock(mutex_);
    peers_.emplace(id, std::move(admitted).value());
  }
  serve(id, false);
}

// Does what is asked for; the status follows.
Status NodeServer::answer(proto::Role role, std::span<const std::byte> question) {
  if (role == proto::Role::kReset) reset_all();
  if (role == proto::Role::kDrain) {
    const auto request = proto::decode_drain_request(question);
    if (!request) return request.error();
    drain(Nanos{request.value().milliseconds} * kMillisecond);
  }
  if (role != proto::Role::kScrub) return {};
  const auto request = proto::decode_scrub_request(question);
  return request ? scrub(request.value().bytes_per_second) : Status(request.error());
}

// Welcomes an agent or a client, or answers a question (then there is no peer).
Result<std::unique_ptr<NodeServer::Peer>> NodeServer::admit(ipc::PendingChannel& pending) {
  const auto& hello = pending.hello();
  const auto role = static_cast<proto::Role>(hello.role);
  if (role == proto::Role::kStatus || role == proto::Role::kReset || role == proto::Role::kScrub ||
      role == proto::Role::kDrain) {
    if (Status done = answer(role, hello.payload); !done) return done.error();
    const std::string status = status_json();
    auto answered = pending.accept(std::as_bytes(std::span(status).first(std::min(status.size(), ipc::kMaxPayload))),
                                   {}, ipc::kMinRingCapacity);
    if (!answered) return answered.error();
    return std::unique_ptr<Peer>();
  }
  MutexLock lock(mutex_);
  if (peers_.size() >= kPeersMax) return Error{ErrorCode::kNoSpace, "too many processes are attached"};
  proto::Welcome welcome;
  welcome.epoch = epoch_;
  welcome.pool_bytes = pool_.bytes();
  const int pool_fd[] = {pool_.fd()};
  auto process = open_process(pending.peer_pid());
  if (!process) return process.error();

  if (role == proto::Role::kAgent) {
    auto decoded = proto::decode_agent_hello(hello.payload);
    if (!decoded) return decoded.error();
    auto attached = node_.attach_agent(decoded.value());
    if (!attached) return attached.error();
    auto channel = pending.accept(proto::encode(welcome), pool_fd, kRingCapacity);
    if (!channel) {
      node_.detach_agent(attached.value(), monotonic_now());
      return channel.error();
    }
    auto peer = std::make_unique<Peer>(std::move(channel).value(), std::move(process).value());
    peer->agent = attached.value();
    agents_[peer->agent] = peer.get();
    news_.notify_all();
    log_info("rank " + std::to_string(decoded.value().rank) + " of engine " + decoded.value().engine_id +
             " attached (" + decoded.value().device + ", " + std::to_string(decoded.value().shard_bytes) +
             " bytes a block, shard " + std::to_string(decoded.value().shard_number()) + ")");
    return peer;
  }
  if (role == proto::Role::kClient) {
    auto decoded = proto::decode_client_hello(hello.payload);
    if (!decoded) return decoded.error();
    auto attached = node_.attach_client(decoded.value());
    if (!attached) return attached.error();
    welcome.key_secret = key_secret_;
    auto channel = pending.accept(proto::encode(welcome), {}, kRingCapacity);
    if (!channel) {
      node_.detach_client(attached.value());
      return channel.error();
    }
    auto peer = std::make_unique<Peer>(std::move(channel).value(), std::move(process).value());
    peer->engine = attached.value();
    peer->id = next_peer_;
    clients_[peer->engine] = peer.get();
    log_info("engine " + decoded.value().engine_id + " attached (" + decoded.value().model + ")");
    return peer;
  }
  return Error{ErrorCode::kUnsupported, "unknown role " + std::to_string(hello.role)};
}

void NodeServer::serve(std::uint64_t id, bool socket_event) {
  Peer* peer = nullptr;
  {
    MutexLock lock(mutex_);
    const auto found = peers_.find(id);
    if (found == peers_.end()) return;  // dropped in this very round
    peer = found->second.get();
  }
  // Only the lane pops and only the lane drops, so the peer stays while we are here.
  ipc::Channel& channel = peer->channel;
  if (peer->expelled) {
    if (channel.peer_closed()) drop(id);
    return;
  }
  channel.disarm();
  do {
    if (!hear(*peer)) return expel(id);
  } while (!channel.arm_sleep());
  if (socket_event && channel.peer_gone()) expel(id);
}

// Takes all that has come from the peer. False: it broke the protocol.
bool NodeServer::hear(Peer& peer) {
  std::vector<std::byte> record;
  ipc::PopResult popped = ipc::PopResult::kEmpty;
  while ((popped = peer.channel.pop(record)) == ipc::PopResult::kRecord) {
    if (peer.agent != 0) hear_client_of(peer.agent);
    if (!apply(peer, record)) return false;
  }
  if (popped != ipc::PopResult::kCorrupt) return true;
  log_error("process " + std::to_string(peer.channel.peer_pid()) + " broke the ring format; expelled");
  return false;
}

// What an engine's client said before a rank reported is heard before the report. A client that cancels a save, and
// then lets its engine overwrite what the save reads, relies on it; also one that hung up as it could not say so.
void NodeServer::hear_client_of(node::AgentHandle agent) {
  std::uint64_t id = 0;
  Peer* client = nullptr;
  {
    MutexLock lock(mutex_);
    const auto found = clients_.find(node_.engine_of(agent));
    if (found == clients_.end()) return;
    client = found->second;
    id = client->id;
  }
  if (!hear(*client) || client->channel.peer_gone()) expel(id);
}

bool NodeServer::apply(Peer& peer, std::span<const std::byte> record) {
  const auto malformed = [&](const Error& error) {
    log_error("process " + std::to_string(peer.channel.peer_pid()) + ": " + error.message + "; expelled");
    return false;
  };
  if (peer.agent != 0) {
    const auto report = proto::decode_job_report(record);
    if (!report) return malformed(report.error());
    MutexLock lock(mutex_);
    node_.on_report(peer.agent, report.value(), monotonic_now());
    return true;
  }
  const auto message = proto::decode_from_client(record);
  if (!message) return malformed(message.error());
  MutexLock lock(mutex_);
  const Nanos now = monotonic_now();
  if (const auto* lookup = std::get_if<proto::LookupRequest>(&message.value())) {
    const auto found = node_.lookup(peer.engine, *lookup, now);
    const proto::LookupReply reply{lookup->request,   found.matched_blocks, found.reason,
                                   found.disk_blocks, found.host_blocks,    found.described_blocks};
    return peer.channel.send(proto::encode(proto::ToClient{reply}));
  }
  if (std::holds_alternative<proto::ChangesRequest>(message.value())) {
    node_.follow();
    peer.wants_changes = true;
    tell_changes(peer);
  } else {
    (void)take(peer.engine, message.value(), now);
  }
  return true;
}

proto::Reason NodeServer::take(node::EngineHandle engine, const proto::FromClient& message, Nanos now) {
  if (const auto* transfer = std::get_if<proto::TransferRequest>(&message)) {
    return transfer->save ? node_.save(engine, *transfer, now) : node_.load(engine, *transfer, now);
  }
  if (const auto* prefetch = std::get_if<proto::PrefetchRequest>(&message)) {
    return node_.prefetch(engine, *prefetch, now);
  }
  if (const auto* speed = std::get_if<proto::PrefillSpeed>(&message)) {
    node_.set_prefill(engine, speed->time);
  } else if (const auto* closed = std::get_if<proto::CloseSequence>(&message)) {
    node_.close_sequence(engine, closed->sequence);
  } else if (const auto* cancel = std::get_if<proto::CancelRequest>(&message)) {
    node_.cancel(engine, cancel->job);
  } else if (const auto* commit = std::get_if<proto::CommitRequest>(&message)) {
    node_.commit(engine, commit->job, now);
  } else if (const auto* described = std::get_if<proto::DescribeRequest>(&message)) {
    node_.describe(engine, *described);
  } else if (std::holds_alternative<proto::ResetRequest>(message)) {
    node_.reset(engine, now);
  }
  return proto::Reason::kNone;
}

// Ends the conversation with a peer that has ended it, or broke the protocol. An agent's lanes may still be copying, so
// the host blocks of its jobs stay taken until it closes its socket, which it does when they are quiet, or dies.
void NodeServer::expel(std::uint64_t id) {
  {
    MutexLock lock(mutex_);
    const auto found = peers_.find(id);
    if (found == peers_.end()) return;
    Peer& peer = *found->second;
    if (peer.agent != 0 && !peer.channel.peer_closed()) {
      peer.expelled = true;
      agents_.erase(peer.agent);
      (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.channel.wake_fd(), nullptr);
      peer.channel.hang_up();
      return;
    }
  }
  drop(id);
}

void NodeServer::drop(std::uint64_t id) {
  MutexLock lock(mutex_);
  const auto found = peers_.find(id);
  if (found == peers_.end()) return;
  Peer& peer = *found->second;
  for (const int fd : {peer.channel.wake_fd(), peer.channel.socket_fd(), peer.process.get()}) {
    (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  }
  if (peer.agent != 0) {
    agents_.erase(peer.agent);
    node_.detach_agent(peer.agent, monotonic_now());
  }
  if (peer.engine != 0) {
    clients_.erase(peer.engine);
    node_.detach_client(peer.engine);
  }
  log_info("process " + std::to_string(peer.channel.peer_pid()) + " detached");
  peers_.erase(found);
}

}  // namespace flexkv::server
