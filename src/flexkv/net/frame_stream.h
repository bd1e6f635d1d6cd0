// Frames on a TLS connection: a head of 16 bytes, then so many bytes of a body, which are put where the receiver wants
// them. Thread-compatible; never blocks.
// Bounds: bodies up to kFrameBytesMax; what waits to be sent up to kQueuedBytesMax and one frame.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/net/tls.h"

namespace flexkv::net {

constexpr std::uint32_t kFrameBytesMax = 1U << 20;
constexpr std::size_t kQueuedBytesMax = 2U << 20;

struct FrameHead {
  std::uint32_t bytes = 0;  // of the body
  std::uint32_t kind = 0;
  std::uint64_t id = 0;

  friend bool operator==(const FrameHead&, const FrameHead&) = default;
};

class FrameSink {
 public:
  virtual ~FrameSink() = default;
  // Room for the body, head.bytes of it, untouched by others until on_frame() or until the stream is gone; an error
  // ends the connection. Not called for bodies of more than kFrameBytesMax, which are refused.
  virtual Result<std::span<std::byte>> on_head(const FrameHead& head) = 0;
  // The body is there. An error ends the connection. May send on the stream, not destroy it.
  virtual Status on_frame(const FrameHead& head) = 0;
};

class FrameStream {
 public:
  explicit FrameStream(TlsStream stream) : stream_(std::move(stream)) {}

  // Sends what goes at once of a long frame, and of what waits before it, and copies the rest into the queue; short
  // ones wait for the next frame, pump() or flush(). False: the queue is full, and pump() has to make room first. May
  // fail the stream. REQUIRES: at most kFrameBytesMax bytes
  bool send(std::uint32_t kind, std::uint64_t id, std::initializer_list<std::span<const std::byte>> body);
  bool has_room() const { return queue_.size() - sent_ < kQueuedBytesMax; }
  bool idle() const { return queue_.size() == sent_; }
  // The socket did not take all that it was offered: what is sent now is copied.
  bool stuck() const { return stuck_; }

  enum class State {
    kConnecting,  // or shaking hands
    kOpen,
    kClosed,  // by the peer, between two frames
    kFailed,  // why() says what
  };
  // Sends and receives what goes without waiting, up to about `budget` bytes received. Call again when the socket has
  // one of events(), or at once when more() says that bytes are there already.
  State pump(FrameSink& sink, std::size_t budget);
  bool more() const { return more_; }
  // Sends what goes without waiting. REQUIRES: state() is kOpen
  void flush();
  std::uint32_t events() const;  // for epoll
  State state() const { return state_; }

  // The rest of the body that is being received goes to `scratch` instead: its room is the caller's again at once.
  // REQUIRES: a body is being received, and scratch is as long as it.
  void divert(std::span<std::byte> scratch);

  void close() { stream_.say_goodbye(); }

  int fd() const { return stream_.fd(); }
  const std::string& peer() const { return stream_.peer(); }
  const std::string& why() const { return why_; }

 private:
  State fail(std::string why);
  bool settled(TlsStream::Step step);  // false: nothing more goes now
  std::size_t write(std::span<const std::byte> bytes);
  void receive(FrameSink& sink, std::size_t budget);
  bool begin_body(FrameSink& sink);

  TlsStream stream_;
  State state_ = State::kConnecting;
  std::string why_;
  std::vector<std::byte> queue_;
  std::size_t sent_ = 0;  // of the queue
  bool stuck_ = false;
  bool write_waits_for_read_ = false;
  bool read_waits_for_write_ = false;
  bool handshake_wants_write_ = true;  // a client's socket becomes writable when it is connected
  bool more_ = false;

  std::array<std::byte, 16> head_bytes_{};
  std::size_t head_size_ = 0;  // received of it
  std::optional<FrameHead> head_;
  std::span<std::byte> body_;  // what is missing of it
};

}  // namespace flexkv::net
