// How many bytes may be written to a drive, so that it lives as long as it should.
//
// GUARANTEE: the bytes granted by take() in any 24 hours of real time are at most daily_bytes() less 1/64, over any
// number of restarts and crashes, whatever the wall clock does: it is not used. That 64th is for charge(), which grants
// always: small writes that correctness needs. A token bucket: it holds up to 7/64 of the daily bytes and fills with
// 7/8 evenly over 24 hours, so a steady writer gets 7/8 of the budget. It fills only by monotonic time while a
// WriteBudget lives; time off gives nothing, so a forward jump of a clock can give nothing either.
//
// Crash-safe by reserving ahead: take() spends only what a durable record already calls spent. A crash loses at most
// two chunks (each 1/64 of the bucket, or a larger write), never overspends. The I/O is the caller's:
//   start:     WriteBudget(limits, decode(file), now); unreadable: State{}, an empty bucket; no file on what seems a
//              new drive: what it fills with in an hour, because the drive may be an old one with new directories
//   any time:  if (auto state = budget.next_record(now)) { make encode(*state) durable; budget.recorded(); }
//   a write:   kGranted: write; kLater: make a record, then ask again; kRefused: do not write, reason: budget
//   clean end: once no write is to follow, make encode(budget.close(now)) durable: nothing is lost
// The record must replace the old one atomically (two alternating places, or rename), the newer sequence wins.
// If the record cannot be written, stop calling recorded(): writing ends with the reserve.
// Without a limit everything is granted and a crash loses the count of what was granted since the last record.
//
// Pure logic, thread-compatible. One per drive, or one for drives that share their writes evenly.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::admission {

inline constexpr Nanos kDay = 86'400 * kSecond;

// From a drive's data sheet. Where both limits are given the lower counts; where none is, nothing is limited.
struct Endurance {
  double dwpd = 0;                   // drive writes per day; 0: not given
  std::uint64_t capacity_bytes = 0;  // of the drive, for dwpd
  double tbw = 0;                    // 10^12 bytes written in its life; 0: not given
  double years = 5;                  // that it is to last
};

class WriteBudget {
 public:
  static constexpr std::size_t kHours = 25;  // a day, and the hour under way
  // What survives a restart.
  struct State {
    std::uint64_t sequence = 0;          // of records
    std::uint64_t level = 0;             // bytes left that are not reserved
    std::uint64_t written = 0;           // bytes ever granted, and those reserved
    std::uint64_t observed_seconds = 0;  // of running, in all
    // Of `written`, what fell into each hour of running; that of hour h lies at h % kHours.
    std::array<std::uint64_t, kHours> hours{};
  };
  static constexpr std::size_t kRecordBytes = 248;
  using Record = std::array<std::byte, kRecordBytes>;

  enum class Answer : std::uint8_t {
    kGranted,
    kLater,    // as soon as another record is durable
    kRefused,  // the bucket is empty
  };

  // `saved`: std::nullopt in a directory never used before. `write_bytes_max`: of a single write, as far as it is
  // known.
  WriteBudget(const Endurance& endurance, std::uint64_t write_bytes_max, const std::optional<State>& saved, Nanos now);

  bool limited() const { return daily_ != 0; }
  std::uint64_t daily_bytes() const { return daily_; }  // 0: no limit

  // Grants `bytes` to be written now, or does not. Granted bytes count as written whether they are or not.
  Answer take(std::uint64_t bytes, Nanos now);
  // Bytes that are written in any case. They use up the reserve as far as it goes.
  void charge(std::uint64_t bytes, Nanos now);
  // 0: at least half of the bucket is left (or nothing is limited); 1: it is empty.
  double pressure(Nanos now);

  // A record to make durable, when there is something to reserve; nothing while one is under way.
  std::optional<State> next_record(Nanos now);
  // The record is durable: what it reserves may be spent.
  void recorded();
  // The last record: gives back what was reserved and not spent. Nothing is granted any more.
  State close(Nanos now);

  struct Report {
    std::uint64_t written_bytes = 0;   // ever
    std::uint64_t last_day_bytes = 0;  // of them, in the last 24 hours of running; what is reserved included
    std::uint64_t daily_bytes = 0;     // 0: no limit
    double bytes_per_day = 0;          // at the rate of the last day of running
    double days_left = 0;  // until the drive has been written as often as it may be; infinity: no end in sight
  };
  Report report(Nanos now);

  static Record encode(const State& state);
  static Result<State> decode(std::span<const std::byte> record);

 private:
  void advance(Nanos now);
  void count(std::uint64_t bytes);
  std::uint64_t to_reserve() const;
  std::uint64_t& this_hour() { return hours_[hour_ % kHours]; }
  State state() const;

  std::uint64_t daily_ = 0;
  std::uint64_t burst_ = 0;  // what the bucket holds at most
  std::uint64_t fill_ = 0;   // in a day
  std::uint64_t chunk_ = 0;
  double life_bytes_ = 0;  // 0: not known

  std::uint64_t level_ = 0;     // not reserved
  std::uint64_t pending_ = 0;   // reserved by a record that is not durable yet
  std::uint64_t reserved_ = 0;  // may be spent
  std::uint64_t sequence_ = 0;
  std::uint64_t written_ = 0;
  std::uint64_t recorded_written_ = 0;  // at the latest record
  std::uint64_t fill_carry_ = 0;        // parts of a byte
  std::uint64_t wanted_ = 0;            // the largest write that the reserve was too small for
  std::array<std::uint64_t, kHours> hours_{};
  std::uint64_t hour_ = 0;
  Nanos observed_ = 0;
  Nanos now_;
  Nanos recorded_at_;
  bool recording_ = false;
  bool closed_ = false;
};

}  // namespace flexkv::admission
