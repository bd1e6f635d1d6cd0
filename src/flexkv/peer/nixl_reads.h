// One-sided reads through NIXL, on a thread of their own, because NIXL may take its time and a read can be asked how
// far it is, but does not tell. That thread looks every kLookMin to kLookMax while reads are under way, and sleeps
// otherwise.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "flexkv/base/time.h"
#include "flexkv/net/nixl_agent.h"
#include "flexkv/peer/landing.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

constexpr Nanos kLookMin = 50 * kMicrosecond;
constexpr Nanos kLookMax = 10 * kMillisecond;
constexpr Nanos kNixlPatience = 2 * kSecond;  // with NIXL's calls, at the end

class NixlReads final : public OneSided {
 public:
  // Loads NIXL and registers `pool`, which stays mapped for as long as this lives, for others to read. `node`: this
  // node's name. Nodes with the metadata can write to the pool as well (net/nixl_agent.h).
  static Result<std::unique_ptr<NixlReads>> start(const std::string& library, const std::string& node,
                                                  std::span<std::byte> pool);
  static Result<std::unique_ptr<NixlReads>> start(const net::NixlLibrary& library, const std::string& node,
                                                  std::span<std::byte> pool);
  ~NixlReads() override { (void)end(); }

  Transport transport() const override { return Transport::kNixl; }
  std::shared_ptr<const Window> window() const override { return window_; }
  std::span<const std::byte> pool() const override { return pool_; }
  LeaseWords& words() override;
  bool fetch(const std::string& owner, const Window& window, const Piece& piece,
             std::function<void(Fetched)> done) override;
  void forget(const std::string& owner) override;
  // Waits up to kNixlPatience for a call of NIXL's. One that does not return is left behind, with all that it knows.
  bool end() override;

 private:
  struct Order;
  struct Core;  // what the thread uses, which outlives this when NIXL hangs

  NixlReads(std::span<const std::byte> pool, std::shared_ptr<Core> core) : pool_(pool), core_(std::move(core)) {}
  void post(std::unique_ptr<Order> order);

  const std::span<const std::byte> pool_;
  std::shared_ptr<const Window> window_;
  const std::shared_ptr<Core> core_;
  bool running_ = false;  // the thread, as far as is known
  bool left_behind_ = false;
};

}  // namespace flexkv::peer
