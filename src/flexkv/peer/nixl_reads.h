// One-sided reads through NIXL, on a thread of their own, because NIXL may take its time and a read can be asked how
// far it is, but does not tell. That thread looks every kLookMin to kLookMax while reads are under way, and sleeps
// otherwise.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "flexkv/base/time.h"
#include "flexkv/net/nixl_agent.h"
#include "flexkv/peer/landing.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

constexpr Nanos kLookMin = 50 * kMicrosecond;
constexpr Nanos kLookMax = 10 * kMillisecond;

class NixlReads final : public OneSided {
 public:
  // Loads NIXL and registers `pool`, which stays mapped for as long as this lives, for others to read. `node`: this
  // node's name. Nodes with the metadata can write to the pool as well (net/nixl_agent.h).
  static Result<std::unique_ptr<NixlReads>> start(const std::string& library, const std::string& node,
                                                  std::span<std::byte> pool);
  // Reads that are under way are given up; `done` of these is not called any more.
  ~NixlReads() override;

  Transport transport() const override { return Transport::kNixl; }
  std::shared_ptr<const Window> window() const override { return window_; }
  std::span<const std::byte> pool() const override { return pool_; }
  LeaseWords& words() override { return words_; }
  bool fetch(const std::string& owner, const Window& window, const Piece& piece,
             std::function<void(Fetched)> done) override;
  void forget(const std::string& owner) override;

 private:
  struct Order;
  struct Owner {
    bool known = false;  // to NIXL
    bool gone = false;
    std::size_t under_way = 0;
  };
  using Transfer = net::NixlAgent::Transfer;

  NixlReads(std::unique_ptr<net::NixlAgent> agent, std::shared_ptr<Landing> landing, std::span<const std::byte> pool);

  void run();
  void begin(std::unique_ptr<Order> order);
  bool look(Order& order);  // false: it has ended
  void finish(Order& order, bool ok);
  void drop_if_gone(const std::string& name);

  const std::span<const std::byte> pool_;
  std::vector<std::uint64_t> words_memory_ = std::vector<std::uint64_t>(kLeasesByThemselves);
  LeaseWords words_{words_memory_};
  std::shared_ptr<const Window> window_;
  const std::shared_ptr<Landing> landing_;
  std::unique_ptr<net::NixlAgent> agent_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Order>> ordered_;
  bool stop_ = false;

  // The thread's own.
  std::map<std::string, Owner> owners_;
  std::vector<std::unique_ptr<Order>> under_way_;
  std::thread thread_;
};

}  // namespace flexkv::peer
