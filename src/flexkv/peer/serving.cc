#include "flexkv/peer/serving.h"

#include <algorithm>
#include <utility>

namespace flexkv::peer {

using net::FrameHead;

namespace {

// Of blocks that are sent or summed up before other connections have their turn.
constexpr std::uint64_t kWorkedAtOnce = 4U << 20;

constexpr const char* kTakesNoAnswers = "it asks, and does not take the answers";

}  // namespace

Serving::Serving(net::FrameStream& stream, BlockSource& source, std::string own_name, std::uint64_t pinned_bytes_max,
                 std::function<void(std::function<void()>)> post, OneSided* one_sided)
    : stream_(stream),
      source_(source),
      own_name_(std::move(own_name)),
      pinned_bytes_max_(pinned_bytes_max),
      post_(std::move(post)),
      one_sided_(one_sided) {}

Serving::~Serving() {
  for (auto& [id, lease] : leases_) give_back(lease);
}

void Serving::give_back(Lease& lease) {
  // In this order: who still reads by itself must see that the blocks may change, before they do.
  if (lease.word) one_sided_->words().end(*std::exchange(lease.word, std::nullopt));
  if (!lease.pinned.blocks.empty()) source_.unpin(lease.pinned.pin);
}

Result<std::span<std::byte>> Serving::on_head(const FrameHead& head) {
  const auto kind = static_cast<Kind>(head.kind);
  const bool greeted = !peer_name_.empty();
  const bool known = kind == Kind::kHello || kind == Kind::kRead || kind == Kind::kCancel || kind == Kind::kPlain ||
                     kind == Kind::kProbe || kind == Kind::kDamaged;
  if (greeted == (kind == Kind::kHello) || !known) {
    return Error{ErrorCode::kPeer, "a frame of kind " + std::to_string(head.kind) + " that has no place there"};
  }
  if (head.bytes > kMessageBytesMax || (kind == Kind::kCancel && head.bytes != 0)) {
    return Error{ErrorCode::kPeer, "a message of " + std::to_string(head.bytes) + " bytes, which is too long"};
  }
  body_.resize(head.bytes);
  return std::span(body_);
}

Status Serving::on_frame(const FrameHead& head) {
  switch (static_cast<Kind>(head.kind)) {
    case Kind::kHello: {
      auto hello = decode_hello(body_);
      if (!hello.ok()) return hello.error();
      peer_name_ = std::move(hello.value().node);
      if (one_sided_ != nullptr) told_window_ = one_sided_->window();
      const auto body = encode(this->hello());
      FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kHello), 0, {body}));
      return {};
    }
    case Kind::kRead: {
      auto read = decode_read(body_);
      if (!read.ok()) return read.error();
      return begin(head.id, std::move(read.value()));
    }
    case Kind::kPlain: {
      const auto plain = decode_plain(body_);
      if (!plain.ok()) return plain.error();
      return send_plain(head.id, plain.value());
    }
    case Kind::kDamaged: {
      const auto damaged = decode_damaged(body_);
      if (!damaged.ok()) return damaged.error();
      return take_damaged(head.id, damaged.value());
    }
    case Kind::kProbe:
      return answer_probe(head.id);
    default:  // kCancel, by on_head. Of one that has ended: the two crossed.
      if (leases_.contains(head.id)) end(head.id, Outcome::kCanceled);
      return {};
  }
}

Hello Serving::hello() const {
  Hello message;
  message.node = own_name_;
  if (told_window_ != nullptr) message.window = *told_window_;
  return message;
}

// Where there is no room for it, the next request has another chance. That there is none now is not told: places that
// were may still be on their way.
void Serving::tell_new_window() {
  if (one_sided_ == nullptr || !stream_.has_room()) return;
  auto window = one_sided_->window();
  if (window == nullptr || window == told_window_) return;
  told_window_ = std::move(window);
  const auto body = encode(hello());
  FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kHello), 0, {body}));
}

Status Serving::answer_probe(RequestId id) {
  static const std::vector<std::byte> zeros(kDataBytesMax);
  const auto probe = decode_probe(body_);
  if (!probe.ok()) return probe.error();
  const auto body = std::span(zeros).first(probe.value().bytes);
  if (stream_.send(static_cast<std::uint32_t>(Kind::kProbe), id, {body})) return {};
  return Error{ErrorCode::kPeer, kTakesNoAnswers};
}

Status Serving::begin(RequestId id, Read message) {
  // What belongs to an earlier lease of the same number (its turn, the source's answer) would meet this one.
  if (id <= last_id_) return Error{ErrorCode::kPeer, "a request whose number is not above those before it"};
  last_id_ = id;
  tell_new_window();
  if (endings_.size() >= kEndingsMax) return Error{ErrorCode::kPeer, kTakesNoAnswers};
  ++stats_.requests;
  const std::uint64_t room = (pinned_bytes_max_ - promised_bytes_) / message.slot_bytes;
  const std::size_t key_bytes = message.keys.size() * sizeof(key::BlockKey);
  if (room == 0 || leases_.size() >= kRequestsMax || key_bytes_ + key_bytes > kKeyBytesMax) {
    endings_.emplace_back(id, Outcome::kBusy);
    return {};
  }
  const bool trimmed = message.keys.size() - message.first > room;
  if (trimmed) message.keys.resize(message.first + room);
  Lease& lease = leases_[id];
  lease.space = message.space;
  lease.slot_bytes = message.slot_bytes;
  lease.keys = std::move(message.keys);
  lease.first = message.first;
  lease.by_itself = message.by_itself;
  lease.until = now_ + std::min(Nanos{message.milliseconds} * kMillisecond, kLeaseTimeMax);
  // The source may hold all of them until it answers, the lease those that are wanted until it ends.
  lease.key_bytes = key_bytes;
  key_bytes_ += key_bytes;
  promised_bytes_ += lease.wanted() * lease.slot_bytes;
  source_.pin(lease.space, lease.slot_bytes, lease.keys, lease.first, lease.until,
              [this, &source = source_, post = post_, alive = std::weak_ptr(alive_), id, trimmed](Pinned pinned) {
                if (trimmed && pinned.outcome == Outcome::kDone) pinned.outcome = Outcome::kBusy;
                post([this, &source, alive, id, pinned = std::move(pinned)]() mutable {
                  if (alive.lock() != nullptr) {
                    answered(id, std::move(pinned));
                  } else if (!pinned.blocks.empty()) {
                    source.unpin(pinned.pin);
                  }
                });
              });
  // Those before were only to say where the others belong.
  if (const auto begun = leases_.find(id); begun != leases_.end()) begun->second.forget_unwanted();
  return {};
}

void Serving::answered(RequestId id, Pinned pinned) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) {  // it ended meanwhile
    if (!pinned.blocks.empty()) source_.unpin(pinned.pin);
    return;
  }
  Lease& lease = found->second;
  FLEXKV_ASSERT(!lease.answered && pinned.blocks.size() <= lease.wanted());
  lease.answered = true;
  lease.pinned = std::move(pinned);
  if (lease.by_itself && lies_in_window(lease.pinned)) lease.word = one_sided_->words().take();
  if (lease.pinned.blocks.empty()) {
    end(id, lease.pinned.outcome);
  } else {
    turns_.push_back(id);
  }
}

bool Serving::lies_in_window(const Pinned& pinned) const {
  if (told_window_ == nullptr || one_sided_->window() != told_window_) return false;
  return std::ranges::all_of(
      pinned.blocks, [&](const auto block) { return told_window_->holds(offset_in_pool(block), block.size()); });
}

std::uint64_t Serving::offset_in_pool(std::span<const std::byte> block) const {
  return reinterpret_cast<std::uintptr_t>(block.data()) - reinterpret_cast<std::uintptr_t>(one_sided_->pool().data());
}

Status Serving::send_plain(RequestId id, const Plain& message) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) return {};  // it ended, and the two crossed
  Lease& lease = found->second;
  if (!lease.word || message.block > lease.pinned.blocks.size()) {
    return Error{ErrorCode::kPeer, "the wish for bytes of a block that it was not told the place of"};
  }
  one_sided_->words().end(*std::exchange(lease.word, std::nullopt));
  lease.block = message.block;
  lease.offset = 0;
  lease.checksum.reset();
  if (std::exchange(lease.told, false)) turns_.push_back(id);
  return {};
}

// What the reader received was wrong. Whether that is because the block is, is for the owner to see: by turns with
// other connections, as summing takes its time.
Status Serving::take_damaged(RequestId id, const Damaged& message) {
  const auto found = leases_.find(id);
  if (found == leases_.end()) return {};  // it ended, and the two crossed
  Lease& lease = found->second;
  if (message.block >= lease.pinned.blocks.size()) return Error{ErrorCode::kPeer, "damage of a block that it has not"};
  if (std::exchange(lease.doubted, true)) return Error{ErrorCode::kPeer, "damage of a read that has ended with damage"};
  lease.told = true;
  doubted_.emplace_back(id, message.block);
  return {};
}

void Serving::look_at_doubted() {
  while (!doubted_.empty() && endings_.empty() && worked_bytes_ < kWorkedAtOnce) {
    const auto [id, block] = doubted_.front();
    doubted_.pop_front();
    const auto found = leases_.find(id);
    if (found == leases_.end()) continue;
    const Lease& lease = found->second;
    worked_bytes_ += lease.slot_bytes;
    if (!holds_sums(lease.pinned.blocks[block], lease.sums_of(block))) source_.on_damaged(lease.pinned.pin, block);
    end(id, Outcome::kCanceled);
    send_endings();
  }
}

void Serving::fill(Nanos now) {
  now_ = now;
  worked_bytes_ = 0;
  send_endings();
  look_at_doubted();
  while (!turns_.empty() && endings_.empty() && worked_bytes_ < kWorkedAtOnce) {
    const RequestId id = turns_.front();
    const auto found = leases_.find(id);
    if (found != leases_.end() && !found->second.told && !send_next(id, found->second)) return;
    turns_.pop_front();
    if (const auto left = leases_.find(id); left != leases_.end() && !left->second.told) turns_.push_back(id);
    send_endings();
  }
}

// One frame of the block that is its turn.
bool Serving::send_next(RequestId id, Lease& lease) {
  if (!stream_.has_room()) return false;
  if (lease.block == lease.pinned.blocks.size()) {
    lease.told = true;
    const auto outcome = lease.pinned.outcome;
    const auto body = lease.word ? encode(Placed{outcome}) : encode(Sent{outcome});
    FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(lease.word ? Kind::kPlaced : Kind::kSent), id, {body}));
    return true;
  }
  const std::span<const std::byte> bytes = lease.pinned.blocks[lease.block];
  FLEXKV_ASSERT(bytes.size() == lease.slot_bytes);
  if (lease.offset == bytes.size()) {
    send_block_end(id, lease);
    return true;
  }
  // Bytes are copied as little as can be: what the socket does not take now waits where it is.
  if (!lease.word && stream_.stuck()) return false;
  if (!lease.checksum && begin_block(id, lease)) return true;
  const auto part = bytes.subspan(lease.offset, std::min<std::size_t>(kPartBytes, bytes.size() - lease.offset));
  // All that is done to these bytes is done while they are in the processor's cache.
  const std::uint64_t looked_at = lease.checksum->add(part);
  lease.offset += part.size();
  worked_bytes_ += lease.word ? looked_at : part.size();
  if (lease.word) return true;
  FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kData), id, {part}));
  stats_.bytes += part.size();
  return true;
}

// True: a frame was sent.
bool Serving::begin_block(RequestId id, Lease& lease) {
  const auto sums = lease.sums_of(lease.block);
  FLEXKV_ASSERT(can_be(sums, lease.slot_bytes));
  lease.checksum.emplace(lease.space, lease.slot_bytes, lease.keys[lease.first + lease.block], sums,
                         BlockChecksum::Side::kOwner);
  if (lease.word || sums.empty()) return false;
  const auto body = encode(Sums{{sums.begin(), sums.end()}});
  FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kSums), id, {body}));
  return true;
}

void Serving::send_block_end(RequestId id, Lease& lease) {
  const std::uint64_t checksum = lease.checksum->value();
  if (lease.word) {
    const auto sums = lease.sums_of(lease.block);
    const auto body = encode(Place{offset_in_pool(lease.pinned.blocks[lease.block]),
                                   checksum,
                                   one_sided_->words().generation(*lease.word),
                                   *lease.word,
                                   {sums.begin(), sums.end()}});
    FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kPlace), id, {body}));
    ++stats_.placed_blocks;
  } else {
    const auto body = encode(Block{checksum});
    FLEXKV_ASSERT(stream_.send(static_cast<std::uint32_t>(Kind::kBlock), id, {body}));
    ++stats_.blocks;
  }
  lease.checksum.reset();
  lease.offset = 0;
  ++lease.block;
}

void Serving::end(RequestId id, Outcome outcome) {
  auto node = leases_.extract(id);
  Lease& lease = node.mapped();
  promised_bytes_ -= lease.wanted() * lease.slot_bytes;
  key_bytes_ -= lease.key_bytes;
  give_back(lease);
  endings_.emplace_back(id, outcome);
}

void Serving::send_endings() {
  while (!endings_.empty()) {
    const auto [id, outcome] = endings_.front();
    const auto body = encode(End{outcome});
    if (!stream_.send(static_cast<std::uint32_t>(Kind::kEnd), id, {body})) return;
    endings_.pop_front();
  }
}

void Serving::on_time(Nanos now) {
  now_ = now;
  std::vector<RequestId> over;
  for (const auto& [id, lease] : leases_) {
    if (lease.until <= now) over.push_back(id);
  }
  for (const RequestId id : over) end(id, Outcome::kExpired);
}

std::optional<Nanos> Serving::next_deadline() const {
  std::optional<Nanos> next;
  for (const auto& [id, lease] : leases_) next = std::min(next.value_or(lease.until), lease.until);
  return next;
}

}  // namespace flexkv::peer
