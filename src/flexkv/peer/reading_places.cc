// Reading: the form in which the reader fetches the blocks by itself.
#include <algorithm>
#include <cstring>
#include <utility>

#include "flexkv/peer/reading.h"

namespace flexkv::peer {
namespace {

constexpr std::size_t kFetchesMax = 8;  // of one connection

}  // namespace

// An owner may have another transport, and this node's may not work now.
bool Reading::reads_by_itself() const {
  return one_sided_ != nullptr && window_.transport == one_sided_->transport() && one_sided_->window() != nullptr &&
         now_ >= one_sided_from_;
}

Status Reading::take_place(RequestId id) {
  const auto message = decode_place(body_);
  if (!message.ok()) return message.error();
  const auto found = requests_.find(id);
  if (found == requests_.end()) {
    if (ghosts_.contains(id)) return {};
    return Error{ErrorCode::kPeer, "the place of a block that was not asked for"};
  }
  Request& request = found->second;
  if (request.gave_up_places) return {};  // it came before the owner heard of that
  const Place& place = message.value();
  const bool fits = window_.holds(place.offset, request.asked.slot_bytes) && place.word < window_.word_count &&
                    can_be(place.sums, request.asked.slot_bytes);
  if (!request.sent || !fits || request.form == Request::Form::kBytes || request.placed ||
      request.places.size() == request.asked.buffers.size()) {
    return Error{ErrorCode::kPeer, "a place that cannot be"};
  }
  if (!reads_by_itself()) {  // it was asked before that failed
    go_on_with_bytes(id, request);
    return {};
  }
  if (std::exchange(request.form, Request::Form::kPlaces) == Request::Form::kOpen) placing_.push_back(id);
  request.places.push_back(place);
  fetch_more();
  return {};
}

Status Reading::take_placed(RequestId id) {
  const auto message = decode_placed(body_);
  if (!message.ok()) return message.error();
  const auto found = requests_.find(id);
  if (found == requests_.end()) {
    if (ghosts_.contains(id)) return {};
    return Error{ErrorCode::kPeer, "the end of places that were not asked for"};
  }
  Request& request = found->second;
  if (request.gave_up_places) return {};
  if (request.form != Request::Form::kPlaces || request.placed) {
    return Error{ErrorCode::kPeer, "the end of places that did not come"};
  }
  request.placed = message.value().outcome;
  end_if_all(id);
  return {};
}

void Reading::fetch_more() {
  std::erase_if(placing_, [&](RequestId id) {
    const auto found = requests_.find(id);
    return found == requests_.end() || found->second.form != Request::Form::kPlaces;
  });
  for (const RequestId id : placing_) {
    Request& request = requests_.at(id);
    while (request.next_block < request.places.size()) {
      if (fetches_.size() == kFetchesMax) return;
      if (fetch_next(id, request)) continue;
      if (!fetches_.empty()) return;  // there will be some
      go_on_with_bytes(id, request);  // others have all of it
      break;
    }
  }
}

bool Reading::fetch_next(RequestId id, Request& request) {
  const Place& place = request.places[request.next_block];
  const std::uint64_t left = request.asked.slot_bytes - request.next_offset;
  Piece piece;
  piece.address = window_.pool + place.offset + request.next_offset;
  piece.bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(left, kPieceBytesMax));
  piece.word_address = window_.words + place.word * sizeof(std::uint64_t);
  const auto fetch = std::make_shared<Fetch>(Fetch{id, request.next_block, {}});
  const bool begun = one_sided_->fetch(owner_, window_, piece,
                                       [this, post = post_, alive = std::weak_ptr(alive_), fetch](Fetched fetched) {
                                         post([this, alive, fetch, fetched = std::move(fetched)]() mutable {
                                           if (alive.expired()) return;
                                           fetch->result = std::move(fetched);
                                           take_fetched();
                                         });
                                       });
  if (!begun) return false;
  fetches_.push_back(fetch);
  request.next_offset += piece.bytes;
  if (request.next_offset == request.asked.slot_bytes) {
    ++request.next_block;
    request.next_offset = 0;
  }
  return true;
}

void Reading::take_fetched() {
  while (!fetches_.empty() && fetches_.front()->result) {
    const auto fetch = std::move(fetches_.front());
    fetches_.pop_front();
    take_piece(fetch->id, *fetch);
  }
  fetch_more();
}

void Reading::take_piece(RequestId id, const Fetch& fetch) {
  const auto found = requests_.find(id);
  if (found == requests_.end() || found->second.form != Request::Form::kPlaces) return;
  Request& request = found->second;
  if (!fetch.result->ok) {
    rest_from_one_sided();
    return;
  }
  const Place& place = request.places[fetch.block];
  if (fetch.result->word != place.generation) {  // the lease ended first, and these may be another block's bytes
    end(id, Outcome::kExpired);
    return;
  }
  const auto& asked = request.asked;
  if (request.offset == 0) request.sums = place.sums;
  stats_.bytes += fetch.result->bytes.size();
  for (auto left = fetch.result->bytes; !left.empty();) {
    const auto part = left.first(std::min<std::size_t>(left.size(), kPartBytes));
    std::memcpy(asked.buffers[fetch.block].data() + request.offset, part.data(), part.size());
    add_received(request, part.size());
    left = left.subspan(part.size());
  }
  if (request.offset < asked.slot_bytes) return;
  if (!is_right(request, place.checksum)) {
    end(id, Outcome::kChecksum);
    return;
  }
  ++stats_.blocks;
  ++stats_.one_sided_blocks;
  one_sided_rest_ = kOneSidedRest;
  sink_.on_block(id, request.block++);
  end_if_all(id);
}

void Reading::end_if_all(RequestId id) {
  const Request& request = requests_.at(id);
  if (!request.placed || request.block < request.places.size()) return;
  end_with(id, *request.placed);
}

// What is under way is dropped when it comes, which may be never.
void Reading::rest_from_one_sided() {
  fetches_.clear();
  // What hangs at that owner may cost this node what it reads from others with.
  one_sided_from_ = now_ + one_sided_rest_;
  one_sided_rest_ = std::min(2 * one_sided_rest_, kOneSidedRestMax);
  one_sided_->forget(owner_);  // the next one begins with a connection of its own
  ++stats_.one_sided_failures;
  for (auto& [id, request] : requests_) {
    if (request.form == Request::Form::kPlaces) go_on_with_bytes(id, request);
  }
}

void Reading::go_on_with_bytes(RequestId id, Request& request) {
  request.form = Request::Form::kBytes;
  request.gave_up_places = true;
  request.offset = 0;
  request.checksum.reset();
  request.sums.clear();
  to_plain_.emplace_back(id, Plain{request.block});
}

}  // namespace flexkv::peer
