#include "flexkv/remote/mooncake_process.h"

#include <poll.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "flexkv/base/assert.h"
#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"

namespace flexkv::remote {
namespace {

constexpr int kFramesAtOnce = 64;

enum class Said : std::uint64_t { kReady = 1, kEnded, kAlive, kTrouble };
enum class How : std::uint64_t { kDone, kMissing, kShort, kFailed };
struct AnswerFrame {
  std::uint64_t kind;
  std::uint64_t id;  // of kEnded, as all that follows
  std::uint64_t how;
  std::uint64_t bytes;
  std::uint64_t more;
  std::array<char, kMooncakeTextMax + 1> text;  // why it failed; kTrouble: what is wrong
};
static_assert(sizeof(AnswerFrame) == 296);

Error broken(const std::string& how) {
  return {ErrorCode::kPeer, "Mooncake's process broke the protocol with this node: " + how};
}

std::string text_of(const AnswerFrame& frame) {
  return {frame.text.data(), ::strnlen(frame.text.data(), kMooncakeTextMax)};
}

std::optional<StoreOutcome> outcome_of(std::uint64_t how) {
  switch (static_cast<How>(how)) {
    case How::kDone:
      return StoreOutcome::kDone;
    case How::kMissing:
      return StoreOutcome::kMissing;
    case How::kShort:
      return StoreOutcome::kShort;
    case How::kFailed:
      return StoreOutcome::kFailed;
  }
  return std::nullopt;
}

}  // namespace

Result<std::unique_ptr<MooncakeProcess>> MooncakeProcess::start(std::vector<std::string> command) {
  FLEXKV_ASSERT(!command.empty());
  auto memory = MooncakeMemory::create();
  if (!memory.ok()) return memory.error();
  auto wake = ipc::make_eventfd();
  if (!wake.ok()) return wake.error();
  std::unique_ptr<MooncakeProcess> process(
      new MooncakeProcess(std::move(command), std::move(memory).value(), std::move(wake).value()));
  process->thread_ = start_thread([raw = process.get()] { raw->run(); });
  pthread_setname_np(process->thread_.native_handle(), "flexkv-mooncake");
  return process;
}

MooncakeProcess::MooncakeProcess(std::vector<std::string> command, std::unique_ptr<MooncakeMemory> memory, Fd wake)
    : command_(std::move(command)), wake_(std::move(wake)), memory_(std::move(memory)) {}

MooncakeProcess::~MooncakeProcess() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  ipc::ring_eventfd(wake_.get());
  if (thread_.joinable()) thread_.join();
}

// ---- the lane ------------------------------------------------------------------------------------------------------

std::shared_ptr<MooncakeMemory> MooncakeProcess::memory() const {
  const std::lock_guard lock(mutex_);
  return memory_;
}

std::string MooncakeProcess::trouble() const {
  const std::lock_guard lock(mutex_);
  return trouble_;
}

pid_t MooncakeProcess::pid() const {
  const std::lock_guard lock(mutex_);
  return pid_;
}

void MooncakeProcess::order(const MooncakeOrder& order, std::shared_ptr<MooncakeMemory> memory) {
  {
    const std::lock_guard lock(mutex_);
    if (memory != memory_) {
      answers_.push_back({order.id, StoreOutcome::kFailed, 0, false, trouble_});
      return;  // whoever orders waits next
    }
    ordered_.push_back({order, std::move(memory)});
  }
  ipc::ring_eventfd(wake_.get());
}

void MooncakeProcess::wait(std::optional<Nanos> until, std::vector<Answer>& answers) {
  std::unique_lock lock(mutex_);
  const auto wanted = [&] { return woken_ || !answers_.empty(); };
  if (until) {
    const Nanos left = std::max<Nanos>(*until - monotonic_now(), 0);
    answered_.wait_for(lock, std::chrono::nanoseconds(left), wanted);
  } else {
    answered_.wait(lock, wanted);
  }
  woken_ = false;
  answers.swap(answers_);
}

void MooncakeProcess::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  answered_.notify_all();
}

// ---- the thread ----------------------------------------------------------------------------------------------------

bool MooncakeProcess::stopping() const {
  const std::lock_guard lock(mutex_);
  return stop_;
}

void MooncakeProcess::run() {
  while (!stopping()) {
    if (!helper_ && monotonic_now() >= start_at_) {
      if (const auto begun = begin_helper(); !begun.ok()) end_helper(begun.error().message);
    }
    sleep(helper_ ? deadline() : start_at_);
    if (stopping()) break;
    if (!helper_) continue;
    auto going_on = tell();
    if (going_on.ok()) going_on = hear();
    const auto until = deadline();
    if (!going_on.ok()) {
      end_helper(going_on.error().message);
    } else if (until && monotonic_now() >= *until) {
      end_helper(helper_->ready ? "Mooncake's process hangs" : "Mooncake's process does not become ready");
    }
  }
  helper_.reset();
}

void MooncakeProcess::sleep(std::optional<Nanos> until) {
  const Nanos left = until ? std::max<Nanos>(*until - monotonic_now(), 0) : 0;
  const timespec timeout{.tv_sec = left / kSecond, .tv_nsec = left % kSecond};
  std::array<pollfd, 2> fds{{{.fd = wake_.get(), .events = POLLIN, .revents = 0},
                             {.fd = helper_ ? helper_->process.socket().fd() : -1, .events = POLLIN, .revents = 0}}};
  (void)::ppoll(fds.data(), fds.size(), until ? &timeout : nullptr, nullptr);
  ipc::drain_eventfd(wake_.get());
}

// When this thread is to do something though nothing happens; none: never, while the process is ready and idle.
std::optional<Nanos> MooncakeProcess::deadline() const {
  if (!helper_) return std::nullopt;
  if (!helper_->ready) return helper_->heard + kMooncakeStartTime;
  if (helper_->under_way.empty()) return std::nullopt;
  Nanos until = helper_->heard + kMooncakeSilence;
  for (const auto& [id, since] : helper_->under_way) until = std::min(until, since + kMooncakeCallTime);
  return until;
}

Result<> MooncakeProcess::begin_helper() {
  std::shared_ptr<MooncakeMemory> memory = this->memory();
  if (memory == nullptr) {
    auto created = MooncakeMemory::create();
    if (!created.ok()) return created.error();
    memory = std::move(created).value();
  }
  const std::array fds{memory->fd()};
  auto process = ipc::HelperProcess::start(command_, fds);
  if (!process.ok()) return process.error();
  helper_.emplace(std::move(process).value(), memory, monotonic_now());
  const std::lock_guard lock(mutex_);
  memory_ = std::move(memory);
  return {};
}

// Not before it is ready: until then all that was ordered waits here.
Result<> MooncakeProcess::tell() {
  if (!helper_->ready) return {};
  std::deque<Ordered> ordered;
  {
    const std::lock_guard lock(mutex_);
    ordered.swap(ordered_);
  }
  const Nanos now = monotonic_now();
  if (!ordered.empty() && helper_->under_way.empty()) helper_->heard = now;
  Result<> told;
  for (const Ordered& one : ordered) {
    helper_->under_way.emplace(one.order.id, now);
    if (!told.ok()) continue;
    const auto sent = helper_->process.socket().send(std::as_bytes(std::span(&one.order, 1)));
    if (!sent.ok()) {
      told = sent.error();
    } else if (sent.value() != ipc::SendOutcome::kSent) {  // it has room for more orders than there are pieces
      told = Error{ErrorCode::kPeer, "Mooncake's process takes no orders"};
    }
  }
  return told;
}

Result<> MooncakeProcess::hear() {
  ipc::Frame frame;
  // So many in a row: one that never stops talking does not keep this thread from its deadlines.
  for (int i = 0; i < kFramesAtOnce; ++i) {
    const auto got = helper_->process.socket().recv(frame);
    if (!got.ok()) return got.error();
    if (got.value() == ipc::RecvOutcome::kWouldBlock) break;
    if (got.value() == ipc::RecvOutcome::kClosed) return Error{ErrorCode::kPeer, "Mooncake's process has ended"};
    if (auto taken = take(frame.bytes); !taken.ok()) return taken;
  }
  return tell();  // it may have become ready
}

Result<> MooncakeProcess::take(std::span<const std::byte> frame) {
  AnswerFrame said;
  if (frame.size() != sizeof(said)) return broken("a frame of " + std::to_string(frame.size()) + " bytes");
  std::memcpy(&said, frame.data(), sizeof(said));
  if (helper_->ready) helper_->heard = monotonic_now();
  switch (static_cast<Said>(said.kind)) {
    case Said::kReady: {
      if (std::exchange(helper_->ready, true)) return broken("ready twice");
      helper_->heard = monotonic_now();
      const std::lock_guard lock(mutex_);
      pid_ = helper_->process.pid();
      trouble_.clear();
      return {};
    }
    case Said::kEnded: {
      const auto outcome = outcome_of(said.how);
      if (!outcome || helper_->under_way.erase(said.id) == 0) return broken("the end of what was not ordered");
      if (*outcome != StoreOutcome::kFailed) rest_ = kMooncakeRestMin;
      answer({said.id, *outcome, said.bytes, said.more == 1, text_of(said)});
      return {};
    }
    case Said::kAlive:
      return {};
    case Said::kTrouble:
      return Error{ErrorCode::kUnsupported, text_of(said)};
  }
  return broken("a frame of kind " + std::to_string(said.kind));
}

void MooncakeProcess::answer(Answer one) {
  {
    const std::lock_guard lock(mutex_);
    answers_.push_back(std::move(one));
  }
  answered_.notify_all();
}

void MooncakeProcess::end_helper(const std::string& why) {
  std::deque<Ordered> ordered;
  {
    const std::lock_guard lock(mutex_);
    memory_ = nullptr;
    pid_ = 0;
    trouble_ = why;
    ordered.swap(ordered_);
  }
  log_warning("remote tier: " + why +
              "; nothing is read from or written to Mooncake Store, and its process is started again in " +
              std::to_string(rest_ / kSecond) + " s");
  start_at_ = monotonic_now() + rest_;
  rest_ = std::min(rest_ * 2, kMooncakeRestMax);
  if (helper_) {
    for (const auto& [id, since] : helper_->under_way) answer({id, StoreOutcome::kFailed, 0, false, why});
    helper_.reset();
  }
  for (const Ordered& one : ordered) answer({one.order.id, StoreOutcome::kFailed, 0, false, why});
}

}  // namespace flexkv::remote
