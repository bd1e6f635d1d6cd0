// One-sided reads through NIXL, on a thread of their own, because NIXL may take its time and a read can be asked how
// far it is, but does not tell. That thread looks every kLookMin to kLookMax while reads are under way, and sleeps
// otherwise.
//
// Reads go into memory of this object's, never where the caller wants the bytes: NIXL cannot recall a read, so one that
// its reader has given up may write long afterwards. Its piece of that memory is not used again before it has ended.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "flexkv/base/time.h"
#include "flexkv/net/nixl_agent.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

constexpr std::size_t kPiecesMax = 32;  // under way or with those who ordered them: 64 MiB
constexpr std::uint32_t kLeasesByThemselves = 16384;
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
  // end()
  ~NixlReads() override;

  // Gives up reads that are under way; `done` of these is not called any more once this has returned. False: a call of
  // NIXL's does not return; it is left behind with all that it knows, so the pool must stay mapped from now on. Waits
  // up to kNixlPatience; a second call answers at once. REQUIRES: no other call meanwhile or after it
  bool end();

  const Window& window() const override { return window_; }
  LeaseWords& words() override;
  bool fetch(const std::string& owner, const Window& window, const Piece& piece,
             std::function<void(Fetched)> done) override;
  void forget(const std::string& owner) override;

 private:
  struct Landing;  // memory that reads go to, and which of its pieces are free
  struct Order;
  struct Core;  // what the thread uses, which outlives this when NIXL hangs

  explicit NixlReads(std::shared_ptr<Core> core) : core_(std::move(core)) {}
  void post(std::unique_ptr<Order> order);

  Window window_;
  const std::shared_ptr<Core> core_;
  bool running_ = false;  // the thread, as far as is known
  bool left_behind_ = false;
};

}  // namespace flexkv::peer
