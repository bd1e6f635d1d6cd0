// The reader's side of one connection: asks an owner for blocks and puts them where they were wanted, each checked.
// Where both sides can, it reads the blocks out of the owner's memory by itself, a few pieces at a time, and goes on in
// the plain form when that fails. Pure logic over a FrameStream; one thread (the lane's).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "flexkv/net/frame_stream.h"
#include "flexkv/peer/messages.h"

namespace flexkv::peer {

// After a read by itself failed or hung; doubled with each time until one has come.
constexpr Nanos kOneSidedRest = 30 * kSecond;
constexpr Nanos kOneSidedRestMax = 480 * kSecond;
// Of a read of which bytes have come so lately nobody believes that it has stopped.
constexpr Nanos kMoving = 2 * kSecond;

struct ReadingStats {
  std::uint64_t requests = 0;
  std::uint64_t blocks = 0;
  std::uint64_t bytes = 0;
  std::uint64_t one_sided_blocks = 0;    // of the blocks
  std::uint64_t one_sided_failures = 0;  // after which the rest came as bytes
  std::array<std::uint64_t, kOutcomeCount> ended{};
};

class Reading final : public net::FrameSink {
 public:
  using Post = std::function<void(std::function<void()>)>;

  // `owner`: who has to be there; anybody else is not asked. `one_sided` (null: there is none) and `post`, which brings
  // its answers to the lane, outlive this object.
  Reading(net::FrameStream& stream, ReadSink& sink, const std::string& own_name, std::string owner,
          OneSided* one_sided = nullptr, Post post = nullptr);

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override;
  Status on_frame(const net::FrameHead& head) override;

  // REQUIRES: valid(request), and its id is not known here.
  void start(ReadRequest request);
  // Ends the request now, if there still is one: nothing is written to its buffers any more.
  void end(RequestId id, Outcome outcome);
  void end_all(Outcome outcome);
  // Its owner seems to have stopped. If no bytes of it have come for kMoving, those that the stream has now included:
  // what reads by itself goes on with bytes, all else ends with kDeadline.
  void give_up(RequestId id);
  // Sends what waits to be sent, as far as the stream has room.
  void fill(Nanos now);
  void on_time(Nanos now);
  std::optional<Nanos> next_deadline() const;
  bool pending() const { return greeted_ && !(to_send_.empty() && to_cancel_.empty() && to_plain_.empty()); }

  bool greeted() const { return greeted_; }
  const std::string& owner() const { return owner_; }
  bool knows(RequestId id) const { return requests_.contains(id); }
  const ReadingStats& stats() const { return stats_; }

 private:
  struct Request {
    ReadRequest asked;
    bool sent = false;
    std::uint32_t block = 0;   // of those wanted
    std::uint64_t offset = 0;  // received of the block
    Nanos moved = 0;           // when bytes came last, or it began
    std::vector<SummedExtent> sums;
    std::optional<BlockChecksum> checksum;

    enum class Form { kOpen, kPlaces, kBytes };
    Form form = Form::kBytes;
    bool gave_up_places = false;    // some may still come
    std::vector<Place> places;      // of the first of those wanted
    std::optional<Outcome> placed;  // there are no more places, and why
    std::uint32_t next_block = 0;   // of which the next piece is to be read
    std::uint64_t next_offset = 0;
  };
  struct Fetch {
    RequestId id = 0;
    std::uint32_t block = 0;
    std::optional<Fetched> result;
  };
  struct Alive {};

  Result<std::span<std::byte>> room_for_data(const net::FrameHead& head);
  void add_received(Request& request, std::size_t bytes) const;
  static bool is_right(Request& request, std::uint64_t checksum);
  Status take_sums(RequestId id);
  Status take_block(RequestId id);
  Status take_sent(RequestId id);
  Status take_end(RequestId id);
  Status take_place(RequestId id);
  Status take_placed(RequestId id);
  void fetch_more();
  bool fetch_next(RequestId id, Request& request);  // false: there is no room
  void take_fetched();
  void take_piece(RequestId id, const Fetch& fetch);
  void end_if_all(RequestId id);
  void end_with(RequestId id, Outcome why);
  bool reads_by_itself() const;
  void end_stopped();
  void rest_from_one_sided();
  void go_on_with_bytes(RequestId id, Request& request);

  net::FrameStream& stream_;
  ReadSink& sink_;
  const std::string owner_;
  bool greeted_ = false;
  std::vector<std::byte> body_;
  std::unordered_map<RequestId, Request> requests_;
  std::deque<RequestId> to_send_;
  std::deque<std::pair<RequestId, std::optional<Damaged>>> to_cancel_;
  // Ended here, and not yet by the owner, whose answers may be under way.
  std::unordered_set<RequestId> ghosts_;
  std::vector<RequestId> doubted_;      // of give_up()
  std::optional<RequestId> receiving_;  // whose buffer the stream fills
  ReadingStats stats_;

  OneSided* const one_sided_;
  Nanos one_sided_from_ = 0;
  Nanos one_sided_rest_ = kOneSidedRest;  // the next one
  Nanos now_ = 0;
  const Post post_;
  const std::shared_ptr<Alive> alive_ = std::make_shared<Alive>();
  Window window_;
  std::deque<RequestId> placing_;               // those with places, in the order in which they are read
  std::deque<std::shared_ptr<Fetch>> fetches_;  // under way, in the order of the bytes
  std::deque<std::pair<RequestId, Plain>> to_plain_;
};

// Why it could never be carried out; empty: it can.
std::string problem_of(const ReadRequest& request);

}  // namespace flexkv::peer
