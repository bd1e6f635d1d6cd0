// The reader's side of one connection: asks an owner for blocks and puts them where they were wanted, each checked.
// Pure logic over a FrameStream; one thread (the lane's).
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "flexkv/net/frame_stream.h"
#include "flexkv/peer/messages.h"

namespace flexkv::peer {

struct ReadingStats {
  std::uint64_t requests = 0;
  std::uint64_t blocks = 0;
  std::uint64_t bytes = 0;
  std::array<std::uint64_t, kOutcomeCount> ended{};
};

class Reading final : public net::FrameSink {
 public:
  // `owner`: who has to be there; anybody else is not asked.
  Reading(net::FrameStream& stream, ReadSink& sink, const std::string& own_name, std::string owner);

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override;
  Status on_frame(const net::FrameHead& head) override;

  // REQUIRES: valid(request), and its id is not known here.
  void start(ReadRequest request);
  // Ends the request now, if there still is one: nothing is written to its buffers any more.
  void end(RequestId id, Outcome outcome);
  void end_all(Outcome outcome);
  // Sends what waits to be sent, as far as the stream has room.
  void fill(Nanos now);
  void on_time(Nanos now);
  std::optional<Nanos> next_deadline() const;

  bool greeted() const { return greeted_; }
  bool knows(RequestId id) const { return requests_.contains(id); }
  const ReadingStats& stats() const { return stats_; }

 private:
  struct Request {
    ReadRequest asked;
    bool sent = false;
    std::uint32_t block = 0;   // of those wanted
    std::uint64_t offset = 0;  // received of the block
    std::optional<BlockChecksum> checksum;
  };

  Result<std::span<std::byte>> room_for_data(const net::FrameHead& head);
  Status take_block(RequestId id);
  Status take_end(RequestId id);

  net::FrameStream& stream_;
  ReadSink& sink_;
  const std::string owner_;
  bool greeted_ = false;
  std::vector<std::byte> body_;
  std::unordered_map<RequestId, Request> requests_;
  std::deque<RequestId> to_send_;
  std::deque<RequestId> to_cancel_;
  // Ended here, and not yet by the owner, whose answers may be under way.
  std::unordered_set<RequestId> ghosts_;
  std::optional<RequestId> receiving_;  // whose buffer the stream fills
  ReadingStats stats_;
};

// Why it could never be carried out; empty: it can.
std::string problem_of(const ReadRequest& request);

}  // namespace flexkv::peer
