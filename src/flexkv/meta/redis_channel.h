// One connection to Redis (5.0 or later) over hiredis, on which one request is under way at a time. It connects, gives
// its password, and after a failure tries again by itself, later and later. Never blocks, but for the system's resolver
// when `host` is a name.
//
// Owned and driven by one thread: poll fd() for events() until wakeup(), then call step(). Every request ends with an
// answer or an error within `answer_within` and the time that it waits in the store by its own wish; then the
// connection is given up, too, as nobody knows where it stands. No TLS: hiredis 0.14 has none; a local tunnel does it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "flexkv/meta/backoff.h"
#include "flexkv/meta/request.h"

struct redisContext;
struct redisReply;

namespace flexkv::meta {

struct RedisOptions {
  std::string host = "127.0.0.1";  // a path is a UNIX socket
  int port = 6379;
  std::string password;  // empty: none. Never in a log line or an error
  Nanos connect_within = 2 * kSecond;
  Nanos answer_within = 2 * kSecond;
  Nanos retry_after = 100 * kMillisecond;  // doubles up to:
  Nanos retry_after_max = 4 * kSecond;
  std::uint64_t answer_bytes_max = 256U << 20;  // a request that is answered with more has failed
};

class RedisChannel {
 public:
  // `seed` of the random part of waiting times.
  RedisChannel(RedisOptions options, std::uint64_t seed);
  ~RedisChannel();
  RedisChannel(const RedisChannel&) = delete;
  RedisChannel& operator=(const RedisChannel&) = delete;

  int fd() const;        // -1: there is nothing to poll
  short events() const;  // of poll()
  Nanos wakeup() const;  // when step() is due at the latest
  // Does whatever can be done. Waits only for the host's name, RedisOptions::connect_within at most.
  void step(Nanos now);

  // Connected, and no request is under way.
  bool ready() const { return state_ == State::kReady; }
  // REQUIRES: ready()
  void submit(const Request& request, Nanos now);
  // Of the request under way, once. The error says what failed and where.
  std::optional<Result<Answers>> take_answer();
  // Why there is no connection; empty while there is one, and before the first try has ended.
  const std::string& trouble() const { return trouble_; }

 private:
  enum class State : std::uint8_t { kWaiting, kConnecting, kGreeting, kReady, kBusy };
  struct FreeContext {
    void operator()(redisContext* context) const;
  };

  using Context = std::unique_ptr<redisContext, FreeContext>;

  void connect(Nanos now);
  Status connect_by_name();
  void greet(Nanos now);
  void fail(ErrorCode code, const std::string& why, Nanos now);
  void write_some(Nanos now);
  void read_some(Nanos now);
  void take_reply(const redisReply& reply, Nanos now);
  void greeted(const redisReply& reply, Nanos now);
  std::string where() const;

  const RedisOptions options_;
  Backoff backoff_;
  State state_ = State::kWaiting;
  Context context_;
  std::weak_ptr<void> look_up_;  // of the host's name, while one is under way
  std::string out_;
  std::size_t written_ = 0;
  std::uint64_t read_bytes_ = 0;
  Request request_;
  Answers answers_;
  std::string refusal_;  // the first error that Redis reported of this request
  unsigned greetings_due_ = 0;
  Nanos until_ = 0;  // of the state
  std::optional<Result<Answers>> answer_;
  std::string trouble_;
};

}  // namespace flexkv::meta
