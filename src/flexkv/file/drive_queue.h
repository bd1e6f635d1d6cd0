// What a drive does with its requests, without threads, system calls or a clock: which I/O comes next, what an ended
// I/O means for the requests in it, deadlines, cancellation, and whether the drive is fit to serve at all.
//
// A request waits in one of three lines (by urgency) until its bytes are handed to I/Os. Small neighbours share an I/O,
// large requests take several. An I/O occupies a slot from begin() until end() says that it is over; end() may also
// give it back to begin() (a short transfer, a passing error), and then it keeps its slot and its age.
//
// Externally synchronized; one owner (LaneDrive under its mutex, or a simulation).
#pragma once

#include <sys/uio.h>

#include <deque>
#include <list>
#include <map>
#include <optional>
#include <unordered_map>
#include <vector>

#include "flexkv/file/breaker.h"
#include "flexkv/file/drive.h"

namespace flexkv::file {

struct DriveLimits {
  std::uint32_t depth = 64;                   // I/Os at the drive at once,
  std::uint64_t flight_bytes_max = 64 << 20;  // and their bytes, but for what one I/O is over: a load waits behind them
  // Of reads alone: more keep a drive no busier, and the fewer share it, the earlier the first of them is there, to be
  // checked and copied while the drive reads the next.
  std::uint64_t read_bytes_max = 32 << 20;
  std::size_t io_bytes_max = 4 << 20;
  std::uint32_t queue_requests_max = 8192;
  std::uint64_t queue_bytes_max = 16ULL << 30;
  BreakerLimits breaker{};
};

// One transfer for the kernel. Valid until its end().
struct Io {
  std::uint32_t slot = 0;  // < DriveQueue::slot_count()
  Op op = Op::kRead;
  FileId file{};
  std::uint64_t offset = 0;
  std::vector<iovec> parts;  // of consecutive bytes of the file; empty for kSync
};

struct DriveEvents {
  struct Change {
    bool available;
    std::string why;
  };
  std::vector<std::uint64_t> overdue;
  std::vector<Change> changes;
  std::vector<Completion> completions;

  bool empty() const { return overdue.empty() && changes.empty() && completions.empty(); }
  void clear();
  // In an order in which a sink knows of a change before it sees what that did to its requests.
  void give_to(DriveSink& sink) const;
};

class DriveQueue {
 public:
  // The drive is probed by writing and reading the first kDirectAlignment bytes of `probe_file` at `probe_page`.
  DriveQueue(const DriveLimits& limits, FileId probe_file, std::byte* probe_page);

  bool submit(std::span<const Request> requests, Nanos now);
  void cancel(std::uint64_t tag, Nanos now);
  // Takes no more requests; those it has are served.
  void close() { closed_ = true; }
  // Fails every request that no I/O touches, and the rest of those that some does.
  void drop_waiting(int error_number, Nanos now);

  std::uint32_t slot_count() const { return static_cast<std::uint32_t>(slots_.size()); }
  // The I/O to start now; null: none. To be called until then, after anything else was called.
  const Io* begin(Nanos now);
  // `result`: bytes transferred, or -errno. Zero bytes read are the end of the file.
  void end(std::uint32_t slot, std::int64_t result, Nanos now);

  // A call for a file, beside the I/Os: one that takes longer than it may, or a step of it, hangs, and so does the
  // drive. begin_call() numbers it; end_call() comes when it is over. `what` it does is for people: "opening a file".
  std::uint64_t begin_call(const char* what, Wait wait, Nanos now);
  void step_call(std::uint64_t call, Nanos now) { calls_.at(call).since = now; }
  void end_call(std::uint64_t call) { calls_.erase(call); }

  // To be called when wakeup() has come, at the latest.
  void on_time(Nanos now);
  std::optional<Nanos> wakeup() const;

  // Replaces `events` by what has happened since the last call.
  void take(DriveEvents& events);

  DriveStats stats() const;
  bool idle() const { return request_count_ == 0 && !probing_; }
  bool available() const { return breaker_.available(); }

 private:
  struct Entry;
  using Entries = std::list<Entry>;
  using Iter = Entries::iterator;
  struct Entry {
    Request request;
    std::uint64_t sequence = 0;
    Nanos submitted = 0;
    std::size_t issued_bytes = 0;
    std::size_t landed_bytes = 0;
    std::uint32_t io_count = 0;  // in flight
    int error_number = 0;
    std::uint64_t earlier_writes = 0;  // of a sync: not completed yet
    Entries* line = nullptr;           // where it stands
    bool begun = false;
    bool alone = false;  // shared a failed I/O: to be tried without the others
  };
  struct Share {
    Iter entry;
    std::size_t bytes;
  };
  struct Slot {
    Io io;
    std::vector<Share> shares;
    Urgency urgency = Urgency::kLoad;
    std::size_t bytes = 0;
    std::size_t done_bytes = 0;
    std::uint32_t retries = 0;
    Nanos begun = 0;
    bool busy = false;
  };
  struct Start {
    FileId file;
    Op op;
    Urgency urgency;
    std::uint64_t offset;
    bool operator==(const Start&) const = default;
  };
  struct StartHash {
    std::size_t operator()(const Start& start) const;
  };

  static constexpr std::size_t kNone = kUrgencyCount;

  void enqueue(const Request& request, Nanos now);
  void move_to(Entries& line, Iter entry);
  void forget_start(Iter entry);
  static Start start_of(const Request& request);

  std::size_t pick_urgency();
  bool may_save() const;
  Slot& take_slot(Urgency urgency, Nanos now);
  void fill(Slot& slot, Iter first);
  void add_share(Slot& slot, Iter entry, std::size_t bytes);
  bool hangs_on() const;
  void stall(const char* what, Nanos age, Nanos now);
  const Io* begin_probe(Nanos now);

  void advance(Slot& slot, std::size_t bytes);
  void finish(Slot& slot, int error_number, Nanos now);
  void settle(Slot& slot, const Share& share, std::size_t done_bytes, int error_number, Nanos now);
  void release(Slot& slot);
  void end_probe(std::int64_t result, Nanos now);

  void trip(Nanos now);
  void stop_issuing(Iter entry, int error_number, Nanos now);
  void complete(Iter entry, Outcome outcome, int error_number, Nanos now);
  void complete_if_over(Iter entry, Nanos now);

  const DriveLimits limits_;
  const FileId probe_file_;
  std::byte* const probe_page_;
  Breaker breaker_;
  bool closed_ = false;

  std::uint64_t next_sequence_ = 1;
  Entries waiting_[kUrgencyCount];                     // bytes left to hand to I/Os
  Entries begun_;                                      // all bytes in flight or landed, or given up
  Entries syncs_;                                      // behind earlier writes
  std::unordered_map<Start, Iter, StartHash> starts_;  // not begun: to find neighbours
  std::map<std::pair<Nanos, std::uint64_t>, Iter> deadlines_;
  std::unordered_multimap<std::uint64_t, Iter> tags_;
  std::unordered_map<std::uint32_t, std::uint64_t> writes_;  // per file, not completed
  std::uint32_t request_count_ = 0;
  std::uint64_t request_bytes_ = 0;

  std::vector<Slot> slots_;  // the last one is the probe's
  std::vector<std::uint32_t> free_slots_;
  std::deque<std::uint32_t> again_;  // to be begun again
  struct Flight {
    std::uint32_t ios = 0;
    std::uint64_t bytes = 0;
  };
  Flight in_flight_[kUrgencyCount];
  std::uint32_t passed_over_[kUrgencyCount] = {};
  bool probing_ = false;
  struct Call {
    const char* what;
    Wait wait;
    Nanos since;  // its step began
  };
  std::map<std::uint64_t, Call> calls_;
  std::uint64_t next_call_ = 0;

  DriveEvents events_;
  DriveStats stats_;
};

}  // namespace flexkv::file
