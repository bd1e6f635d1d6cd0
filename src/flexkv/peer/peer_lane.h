// The thread that owns a node's connections to its peers: those that read from it, and those that it reads from, which
// are made when first needed. Thread-safe.
//
// Every read ends once, with on_end: a connection that cannot be made or that breaks ends its reads with kUnreachable,
// and for a moment (kRetryMin, doubling up to kRetryMax) further ones at once. The destructor ends them as well, and
// gives all pins back.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/mutex.h"
#include "flexkv/net/frame_stream.h"
#include "flexkv/peer/reading.h"
#include "flexkv/peer/serving.h"

namespace flexkv::peer {

constexpr Nanos kGreetingTime = 5 * kSecond;  // for connecting, the handshake and both hellos
constexpr Nanos kRetryMin = 1 * kSecond;
constexpr Nanos kRetryMax = 30 * kSecond;
constexpr Nanos kAcceptPause = 1 * kSecond;  // after peers could not be accepted, for want of descriptors

struct PeerOptions {
  std::string node;                    // own name, unique in the cluster
  std::string listen;                  // HOST:PORT for peers; empty: nobody reads from this node
  std::uint64_t pinned_bytes_max = 0;  // by all readers of one connection
  std::size_t readers_max = 1024;      // connections from peers
};

struct PeerStats {
  std::size_t readers = 0;  // connections
  std::size_t owners = 0;
  std::uint64_t accepts_failed = 0;
  ServingStats served;
  ReadingStats read;
};

class PeerLane {
 public:
  // `source`, `sink` and `one_sided` (null: blocks travel as bytes) outlive the lane; the sink may be called before
  // this returns.
  static Result<std::unique_ptr<PeerLane>> start(PeerOptions options, net::TlsContext tls, BlockSource& source,
                                                 ReadSink& sink, OneSided* one_sided = nullptr);
  ~PeerLane();

  // ADDRESS:PORT it listens at; empty: it does not.
  const std::string& address() const { return address_; }
  // REQUIRES: problem_of(request) is empty
  void read(ReadRequest request);
  void cancel(RequestId id);
  // Nothing comes of it any more: it is tried in the plain form, if it was not, or else ends with kDeadline.
  void give_up(RequestId id);
  // Runs it on the lane; here and now, once the lane has ended.
  void post(std::function<void()> command) const;
  PeerStats stats() const;

 private:
  struct Link;
  struct Backoff {
    Nanos until = 0;
    Nanos next = kRetryMin;
  };
  class Mailbox;

  PeerLane(PeerOptions options, net::TlsContext tls, BlockSource& source, ReadSink& sink, OneSided* one_sided);
  Status open();
  void run();
  void accept_peers();
  void watch_listener(bool wanted);
  void begin_read(ReadRequest request);
  Result<Link*> link_to(const std::string& node, const std::string& address);
  void add(std::unique_ptr<Link> link);
  bool pump_due(Nanos now);  // whether more could be done at once
  void drop(Link& link, const std::string& why);
  int wait_milliseconds(Nanos now) const;
  void publish_stats();

  const PeerOptions options_;
  const net::TlsContext tls_;
  BlockSource& source_;
  ReadSink& sink_;
  OneSided* const one_sided_;
  std::string address_;
  std::shared_ptr<Mailbox> mailbox_;

  // The lane's own.
  Fd epoll_;
  Fd listener_;
  Nanos accept_at_ = 0;                         // 0: whenever somebody comes
  std::map<int, std::unique_ptr<Link>> links_;  // by descriptor
  std::map<std::string, int> owners_;           // node and address -> descriptor
  std::map<std::string, Backoff> backoffs_;
  PeerStats ended_;  // of links that are gone

  mutable Mutex mutex_;
  PeerStats stats_ FLEXKV_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace flexkv::peer
