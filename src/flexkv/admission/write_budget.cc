#include "flexkv/admission/write_budget.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "flexkv/key/sha256.h"

namespace flexkv::admission {

namespace {

__extension__ using Wide = unsigned __int128;

constexpr double kDaysPerYear = 365;
constexpr std::uint64_t kShares = 64;          // of the daily bytes
constexpr std::uint64_t kBurstShares = 7;      // what the bucket holds
constexpr std::uint64_t kFillShares = 56;      // what it gets in a day; the last one is for charge()
constexpr std::uint64_t kChunksPerBurst = 64;  // a steady writer makes 512 records a day
constexpr std::uint64_t kChunkMin = 64 << 10;  // many times what its record takes
// Between records where nothing is limited: so many bytes, or so much time.
constexpr std::uint64_t kUnlimitedRecordBytes = std::uint64_t{4} << 30;
constexpr Nanos kUnlimitedRecordTime = 10 * kSecond;
constexpr Nanos kHour = 3600 * kSecond;
constexpr std::uint64_t kMagic = 0x0002'4257'4B46ULL;  // "FKWB", version 2

std::uint64_t to_bytes(double bytes) {
  constexpr double kMax = 9e18;
  return static_cast<std::uint64_t>(std::clamp(bytes, 1.0, kMax));
}

std::uint64_t checksum(const WriteBudget::Record& record) {
  auto state = key::sha256_initial_state();
  const std::size_t end = record.size() - sizeof(std::uint64_t);
  for (std::size_t at = 0; at < end; at += key::kShaBlockBytes) {
    std::array<std::uint8_t, key::kShaBlockBytes> block{};
    std::memcpy(block.data(), record.data() + at, std::min(end - at, block.size()));
    key::sha256_compress(state, block);
  }
  return key::to_block_key(state).high;
}

}  // namespace

WriteBudget::WriteBudget(const Endurance& endurance, std::uint64_t write_bytes_max, const std::optional<State>& saved,
                         Nanos now)
    : now_(now), recorded_at_(now) {
  const double days = endurance.years * kDaysPerYear;
  double daily = std::numeric_limits<double>::infinity();
  if (endurance.dwpd > 0 && endurance.capacity_bytes > 0) {
    daily = endurance.dwpd * static_cast<double>(endurance.capacity_bytes);
  }
  if (endurance.tbw > 0 && days > 0) daily = std::min(daily, endurance.tbw * 1e12 / days);
  if (std::isfinite(daily)) {
    daily_ = to_bytes(daily);
    burst_ = daily_ / kShares * kBurstShares;
    fill_ = daily_ / kShares * kFillShares;
    chunk_ = std::max({burst_ / kChunksPerBurst, write_bytes_max, kChunkMin});
    life_bytes_ = daily * days;
  }
  level_ = fill_ / (kDay / kHour);
  if (saved) {
    sequence_ = saved->sequence;
    level_ = std::min(saved->level, burst_);
    written_ = saved->written;
    observed_ = static_cast<Nanos>(saved->observed_seconds) * kSecond;
    hours_ = saved->hours;
  }
  hour_ = static_cast<std::uint64_t>(observed_ / kHour);
  recorded_written_ = written_;
}

void WriteBudget::advance(Nanos now) {
  if (now <= now_) return;
  const Nanos elapsed = now - now_;
  now_ = now;
  observed_ += elapsed;
  const auto hour = static_cast<std::uint64_t>(observed_ / kHour);
  if (hour - hour_ >= kHours) hours_ = {};
  while (hour_ < hour) {
    ++hour_;
    this_hour() = 0;
  }
  const std::uint64_t room = burst_ - level_ - pending_ - reserved_;
  const auto filled = static_cast<Wide>(elapsed) * fill_ + fill_carry_;
  const auto bytes = filled / kDay;
  if (bytes >= room) {
    level_ += room;
    fill_carry_ = 0;
  } else {
    level_ += static_cast<std::uint64_t>(bytes);
    fill_carry_ = static_cast<std::uint64_t>(filled % kDay);
  }
}

void WriteBudget::count(std::uint64_t bytes) {
  written_ += bytes;
  this_hour() += bytes;
}

// So that the next write finds what it needs.
std::uint64_t WriteBudget::to_reserve() const {
  return std::max(chunk_, wanted_ > reserved_ ? wanted_ - reserved_ : std::uint64_t{0});
}

WriteBudget::Answer WriteBudget::take(std::uint64_t bytes, Nanos now) {
  advance(now);
  if (closed_) return Answer::kRefused;
  if (limited() && bytes > reserved_) {
    if (bytes > burst_) return Answer::kRefused;
    wanted_ = std::max(wanted_, bytes);
    return recording_ || level_ >= to_reserve() ? Answer::kLater : Answer::kRefused;
  }
  if (limited()) reserved_ -= bytes;
  count(bytes);
  return Answer::kGranted;
}

void WriteBudget::charge(std::uint64_t bytes, Nanos now) {
  advance(now);
  reserved_ -= std::min(bytes, reserved_);
  count(bytes);
}

double WriteBudget::pressure(Nanos now) {
  if (!limited()) return 0;
  advance(now);
  const auto left = static_cast<double>(level_ + pending_ + reserved_);
  return burst_ == 0 ? 1 : std::clamp(1 - 2 * left / static_cast<double>(burst_), 0.0, 1.0);
}

WriteBudget::State WriteBudget::state() const {
  State state{sequence_, level_, written_ + pending_ + reserved_, static_cast<std::uint64_t>(observed_ / kSecond),
              hours_};
  state.hours[hour_ % kHours] += pending_ + reserved_;
  return state;
}

std::optional<WriteBudget::State> WriteBudget::next_record(Nanos now) {
  if (recording_ || closed_) return std::nullopt;
  advance(now);
  if (limited()) {
    // Half a chunk: a record is charged itself, and must not be a reason for the next one.
    if (reserved_ >= std::max(chunk_ / 2, wanted_) || level_ < to_reserve()) return std::nullopt;
    pending_ = to_reserve();
    level_ -= pending_;
  } else {
    const std::uint64_t fresh = written_ - recorded_written_;
    if (fresh == 0 || (fresh < kUnlimitedRecordBytes && now_ - recorded_at_ < kUnlimitedRecordTime)) {
      return std::nullopt;
    }
  }
  recorded_written_ = written_;
  recorded_at_ = now_;
  recording_ = true;
  ++sequence_;
  return state();
}

void WriteBudget::recorded() {
  FLEXKV_ASSERT(recording_);
  reserved_ += pending_;
  pending_ = 0;
  wanted_ = 0;
  recording_ = false;
}

WriteBudget::State WriteBudget::close(Nanos now) {
  advance(now);
  closed_ = true;
  recording_ = false;
  level_ += pending_ + reserved_;
  pending_ = reserved_ = 0;
  ++sequence_;
  return state();
}

WriteBudget::Report WriteBudget::report(Nanos now) {
  advance(now);
  Report report{written_, 0, daily_, 0, std::numeric_limits<double>::infinity()};
  // Of the oldest hour, the part that is less than a day ago.
  const double into_hour = static_cast<double>(observed_ % kHour) / static_cast<double>(kHour);
  const std::uint64_t oldest = hours_[(hour_ + 1) % kHours];
  for (const std::uint64_t bytes : hours_) report.last_day_bytes += bytes;
  report.last_day_bytes -= static_cast<std::uint64_t>(static_cast<double>(oldest) * into_hour);
  const Nanos observed = std::clamp(observed_, kHour, kDay);  // less time than an hour makes no rate
  report.bytes_per_day =
      static_cast<double>(report.last_day_bytes) * (static_cast<double>(kDay) / static_cast<double>(observed));
  if (limited() && report.bytes_per_day > 0) {
    report.days_left = std::max(0.0, life_bytes_ - static_cast<double>(written_)) / report.bytes_per_day;
  }
  return report;
}

WriteBudget::Record WriteBudget::encode(const State& state) {
  Record record{};
  const std::uint64_t words[] = {kMagic, state.sequence, state.level, state.written, state.observed_seconds};
  static_assert(sizeof(words) + sizeof(state.hours) + sizeof(std::uint64_t) == kRecordBytes);
  std::memcpy(record.data(), words, sizeof(words));
  std::memcpy(record.data() + sizeof(words), state.hours.data(), sizeof(state.hours));
  const std::uint64_t sum = checksum(record);
  std::memcpy(record.data() + kRecordBytes - sizeof(sum), &sum, sizeof(sum));
  return record;
}

Result<WriteBudget::State> WriteBudget::decode(std::span<const std::byte> bytes) {
  constexpr auto kWhat = "record of the write budget: ";
  if (bytes.size() != kRecordBytes) {
    return Error{ErrorCode::kCorruption,
                 kWhat + std::to_string(bytes.size()) + " bytes instead of " + std::to_string(kRecordBytes)};
  }
  Record record;
  std::memcpy(record.data(), bytes.data(), kRecordBytes);
  std::array<std::uint64_t, kRecordBytes / sizeof(std::uint64_t)> words;
  std::memcpy(words.data(), record.data(), kRecordBytes);
  if (words[0] != kMagic) return Error{ErrorCode::kCorruption, std::string(kWhat) + "unknown format"};
  if (words.back() != checksum(record)) return Error{ErrorCode::kCorruption, std::string(kWhat) + "wrong checksum"};
  constexpr std::uint64_t kSecondsMax = std::numeric_limits<Nanos>::max() / 2 / kSecond;
  if (words[4] > kSecondsMax) return Error{ErrorCode::kCorruption, std::string(kWhat) + "impossible figures"};
  State state{words[1], words[2], words[3], words[4], {}};
  std::copy_n(words.begin() + 5, kHours, state.hours.begin());
  return state;
}

}  // namespace flexkv::admission
