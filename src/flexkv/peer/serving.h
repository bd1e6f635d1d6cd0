// The owner's side of one connection: answers a peer's reads with blocks that the source pins meanwhile. Pure logic
// over a FrameStream; one thread (the lane's).
// Bounds: kRequestsMax requests at a time, whose chains take kKeyBytesMax; a lease lasts as long as its reader waits,
// kLeaseTimeMax at most, and what all leases of a connection pin is at most `pinned_bytes_max`.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "flexkv/net/frame_stream.h"
#include "flexkv/peer/messages.h"

namespace flexkv::peer {

constexpr std::size_t kRequestsMax = 256;
constexpr std::size_t kKeyBytesMax = 8 * kKeysMax * sizeof(key::BlockKey);  // 4 MiB
constexpr std::size_t kEndingsMax = 4096;                                   // of requests, that the peer does not take
constexpr Nanos kLeaseTimeMax = 60 * kSecond;

struct ServingStats {
  std::uint64_t requests = 0;
  std::uint64_t blocks = 0;  // sent whole
  std::uint64_t bytes = 0;
  std::uint64_t placed_blocks = 0;  // told where they lie
};

class Serving final : public net::FrameSink {
 public:
  // A pin's answer may come on any thread; `post` brings it, and then the call of what it is given, to the lane.
  // `source` and `post` outlive this object's answers, which may come after it is gone. `one_sided`: null: readers get
  // bytes and nothing else.
  Serving(net::FrameStream& stream, BlockSource& source, std::string own_name, std::uint64_t pinned_bytes_max,
          std::function<void(std::function<void()>)> post, OneSided* one_sided = nullptr);
  ~Serving() override;  // gives all pins back

  Result<std::span<std::byte>> on_head(const net::FrameHead& head) override;
  Status on_frame(const net::FrameHead& head) override;

  // Queues bytes as far as the stream has room, the requests in turns.
  void fill(Nanos now);
  bool pending() const { return !turns_.empty() || !endings_.empty() || !doubted_.empty(); }
  // Ends leases that are over.
  void on_time(Nanos now);
  std::optional<Nanos> next_deadline() const;

  const std::string& peer_name() const { return peer_name_; }
  const ServingStats& stats() const { return stats_; }

 private:
  struct Lease {
    SpaceName space{};
    std::uint64_t slot_bytes = 0;
    std::vector<key::BlockKey> keys;  // of the chain
    std::uint32_t first = 0;          // wanted
    Nanos until = 0;
    Pinned pinned;
    bool by_itself = false;             // the reader can read
    bool answered = false;              // by the source
    std::optional<std::uint32_t> word;  // the reader reads by itself; the lease's word
    bool told = false;                  // the reader has all, or knows all places, or wants no more
    bool doubted = false;               // the reader says that a block is damaged
    std::uint32_t block = 0;            // of those wanted
    std::uint64_t offset = 0;           // sent of the block, or looked at
    std::optional<BlockChecksum> checksum;
    std::size_t key_bytes = 0;

    std::size_t wanted() const { return keys.size() - first; }
    std::span<const SummedExtent> sums_of(std::size_t of) const {
      return of < pinned.sums.size() ? pinned.sums[of] : std::span<const SummedExtent>();
    }
    void forget_unwanted() {
      keys.erase(keys.begin(), keys.begin() + first);
      keys.shrink_to_fit();
      first = 0;
    }
  };
  struct Alive {};

  Status begin(RequestId id, Read message);
  Status answer_probe(RequestId id);
  void answered(RequestId id, Pinned pinned);
  Status send_plain(RequestId id, const Plain& message);
  Status take_damaged(RequestId id, const Damaged& message);
  void look_at_doubted();
  Hello hello() const;
  void tell_new_window();
  bool lies_in_window(const Pinned& pinned) const;
  std::uint64_t offset_in_pool(std::span<const std::byte> block) const;
  bool send_next(RequestId id, Lease& lease);  // false: the stream has no room
  bool begin_block(RequestId id, Lease& lease);
  void send_block_end(RequestId id, Lease& lease);
  void give_back(Lease& lease);
  void end(RequestId id, Outcome outcome);
  void send_endings();

  net::FrameStream& stream_;
  BlockSource& source_;
  const std::string own_name_;
  const std::uint64_t pinned_bytes_max_;
  const std::function<void(std::function<void()>)> post_;
  OneSided* const one_sided_;
  std::shared_ptr<Alive> alive_ = std::make_shared<Alive>();
  Nanos now_ = 0;
  std::string peer_name_;  // empty: it has not said hello
  std::shared_ptr<const Window> told_window_;
  std::vector<std::byte> body_;
  std::unordered_map<RequestId, Lease> leases_;
  std::deque<RequestId> turns_;  // those with something to send
  std::deque<std::pair<RequestId, Outcome>> endings_;
  std::deque<std::pair<RequestId, std::uint32_t>> doubted_;  // blocks to look at, in leases that end then
  std::uint64_t promised_bytes_ = 0;                         // by leases
  std::size_t key_bytes_ = 0;                                // of leases
  std::uint64_t worked_bytes_ = 0;                           // sent or summed up since fill() was called
  RequestId last_id_ = 0;
  ServingStats stats_;
};

}  // namespace flexkv::peer
