// One-sided reads through Mooncake's Transfer Engine, which has a Python interface only: a process of its own
// (flexkv.mooncake.reader) runs it, both for this node's reads and for those of others. It maps the pool and the
// leases' words so that they cannot be written to, and registers nothing else: who reaches Mooncake's ports may read
// them, and write nowhere (docs/decisions/0035).
//
// That process may hang or die at any time. Then what it was to read has failed, it is killed, and another one is
// started after a rest. Each has memory of its own where reads land, so nothing comes from one that is gone.
// A thread of this object's own starts, tells and hears it; it sleeps unless there is something to do.
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "flexkv/base/time.h"
#include "flexkv/ipc/helper_process.h"
#include "flexkv/peer/landing.h"
#include "flexkv/peer/one_sided.h"

namespace flexkv::peer {

constexpr Nanos kMooncakeStartTime = 60 * kSecond;  // until it must be ready
constexpr Nanos kMooncakeSilence = 5 * kSecond;     // while reads are under way; it gives a sign each second
constexpr Nanos kMooncakeRestMin = kSecond;         // doubled with each failure until a read has come
constexpr Nanos kMooncakeRestMax = 300 * kSecond;
constexpr std::size_t kMooncakeNameMax = 255;

// "HOST:PORT", by which a Transfer Engine finds another one. Others than these reach the process nowhere.
bool is_mooncake_name(std::string_view name);

class MooncakeReads final : public OneSided {
 public:
  // `helper`: the command that starts the process; `host`: by which other nodes reach this machine. `pool` outlives
  // this object. Does not wait for the process: window() says when it is ready.
  static Result<std::unique_ptr<MooncakeReads>> start(std::vector<std::string> helper, const std::string& host,
                                                      const memory::HostRegion& pool);
  ~MooncakeReads() override { (void)end(); }

  Transport transport() const override { return Transport::kMooncake; }
  std::shared_ptr<const Window> window() const override;
  std::span<const std::byte> pool() const override { return {pool_.data(), pool_.bytes()}; }
  LeaseWords& words() override { return words_; }
  bool fetch(const std::string& owner, const Window& window, const Piece& piece,
             std::function<void(Fetched)> done) override;
  std::string trouble() const override;
  void forget(const std::string&) override {}  // Mooncake connects anew by itself
  bool end() override;                         // kills the process

  // Of the process that is ready, for tests; 0: none is.
  pid_t helper_pid() const;

 private:
  struct Order {
    std::string owner;  // Mooncake's name of it
    Piece piece;
    std::function<void(Fetched)> done;
    std::shared_ptr<Landing> landing;
    std::size_t landing_piece = 0;
  };
  struct Helper {
    Helper(ipc::HelperProcess started, std::shared_ptr<Landing> memory, Nanos now)
        : process(std::move(started)), landing(std::move(memory)), heard(now) {}

    ipc::HelperProcess process;
    const std::shared_ptr<Landing> landing;
    Nanos heard;  // from it, or when it last got something to do after it had nothing
    bool ready = false;
    std::map<std::uint64_t, Order> under_way;
  };

  MooncakeReads(std::vector<std::string> helper, const memory::HostRegion& pool, memory::HostRegion words, Fd wake);

  void run();
  void wait(std::optional<Nanos> until);
  bool stopping() const;
  Result<> begin_helper();
  Result<> tell();
  Result<> hear();
  Result<> take_answer(std::span<const std::byte> frame);
  Result<> take_end(std::uint64_t id, bool ok);
  void end_helper(const std::string& why);
  std::optional<Nanos> deadline() const;

  const std::vector<std::string> command_;
  const memory::HostRegion& pool_;
  const memory::HostRegion words_memory_;
  LeaseWords words_;
  const Fd wake_;

  mutable std::mutex mutex_;
  std::shared_ptr<const Window> window_;  // null: no process is ready
  std::shared_ptr<Landing> landing_;      // its
  pid_t helper_pid_ = 0;
  std::string trouble_;
  std::deque<Order> ordered_;
  bool stop_ = false;

  // The thread's own.
  std::optional<Helper> helper_;
  Nanos start_at_ = 0;
  Nanos rest_ = kMooncakeRestMin;
  std::uint64_t last_id_ = 0;
  std::thread thread_;
};

}  // namespace flexkv::peer
