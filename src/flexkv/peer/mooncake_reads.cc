#include "flexkv/peer/mooncake_reads.h"

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/ipc/ring.h"

namespace flexkv::peer {
namespace {

// What the two say to each other, one frame each; python/flexkv/mooncake/reader.py has the same.
struct OrderFrame {
  std::uint64_t id;
  std::uint64_t address;  // of the bytes, at the owner
  std::uint64_t word_address;
  std::uint64_t landing_offset;
  std::uint64_t word_landing_offset;
  std::uint64_t bytes;
  std::array<char, kMooncakeNameMax + 1> owner;  // ends with a zero
};
static_assert(sizeof(OrderFrame) == 304);

constexpr int kFramesAtOnce = 64;

enum class Said : std::uint64_t { kReady = 1, kEnded, kAlive, kTrouble };
struct AnswerFrame {
  std::uint64_t kind;
  std::uint64_t first;                          // kReady: address of the pool; kEnded: id of the order
  std::uint64_t second;                         // kReady: address of the words; kEnded: 1 if it was read
  std::array<char, kMooncakeNameMax + 1> text;  // kReady: the engine's name; kTrouble: what is wrong
};
static_assert(sizeof(AnswerFrame) == 280);

// A descriptor of the same memory by which it cannot be mapped for writing.
Result<Fd> read_only(int fd) {
  Fd again(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDONLY | O_CLOEXEC));
  if (!again.valid()) return errno_error("open memory for reading only", errno);
  return again;
}

Error broken(const std::string& how) {
  return {ErrorCode::kPeer, "Mooncake's process broke the protocol with this node: " + how};
}

std::string text_of(const std::array<char, kMooncakeNameMax + 1>& text) {
  return {text.data(), ::strnlen(text.data(), text.size())};
}

std::string name_in(const Window& window) {
  return {reinterpret_cast<const char*>(window.metadata.data()), window.metadata.size()};
}

std::span<std::uint64_t> as_words(const memory::HostRegion& memory) {
  return {reinterpret_cast<std::uint64_t*>(memory.data()), kLeasesByThemselves};
}

}  // namespace

bool is_mooncake_name(std::string_view name) {
  const auto colon = name.rfind(':');
  if (name.size() > kMooncakeNameMax || colon == std::string_view::npos || colon == 0) return false;
  const bool host = std::ranges::all_of(name.substr(0, colon), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '-' ||
           c == '_' || c == ':' || c == '[' || c == ']';
  });
  std::uint16_t port = 0;
  const char* const end = name.data() + name.size();
  const auto [parsed, error] = std::from_chars(name.data() + colon + 1, end, port);
  return host && error == std::errc() && parsed == end && port > 0;
}

Result<std::unique_ptr<MooncakeReads>> MooncakeReads::start(std::vector<std::string> helper, const std::string& host,
                                                            const memory::HostRegion& pool) {
  FLEXKV_ASSERT(!helper.empty());
  memory::HostRegion::Options options;
  options.huge_pages = false;
  auto words = memory::HostRegion::create(kLeasesByThemselves * sizeof(std::uint64_t), options);
  if (!words.ok()) return words.error();
  auto wake = ipc::make_eventfd();
  if (!wake.ok()) return wake.error();
  helper.push_back(host);
  std::unique_ptr<MooncakeReads> reads(
      new MooncakeReads(std::move(helper), pool, std::move(words).value(), std::move(wake).value()));
  reads->thread_ = start_thread([raw = reads.get()] { raw->run(); });
  return reads;
}

MooncakeReads::MooncakeReads(std::vector<std::string> helper, const memory::HostRegion& pool, memory::HostRegion words,
                             Fd wake)
    : command_(std::move(helper)),
      pool_(pool),
      words_memory_(std::move(words)),
      words_(as_words(words_memory_)),
      wake_(std::move(wake)) {}

bool MooncakeReads::end() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  ipc::ring_eventfd(wake_.get());
  if (thread_.joinable()) thread_.join();
  return true;
}

std::shared_ptr<const Window> MooncakeReads::window() const {
  const std::lock_guard lock(mutex_);
  return window_;
}

std::string MooncakeReads::trouble() const {
  const std::lock_guard lock(mutex_);
  return trouble_;
}

pid_t MooncakeReads::helper_pid() const {
  const std::lock_guard lock(mutex_);
  return helper_pid_;
}

bool MooncakeReads::fetch(const std::string&, const Window& window, const Piece& piece,
                          std::function<void(Fetched)> done) {
  {
    const std::lock_guard lock(mutex_);
    if (landing_ == nullptr) return false;
    const auto landing_piece = landing_->take();
    if (!landing_piece) return false;
    ordered_.push_back({name_in(window), piece, std::move(done), landing_, *landing_piece});
  }
  ipc::ring_eventfd(wake_.get());
  return true;
}

bool MooncakeReads::stopping() const {
  const std::lock_guard lock(mutex_);
  return stop_;
}

void MooncakeReads::run() {
  while (!stopping()) {
    if (!helper_ && monotonic_now() >= start_at_) {
      if (const auto begun = begin_helper(); !begun.ok()) end_helper(begun.error().message);
    }
    wait(helper_ ? deadline() : start_at_);
    if (stopping()) break;
    if (!helper_) continue;
    auto going_on = tell();
    if (going_on.ok()) going_on = hear();
    if (!going_on.ok()) {
      end_helper(going_on.error().message);
    } else if (const auto until = deadline(); until && monotonic_now() >= *until) {
      end_helper(helper_->ready ? "Mooncake's process hangs" : "Mooncake's process does not become ready");
    }
  }
  helper_.reset();
}

void MooncakeReads::wait(std::optional<Nanos> until) {
  const Nanos left = until ? std::max<Nanos>(*until - monotonic_now(), 0) : 0;
  const timespec timeout{.tv_sec = left / kSecond, .tv_nsec = left % kSecond};
  std::array<pollfd, 2> fds{{{.fd = wake_.get(), .events = POLLIN, .revents = 0},
                             {.fd = helper_ ? helper_->process.socket().fd() : -1, .events = POLLIN, .revents = 0}}};
  (void)::ppoll(fds.data(), fds.size(), until ? &timeout : nullptr, nullptr);
  ipc::drain_eventfd(wake_.get());
}

// When this thread is to do something though nothing happens; none: never, while the process is ready and idle.
std::optional<Nanos> MooncakeReads::deadline() const {
  if (!helper_) return std::nullopt;
  if (!helper_->ready) return helper_->heard + kMooncakeStartTime;
  if (!helper_->under_way.empty()) return helper_->heard + kMooncakeSilence;
  return std::nullopt;
}

Result<> MooncakeReads::begin_helper() {
  const auto pool = read_only(pool_.fd());
  if (!pool.ok()) return pool.error();
  const auto words = read_only(words_memory_.fd());
  if (!words.ok()) return words.error();
  auto landing = Landing::create();
  if (!landing.ok()) return landing.error();
  const std::array fds{pool.value().get(), words.value().get(), landing.value()->memory().fd()};
  auto process = ipc::HelperProcess::start(command_, fds);
  if (!process.ok()) return process.error();
  helper_.emplace(std::move(process).value(), std::move(landing).value(), monotonic_now());
  return {};
}

Result<> MooncakeReads::tell() {
  std::deque<Order> ordered;
  {
    const std::lock_guard lock(mutex_);
    ordered.swap(ordered_);
  }
  if (!ordered.empty() && helper_->under_way.empty()) helper_->heard = monotonic_now();
  Result<> told;
  for (Order& order : ordered) {
    const std::uint64_t id = ++last_id_;
    Order& kept = helper_->under_way.emplace(id, std::move(order)).first->second;
    if (!told.ok()) continue;
    if (!is_mooncake_name(kept.owner)) {
      told = take_end(id, false);
      continue;
    }
    OrderFrame frame{};
    frame.id = id;
    frame.address = kept.piece.address;
    frame.word_address = kept.piece.word_address;
    frame.landing_offset = Landing::offset(kept.landing_piece);
    frame.word_landing_offset = Landing::word_offset(kept.landing_piece);
    frame.bytes = kept.piece.bytes;
    std::ranges::copy(kept.owner, frame.owner.begin());
    const auto sent = helper_->process.socket().send(std::as_bytes(std::span(&frame, 1)));
    if (!sent.ok()) {
      told = sent.error();
    } else if (sent.value() != ipc::SendOutcome::kSent) {  // it has room for more orders than there are pieces
      told = Error{ErrorCode::kPeer, "Mooncake's process takes no orders"};
    }
  }
  return told;
}

Result<> MooncakeReads::hear() {
  ipc::Frame frame;
  // So many in a row: one that never stops talking does not keep this thread from its deadlines.
  for (int i = 0; i < kFramesAtOnce; ++i) {
    const auto got = helper_->process.socket().recv(frame);
    if (!got.ok()) return got.error();
    if (got.value() == ipc::RecvOutcome::kWouldBlock) return {};
    if (got.value() == ipc::RecvOutcome::kClosed) return Error{ErrorCode::kPeer, "Mooncake's process has ended"};
    if (auto taken = take_answer(frame.bytes); !taken.ok()) return taken;
  }
  return {};
}

Result<> MooncakeReads::take_answer(std::span<const std::byte> frame) {
  AnswerFrame answer;
  if (frame.size() != sizeof(answer)) return broken("a frame of " + std::to_string(frame.size()) + " bytes");
  std::memcpy(&answer, frame.data(), sizeof(answer));
  helper_->heard = monotonic_now();
  switch (static_cast<Said>(answer.kind)) {
    case Said::kReady: {
      const std::string name = text_of(answer.text);
      if (helper_->ready || !is_mooncake_name(name)) return broken("ready as \"" + name + '"');
      helper_->ready = true;
      auto window = std::make_shared<Window>();
      window->transport = Transport::kMooncake;
      window->metadata.resize(name.size());
      std::memcpy(window->metadata.data(), name.data(), name.size());
      window->pool = answer.first;
      window->pool_bytes = pool_.bytes();
      window->words = answer.second;
      window->word_count = kLeasesByThemselves;
      const std::lock_guard lock(mutex_);
      window_ = std::move(window);
      landing_ = helper_->landing;
      helper_pid_ = helper_->process.pid();
      trouble_.clear();
      return {};
    }
    case Said::kEnded:
      return take_end(answer.first, answer.second == 1);
    case Said::kAlive:
      return {};
    case Said::kTrouble:
      return Error{ErrorCode::kUnsupported, text_of(answer.text)};
  }
  return broken("a frame of kind " + std::to_string(answer.kind));
}

Result<> MooncakeReads::take_end(std::uint64_t id, bool ok) {
  auto node = helper_->under_way.extract(id);
  if (node.empty()) return broken("the end of a read that was not ordered");
  Order& order = node.mapped();
  if (ok) rest_ = kMooncakeRestMin;  // so it serves, which that it was ready does not show
  order.done(Landing::fetched(order.landing, order.landing_piece, order.piece.bytes, ok));
  return {};
}

void MooncakeReads::end_helper(const std::string& why) {
  std::deque<Order> failed;
  {
    const std::lock_guard lock(mutex_);
    window_ = nullptr;
    landing_ = nullptr;
    helper_pid_ = 0;
    trouble_ = why;
    failed.swap(ordered_);
  }
  log_warning("one-sided reads: " + why + "; blocks come as bytes, and it is started again in " +
              std::to_string(rest_ / kSecond) + " s");
  start_at_ = monotonic_now() + rest_;
  rest_ = std::min(rest_ * 2, kMooncakeRestMax);
  if (helper_) {
    for (auto& [id, order] : helper_->under_way) failed.push_back(std::move(order));
    helper_.reset();
  }
  for (Order& order : failed) order.done(Fetched{});
}

}  // namespace flexkv::peer
