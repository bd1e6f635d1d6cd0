// The process in which Mooncake's store client runs, which has a Python interface only
// (python/flexkv/mooncake/store.py; docs/decisions/0036). It may hang or die at any time: then what it had to do has
// failed, it is killed, and another one is started after a rest. Each has memory of its own for what is written and
// read, so nothing comes from one that is gone. A thread of this object's own starts, tells and hears it.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "flexkv/base/fd.h"
#include "flexkv/base/result.h"
#include "flexkv/base/time.h"
#include "flexkv/ipc/helper_process.h"
#include "flexkv/remote/mooncake_memory.h"
#include "flexkv/remote/store.h"

namespace flexkv::remote {

constexpr Nanos kMooncakeStartTime = 60 * kSecond;  // until it must be ready
constexpr Nanos kMooncakeSilence = 5 * kSecond;     // while it has something to do; it gives a sign each second
constexpr Nanos kMooncakeCallTime = 60 * kSecond;   // for one order; Mooncake itself gives up after 30 s
constexpr Nanos kMooncakeRestMin = kSecond;         // doubled with each failure until an order was carried out
constexpr Nanos kMooncakeRestMax = 30 * kSecond;
constexpr std::size_t kMooncakeTextMax = 255;

// What the two say to each other, one frame each; python/flexkv/mooncake/store.py has the same.
struct MooncakeOrder {
  enum class Kind : std::uint64_t { kPut = 1, kGet, kList };
  std::uint64_t id = 0;
  Kind kind{};
  std::uint64_t memory_offset = 0;  // of its piece
  std::uint64_t bytes = 0;          // of what is written or read; kList: there is room for so many
  std::uint64_t argument = 0;  // kPut: 1 to replace; kGet: offset in the object; kList: length of the folder's name
  std::array<char, kMooncakeTextMax + 1> key{};  // ends with a zero; kList: the latest one seen, or the folder
};
static_assert(sizeof(MooncakeOrder) == 296);

class MooncakeProcess {
 public:
  struct Answer {
    OpId id = 0;
    StoreOutcome outcome = StoreOutcome::kFailed;
    std::uint64_t bytes = 0;  // of a list: so many of the piece are names
    bool more = false;        // of a list
    std::string why;
  };

  // `command` starts it. Does not wait for that.
  static Result<std::unique_ptr<MooncakeProcess>> start(std::vector<std::string> command);
  // Kills it, which takes 2 s at most.
  ~MooncakeProcess();
  MooncakeProcess(const MooncakeProcess&) = delete;
  MooncakeProcess& operator=(const MooncakeProcess&) = delete;

  // Of the process that there is, ready or not yet. Null: there is none for now, because of trouble().
  std::shared_ptr<MooncakeMemory> memory() const;
  std::string trouble() const;
  // One answer follows; a failure at once if the process whose memory this is has gone.
  void order(const MooncakeOrder& order, std::shared_ptr<MooncakeMemory> memory);
  // Waits for answers, for wake() or until then; nothing: as long as it takes.
  void wait(std::optional<Nanos> until, std::vector<Answer>& answers);
  void wake();

  // Of the process that is ready, for tests; 0: none is.
  pid_t pid() const;

 private:
  struct Ordered {
    MooncakeOrder order;
    std::shared_ptr<MooncakeMemory> memory;
  };
  struct Helper {
    Helper(ipc::HelperProcess started, std::shared_ptr<MooncakeMemory> given, Nanos now)
        : process(std::move(started)), memory(std::move(given)), heard(now) {}

    ipc::HelperProcess process;
    const std::shared_ptr<MooncakeMemory> memory;
    Nanos heard;  // from it, or when it last got something to do after it had nothing
    bool ready = false;
    std::map<OpId, Nanos> under_way;  // since when
  };

  MooncakeProcess(std::vector<std::string> command, std::unique_ptr<MooncakeMemory> memory, Fd wake);
  void run();
  bool stopping() const;
  std::optional<Nanos> deadline() const;
  void sleep(std::optional<Nanos> until);
  Result<> begin_helper();
  Result<> tell();
  Result<> hear();
  Result<> take(std::span<const std::byte> frame);
  void answer(Answer one);
  void end_helper(const std::string& why);

  const std::vector<std::string> command_;
  const Fd wake_;  // the thread's

  mutable std::mutex mutex_;
  std::condition_variable answered_;
  std::shared_ptr<MooncakeMemory> memory_;
  std::string trouble_;
  pid_t pid_ = 0;
  std::deque<Ordered> ordered_;
  std::vector<Answer> answers_;
  bool woken_ = false;
  bool stop_ = false;

  // The thread's own.
  std::optional<Helper> helper_;
  Nanos start_at_ = 0;
  Nanos rest_ = kMooncakeRestMin;
  std::thread thread_;
};

}  // namespace flexkv::remote
