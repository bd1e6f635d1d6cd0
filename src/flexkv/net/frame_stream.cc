#include "flexkv/net/frame_stream.h"

#include <sys/epoll.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace flexkv::net {
namespace {

static_assert(std::endian::native == std::endian::little && sizeof(FrameHead) == 16,
              "a head travels as it lies in memory");

// What has been sent is moved out of the queue when it is this much, not with each write.
constexpr std::size_t kCompactBytes = 256U << 10;
// From this size on a body is not copied when it need not be. A record of TLS holds kRecordBytes.
constexpr std::size_t kDirectBytesMin = 32U << 10;
constexpr std::size_t kRecordBytes = 16U << 10;

}  // namespace

bool FrameStream::send(std::uint32_t kind, std::uint64_t id, std::initializer_list<std::span<const std::byte>> body) {
  if (!has_room()) return false;
  std::size_t bytes = 0;
  for (const auto part : body) bytes += part.size();
  FLEXKV_ASSERT(bytes <= kFrameBytesMax);
  const FrameHead head{static_cast<std::uint32_t>(bytes), kind, id};
  const auto raw = std::as_bytes(std::span(&head, 1));
  const auto enqueue = [&](std::span<const std::byte> part) { queue_.insert(queue_.end(), part.begin(), part.end()); };
  const bool direct = !stuck_ && state_ == State::kOpen && bytes >= kDirectBytesMin;
  enqueue(raw);
  for (auto part : body) {
    if (direct && !part.empty()) {
      // One record of what waits, the head and as much of the body as fits; the whole records that come behind are
      // encrypted where they lie, and the end waits for what is to share a record with it.
      const std::size_t waiting = queue_.size() - sent_;
      const std::size_t first = idle() ? 0 : std::min(part.size(), kRecordBytes - std::min(waiting, kRecordBytes));
      enqueue(part.first(first));
      part = part.subspan(first);
      flush();
      if (idle()) part = part.subspan(write(part.first(part.size() / kRecordBytes * kRecordBytes)));
    }
    enqueue(part);
  }
  return true;
}

// As much as goes now of `bytes`, which are what comes next.
std::size_t FrameStream::write(std::span<const std::byte> bytes) {
  std::size_t written = 0;
  while (state_ == State::kOpen && written < bytes.size()) {
    const auto [step, now] = stream_.write(bytes.subspan(written));
    write_waits_for_read_ = step == TlsStream::Step::kWantRead;
    if (!settled(step)) break;
    written += now;
  }
  stuck_ = written < bytes.size();
  return written;
}

FrameStream::State FrameStream::fail(std::string why) {
  why_ = std::move(why);
  return state_ = State::kFailed;
}

bool FrameStream::settled(TlsStream::Step step) {
  if (step == TlsStream::Step::kFailed) fail(stream_.peer() + ": " + stream_.why());
  if (step == TlsStream::Step::kClosed) {
    const bool between = head_size_ == 0 && !head_;
    state_ = between ? State::kClosed : fail(stream_.peer() + ": the connection ended within a frame");
  }
  return step == TlsStream::Step::kDone;
}

FrameStream::State FrameStream::pump(FrameSink& sink, std::size_t budget) {
  more_ = false;
  if (state_ == State::kConnecting) {
    const TlsStream::Step step = stream_.handshake();
    handshake_wants_write_ = step == TlsStream::Step::kWantWrite;
    if (settled(step)) state_ = State::kOpen;
  }
  if (state_ == State::kOpen) flush();
  if (state_ == State::kOpen) receive(sink, budget);
  if (state_ == State::kOpen) flush();
  return state_;
}

void FrameStream::flush() {
  write_waits_for_read_ = false;
  sent_ += write(std::span(queue_).subspan(sent_));
  if (idle() || sent_ >= kCompactBytes) {
    queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(sent_));
    sent_ = 0;
  }
}

bool FrameStream::begin_body(FrameSink& sink) {
  FrameHead head;
  std::memcpy(&head, head_bytes_.data(), sizeof head);
  head_size_ = 0;
  if (head.bytes > kFrameBytesMax) {
    fail(stream_.peer() + ": a frame of " + std::to_string(head.bytes) + " bytes, more than the protocol has");
    return false;
  }
  auto room = sink.on_head(head);
  if (!room.ok()) {
    fail(stream_.peer() + ": " + room.error().message);
    return false;
  }
  FLEXKV_ASSERT(room.value().size() == head.bytes);
  head_ = head;
  body_ = room.value();
  return true;
}

void FrameStream::divert(std::span<std::byte> scratch) {
  FLEXKV_ASSERT(head_ && scratch.size() >= body_.size());
  body_ = scratch.first(body_.size());
}

void FrameStream::receive(FrameSink& sink, std::size_t budget) {
  read_waits_for_write_ = false;
  std::size_t received = 0;
  while (true) {
    if (head_ && body_.empty()) {
      const FrameHead head = *std::exchange(head_, std::nullopt);
      const Status taken = sink.on_frame(head);
      if (!taken.ok()) {
        fail(stream_.peer() + ": " + taken.error().message);
        return;
      }
      if (state_ != State::kOpen) return;  // it has sent
      continue;
    }
    if (received >= budget) {
      more_ = true;
      return;
    }
    const std::span<std::byte> into = head_ ? body_ : std::span(head_bytes_).subspan(head_size_);
    const auto [step, bytes] = stream_.read(into);
    read_waits_for_write_ = step == TlsStream::Step::kWantWrite;
    if (!settled(step)) return;
    received += bytes;
    if (head_) {
      body_ = body_.subspan(bytes);
    } else if ((head_size_ += bytes) == head_bytes_.size() && !begin_body(sink)) {
      return;
    }
  }
}

std::uint32_t FrameStream::events() const {
  if (state_ == State::kConnecting) return handshake_wants_write_ ? EPOLLOUT : EPOLLIN;
  const bool to_write = !idle() && !write_waits_for_read_;
  return EPOLLIN | (to_write || read_waits_for_write_ ? static_cast<std::uint32_t>(EPOLLOUT) : 0U);
}

}  // namespace flexkv::net
