#include "flexkv/meta/redis_channel.h"

#include <hiredis/hiredis.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <limits>
#include <system_error>

#include "flexkv/base/assert.h"
#include "flexkv/base/bounded_call.h"
#include "flexkv/meta/redis_command.h"

namespace flexkv::meta {
namespace {

constexpr Nanos kForever = std::numeric_limits<Nanos>::max();

bool is_text(const redisReply& reply) { return reply.type == REDIS_REPLY_STRING || reply.type == REDIS_REPLY_STATUS; }

std::string text(const redisReply& reply) { return {reply.str, reply.len}; }

// [[stream, [[id, [field, value]], ...]], ...]; nothing at all when no stream has anything.
bool parse_streams(const redisReply& reply, const std::vector<Position>& positions, std::vector<Entry>& out) {
  if (reply.type == REDIS_REPLY_NIL) return true;
  if (reply.type != REDIS_REPLY_ARRAY) return false;
  std::uint32_t position = 0;
  for (std::size_t s = 0; s < reply.elements; ++s) {
    const redisReply& stream = *reply.element[s];
    if (stream.type != REDIS_REPLY_ARRAY || stream.elements != 2 || !is_text(*stream.element[0])) return false;
    // They come in the order in which they were asked for.
    const std::string name = text(*stream.element[0]);
    while (position < positions.size() && positions[position].stream != name) ++position;
    const redisReply& entries = *stream.element[1];
    if (position == positions.size() || entries.type != REDIS_REPLY_ARRAY) return false;
    for (std::size_t e = 0; e < entries.elements; ++e) {
      const redisReply& entry = *entries.element[e];
      if (entry.type != REDIS_REPLY_ARRAY || entry.elements != 2 || !is_text(*entry.element[0])) return false;
      const redisReply& fields = *entry.element[1];
      // An entry that someone else wrote there, without our field, is one that cannot be decoded.
      const bool ours = fields.type == REDIS_REPLY_ARRAY && fields.elements == 2 && is_text(*fields.element[1]);
      out.push_back({position, text(*entry.element[0]), ours ? text(*fields.element[1]) : std::string()});
    }
  }
  return true;
}

bool parse(const redisReply& reply, const Op& op, Answer& out) {
  switch (op.kind) {
    case Op::Kind::kGet:
    case Op::Kind::kGetPart:
      if (reply.type == REDIS_REPLY_NIL) return true;
      if (!is_text(reply)) return false;
      out.found = true;
      out.value = text(reply);
      return true;
    case Op::Kind::kMembers:
      if (reply.type != REDIS_REPLY_ARRAY) return false;
      for (std::size_t i = 0; i < reply.elements; ++i) {
        if (!is_text(*reply.element[i])) return false;
        out.members.push_back(text(*reply.element[i]));
      }
      return true;
    case Op::Kind::kNewest:
      out.value = kNoEntry;
      if (reply.type != REDIS_REPLY_ARRAY) return false;
      if (reply.elements == 0) return true;
      if (reply.element[0]->type != REDIS_REPLY_ARRAY || reply.element[0]->elements == 0) return false;
      out.value = text(*reply.element[0]->element[0]);
      return is_text(*reply.element[0]->element[0]);
    case Op::Kind::kRead:
      return parse_streams(reply, op.streams, out.entries);
    default:
      return true;
  }
}

}  // namespace

void RedisChannel::FreeContext::operator()(redisContext* context) const { redisFree(context); }

RedisChannel::RedisChannel(RedisOptions options, std::uint64_t seed)
    : options_(std::move(options)), backoff_(options_.retry_after, options_.retry_after_max, seed) {}

RedisChannel::~RedisChannel() = default;

int RedisChannel::fd() const { return context_ == nullptr ? -1 : context_->fd; }

short RedisChannel::events() const {
  if (state_ == State::kConnecting) return POLLOUT;
  return static_cast<short>(written_ < out_.size() ? POLLIN | POLLOUT : POLLIN);
}

Nanos RedisChannel::wakeup() const { return state_ == State::kReady ? kForever : until_; }

std::string RedisChannel::where() const {
  if (options_.host.starts_with('/')) return "Redis at " + options_.host;
  return "Redis at " + options_.host + ":" + std::to_string(options_.port);
}

void RedisChannel::step(Nanos now) {
  if (state_ == State::kWaiting) {
    if (now >= until_) connect(now);
    return;
  }
  if (state_ == State::kConnecting) {
    pollfd writable{fd(), POLLOUT, 0};
    if (::poll(&writable, 1, 0) == 1) {
      int error = 0;
      socklen_t size = sizeof(error);
      ::getsockopt(fd(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) return fail(ErrorCode::kPeer, errno_error("cannot connect", error).message, now);
      greet(now);
    }
  }
  if (context_ != nullptr) write_some(now);
  if (context_ != nullptr && state_ != State::kConnecting) read_some(now);
  if (context_ != nullptr && now >= wakeup()) {
    fail(ErrorCode::kTimeout, state_ == State::kConnecting ? "no connection in time" : "no answer in time", now);
  }
}

void RedisChannel::connect(Nanos now) {
  if (options_.host.starts_with('/')) {
    context_.reset(redisConnectUnixNonBlock(options_.host.c_str()));
  } else if (const Status found = connect_by_name(); !found) {
    return fail(found.error().code, found.error().message, now);
  }
  if (context_ == nullptr) return fail(ErrorCode::kNoSpace, "out of memory", now);
  if (context_->err != 0) return fail(ErrorCode::kPeer, std::string("cannot connect: ") + context_->errstr, now);
  state_ = State::kConnecting;
  until_ = now + options_.connect_within;
}

// Whoever knows the name may take its time, or never answer. Only one look-up is left behind for that.
Status RedisChannel::connect_by_name() {
  if (!look_up_.expired()) return Error{ErrorCode::kTimeout, "its name is still being looked up"};
  auto under_way = std::make_shared<char>();
  look_up_ = under_way;
  try {
    auto connected =
        within(options_.connect_within, [host = options_.host, port = options_.port, under_way = std::move(under_way)] {
          return Context(redisConnectNonBlock(host.c_str(), port));
        });
    if (!connected) return Error{ErrorCode::kTimeout, "its name is not found in time"};
    context_ = std::move(*connected);
    return {};
  } catch (const std::system_error& error) {
    return Error{ErrorCode::kNoSpace, std::string("cannot start a thread: ") + error.what()};
  }
}

void RedisChannel::greet(Nanos now) {
  state_ = State::kGreeting;
  until_ = now + options_.answer_within;
  greetings_due_ = 1;
  if (!options_.password.empty()) {
    append_command({"AUTH", options_.password}, out_);
    ++greetings_due_;
  }
  append_command({"PING"}, out_);
}

void RedisChannel::greeted(const redisReply& reply, Nanos now) {
  if (reply.type == REDIS_REPLY_ERROR) {
    return fail(ErrorCode::kPeer, "it refuses us (check redis_password): " + text(reply), now);
  }
  if (--greetings_due_ > 0) return;
  state_ = State::kReady;
  trouble_.clear();
}

void RedisChannel::fail(ErrorCode code, const std::string& why, Nanos now) {
  const Error error{code, where() + ": " + why};
  if (state_ == State::kBusy) answer_ = error;
  trouble_ = error.message;
  context_.reset();
  out_.clear();
  written_ = 0;
  state_ = State::kWaiting;
  until_ = now + backoff_.failed();
}

void RedisChannel::submit(const Request& request, Nanos now) {
  FLEXKV_ASSERT(ready() && !answer_ && !request.empty());
  request_ = request;
  answers_.clear();
  refusal_.clear();
  read_bytes_ = 0;
  for (const Op& op : request_) append_command(words_of(op), out_);
  state_ = State::kBusy;
  until_ = now + options_.answer_within + waiting_time(request_);
  write_some(now);
}

std::optional<Result<Answers>> RedisChannel::take_answer() { return std::exchange(answer_, std::nullopt); }

// Not hiredis's own write: that would raise SIGPIPE in the engine's process.
void RedisChannel::write_some(Nanos now) {
  while (written_ < out_.size()) {
    const ssize_t sent = ::send(fd(), out_.data() + written_, out_.size() - written_, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EINTR) return;
      return fail(ErrorCode::kPeer, errno_error("the connection broke", errno).message, now);
    }
    written_ += static_cast<std::size_t>(sent);
  }
  out_.clear();
  written_ = 0;
}

void RedisChannel::read_some(Nanos now) {
  std::array<char, 64 << 10> buffer;
  while (context_ != nullptr) {
    const ssize_t got = ::recv(fd(), buffer.data(), buffer.size(), 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got < 0) return fail(ErrorCode::kPeer, errno_error("the connection broke", errno).message, now);
    if (got == 0) return fail(ErrorCode::kPeer, "it closed the connection", now);
    read_bytes_ += static_cast<std::uint64_t>(got);
    if (read_bytes_ > options_.answer_bytes_max) return fail(ErrorCode::kPeer, "its answer is too long", now);
    redisReaderFeed(context_->reader, buffer.data(), static_cast<std::size_t>(got));
    void* reply = nullptr;
    while (context_ != nullptr) {
      if (redisReaderGetReply(context_->reader, &reply) != REDIS_OK) {
        return fail(ErrorCode::kPeer, std::string("not the language of Redis: ") + context_->reader->errstr, now);
      }
      if (reply == nullptr) break;
      take_reply(*static_cast<redisReply*>(reply), now);
      freeReplyObject(reply);
    }
  }
}

void RedisChannel::take_reply(const redisReply& reply, Nanos now) {
  if (state_ == State::kGreeting) return greeted(reply, now);
  if (state_ != State::kBusy) return fail(ErrorCode::kPeer, "an answer to nothing", now);
  const Op& op = request_[answers_.size()];
  Answer answer;
  if (reply.type == REDIS_REPLY_ERROR) {
    const std::string error = text(reply);
    const bool there_already = op.kind == Op::Kind::kAppend && error.find("equal or smaller") != std::string::npos;
    if (!there_already && refusal_.empty()) refusal_ = error;
  } else if (!parse(reply, op, answer)) {
    return fail(ErrorCode::kPeer, "an answer of the wrong kind; does something else use the key '" + op.key + "'?",
                now);
  }
  answers_.push_back(std::move(answer));
  if (answers_.size() < request_.size()) return;
  if (!refusal_.empty()) return fail(ErrorCode::kPeer, "it refuses: " + refusal_, now);
  backoff_.succeeded();
  state_ = State::kReady;
  answer_ = std::move(answers_);
}

}  // namespace flexkv::meta
