#include "flexkv/peer/reading.h"

#include <algorithm>
#include <utility>

namespace flexkv::peer {
namespace {

using net::FrameHead;

Error unexpected(const FrameHead& head) {
  return {ErrorCode::kPeer, "a frame of kind " + std::to_string(head.kind) + " and " + std::to_string(head.bytes) +
                                " bytes that has no place there"};
}

}  // namespace

std::string problem_of(const ReadRequest& request) {
  if (request.keys.size() > kKeysMax) return "too many keys";
  if (request.first >= request.keys.size()) return "no block is wanted";
  if (request.keys.size() - request.first != request.buffers.size()) return "not one buffer for each block";
  if (request.slot_bytes == 0 || request.slot_bytes > kSlotBytesMax) return "no such block size";
  const bool fit =
      std::ranges::all_of(request.buffers, [&](const auto buffer) { return buffer.size() == request.slot_bytes; });
  return fit ? "" : "a buffer is not of a block's size";
}

Reading::Reading(net::FrameStream& stream, ReadSink& sink, const std::string& own_name, std::string owner,
                 OneSided* one_sided, Post post)
    : stream_(stream), sink_(sink), owner_(std::move(owner)), one_sided_(one_sided), post_(std::move(post)) {
  Hello hello;
  hello.node = own_name;
  const auto body = encode(hello);
  FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kHello), 0, {body}));
}

Result<std::span<std::byte>> Reading::on_head(const FrameHead& head) {
  const auto kind = static_cast<Kind>(head.kind);
  if (!greeted_ && kind != Kind::kHello) return unexpected(head);
  if (kind == Kind::kData) return room_for_data(head);
  const bool known = kind == Kind::kHello || kind == Kind::kBlock || kind == Kind::kEnd || kind == Kind::kPlace ||
                     kind == Kind::kPlaced || kind == Kind::kSums || kind == Kind::kSent;
  if (!known || head.bytes > kMessageBytesMax) return unexpected(head);
  body_.resize(head.bytes);
  return std::span(body_);
}

Result<std::span<std::byte>> Reading::room_for_data(const FrameHead& head) {
  if (head.bytes == 0 || head.bytes > kDataBytesMax) return unexpected(head);
  const auto found = requests_.find(head.id);
  if (found == requests_.end()) {
    if (!ghosts_.contains(head.id)) return unexpected(head);
    body_.resize(head.bytes);
    return std::span(body_);
  }
  Request& request = found->second;
  const std::uint64_t left = request.asked.slot_bytes - request.offset;
  if (!request.sent || request.block == request.asked.buffers.size() || head.bytes > left) return unexpected(head);
  if (request.form == Request::Form::kPlaces) return unexpected(head);
  request.form = Request::Form::kBytes;
  receiving_ = head.id;
  return request.asked.buffers[request.block].subspan(request.offset, head.bytes);
}

Status Reading::on_frame(const FrameHead& head) {
  switch (static_cast<Kind>(head.kind)) {
    case Kind::kHello: {
      auto hello = decode_hello(body_);
      if (!hello.ok()) return hello.error();
      if (hello.value().node != owner_) {
        return Error{ErrorCode::kPeer, "node " + hello.value().node + " is there now, not " + owner_};
      }
      greeted_ = true;
      window_ = std::move(hello.value().window);
      return {};
    }
    case Kind::kData: {
      receiving_.reset();
      const auto found = requests_.find(head.id);
      if (found == requests_.end()) return {};
      add_received(found->second, head.bytes);
      stats_.bytes += head.bytes;
      return {};
    }
    case Kind::kSums:
      return take_sums(head.id);
    case Kind::kBlock:
      return take_block(head.id);
    case Kind::kSent:
      return take_sent(head.id);
    case Kind::kPlace:
      return take_place(head.id);
    case Kind::kPlaced:
      return take_placed(head.id);
    default:  // kEnd, by on_head
      return take_end(head.id);
  }
}

// So many more bytes of the block are in its buffer.
void Reading::add_received(Request& request, std::size_t bytes) const {
  const auto& asked = request.asked;
  if (!request.checksum) {
    request.checksum.emplace(asked.space, asked.slot_bytes, asked.keys[asked.first + request.block], request.sums,
                             BlockChecksum::Side::kReader);
  }
  request.checksum->add(asked.buffers[request.block].subspan(request.offset, bytes));
  request.offset += bytes;
  request.moved = now_;
}

// Whether the block, all of which is in its buffer, is what it should be. The next one may come.
bool Reading::is_right(Request& request, std::uint64_t checksum) {
  const bool right = request.checksum->holds_sums() && request.checksum->value() == checksum;
  request.checksum.reset();
  request.sums.clear();
  request.offset = 0;
  return right;
}

Status Reading::take_sums(RequestId id) {
  auto message = decode_sums(body_);
  if (!message.ok()) return message.error();
  const auto found = requests_.find(id);
  if (found == requests_.end()) {
    if (ghosts_.contains(id)) return {};
    return Error{ErrorCode::kPeer, "sums of a block that was not asked for"};
  }
  Request& request = found->second;
  auto& extents = message.value().extents;
  if (!request.sent || request.form == Request::Form::kPlaces || request.offset > 0 || !request.sums.empty() ||
      request.block == request.asked.buffers.size() || !can_be(extents, request.asked.slot_bytes)) {
    return Error{ErrorCode::kPeer, "sums that cannot be"};
  }
  request.sums = std::move(extents);
  return {};
}

Status Reading::take_block(RequestId id) {
  const auto message = decode_block(body_);
  if (!message.ok()) return message.error();
  const auto found = requests_.find(id);
  if (found == requests_.end()) {
    if (ghosts_.contains(id)) return {};
    return Error{ErrorCode::kPeer, "a block that was not asked for"};
  }
  Request& request = found->second;
  if (request.form != Request::Form::kBytes || request.offset != request.asked.slot_bytes)
    return Error{ErrorCode::kPeer, "a block without all its bytes"};
  if (!is_right(request, message.value().checksum)) {
    end(id, Outcome::kChecksum);
    return {};
  }
  ++stats_.blocks;
  sink_.on_block(id, request.block++);
  return {};
}

Status Reading::take_sent(RequestId id) {
  const auto message = decode_sent(body_);
  if (!message.ok()) return message.error();
  const auto found = requests_.find(id);
  if (found == requests_.end()) {
    if (ghosts_.contains(id)) return {};
    return Error{ErrorCode::kPeer, "the last of what was not asked for"};
  }
  const Request& request = found->second;
  if (!request.sent || request.form == Request::Form::kPlaces || request.offset > 0) {
    return Error{ErrorCode::kPeer, "the last of a request, and not all of a block"};
  }
  end_with(id, message.value().outcome);
  return {};
}

// The owner has no more blocks for it, for that reason.
void Reading::end_with(RequestId id, Outcome why) {
  const Request& request = requests_.at(id);
  const bool all = request.block == request.asked.buffers.size();
  // An owner that says it is done and is not would be believed to have sent all.
  if (!all && why == Outcome::kDone) why = Outcome::kMissing;
  end(id, all ? Outcome::kDone : why);  // tells the owner, whose lease ends with that
}

Status Reading::take_end(RequestId id) {
  const auto message = decode_end(body_);
  if (!message.ok()) return message.error();
  if (ghosts_.erase(id) > 0) return {};
  const auto node = requests_.extract(id);
  if (node.empty() || !node.mapped().sent) return Error{ErrorCode::kPeer, "the end of what was not asked for"};
  const Request& request = node.mapped();
  const bool all = request.block == request.asked.buffers.size();
  Outcome outcome = message.value().outcome;
  // An owner that says it is done and is not would be believed to have sent all.
  if (outcome == Outcome::kDone && !all) outcome = Outcome::kMissing;
  if (all) outcome = Outcome::kDone;
  ++stats_.ended[static_cast<std::size_t>(outcome)];
  sink_.on_end(id, outcome);
  return {};
}

void Reading::start(ReadRequest request) {
  FLEXKV_ASSERT(problem_of(request).empty() && !requests_.contains(request.id) && !ghosts_.contains(request.id));
  ++stats_.requests;
  to_send_.push_back(request.id);
  requests_[request.id].asked = std::move(request);
}

void Reading::end(RequestId id, Outcome outcome) {
  const auto node = requests_.extract(id);
  if (node.empty()) return;
  const Request& request = node.mapped();
  if (request.sent) {
    ghosts_.insert(id);
    const bool damaged = outcome == Outcome::kChecksum;
    to_cancel_.emplace_back(id, damaged ? std::optional(Damaged{request.block}) : std::nullopt);
  }
  if (receiving_ == id) {
    receiving_.reset();
    body_.resize(kDataBytesMax);
    stream_.divert(body_);
  }
  ++stats_.ended[static_cast<std::size_t>(outcome)];
  sink_.on_end(id, outcome);
}

void Reading::end_all(Outcome outcome) {
  while (!requests_.empty()) end(requests_.begin()->first, outcome);
}

void Reading::give_up(RequestId id) {
  if (requests_.contains(id)) doubted_.push_back(id);
}

// Who doubts sees blocks only, and this process may have stood still: bytes may be there.
void Reading::end_stopped() {
  if (stream_.more()) return;
  for (const RequestId id : std::exchange(doubted_, {})) {
    const auto found = requests_.find(id);
    if (found == requests_.end() || now_ - found->second.moved < kMoving) continue;
    // The owner may answer all the same.
    if (found->second.form == Request::Form::kPlaces && !fetches_.empty()) {
      rest_from_one_sided();
    } else {
      end(id, Outcome::kDeadline);
    }
  }
}

void Reading::fill(Nanos now) {
  now_ = now;
  end_stopped();
  if (!greeted_) return;
  while (!to_plain_.empty()) {
    const auto body = encode(to_plain_.front().second);
    if (!stream_.send(static_cast<std::uint32_t>(Kind::kPlain), to_plain_.front().first, {body})) break;
    to_plain_.pop_front();
  }
  for (; !to_cancel_.empty() && stream_.has_room(); to_cancel_.pop_front()) {
    const auto& [id, damaged] = to_cancel_.front();
    const auto kind = static_cast<std::uint32_t>(damaged ? Kind::kDamaged : Kind::kCancel);
    FLEXKV_ASSERT(stream_.send(kind, id, {damaged ? encode(*damaged) : std::vector<std::byte>()}));
  }
  for (; !to_send_.empty() && stream_.has_room(); to_send_.pop_front()) {
    const auto found = requests_.find(to_send_.front());
    if (found == requests_.end()) continue;
    Request& request = found->second;
    const Nanos left = std::clamp<Nanos>(request.asked.deadline - now, 0, Nanos{0xFFFFFFFF} * kMillisecond);
    Read message;
    message.space = request.asked.space;
    message.slot_bytes = request.asked.slot_bytes;
    message.milliseconds = static_cast<std::uint32_t>(left / kMillisecond);
    message.first = request.asked.first;
    message.keys = request.asked.keys;
    message.by_itself = reads_by_itself();
    if (message.by_itself) request.form = Request::Form::kOpen;
    const auto body = encode(message);
    FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kRead), found->first, {body}));
    request.sent = true;
    request.moved = now;
  }
}

void Reading::on_time(Nanos now) {
  now_ = now;
  std::vector<RequestId> over;
  for (const auto& [id, request] : requests_) {
    if (request.asked.deadline <= now) over.push_back(id);
  }
  // Of a read that hangs nothing is heard any more. The owner may answer all the same.
  const bool hangs = std::ranges::any_of(
      fetches_, [&](const auto& fetch) { return !fetch->result && std::ranges::find(over, fetch->id) != over.end(); });
  for (const RequestId id : over) end(id, Outcome::kDeadline);
  if (hangs) rest_from_one_sided();
}

std::optional<Nanos> Reading::next_deadline() const {
  std::optional<Nanos> next;
  for (const auto& [id, request] : requests_) {
    next = std::min(next.value_or(request.asked.deadline), request.asked.deadline);
  }
  return next;
}

}  // namespace flexkv::peer
