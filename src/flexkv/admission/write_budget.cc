#include "flexkv/admission/write_budget.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "flexkv/key/sha256.h"

namespace flexkv::admission {

namespace {

__extension__ using Wide = unsigned __int128;

constexpr double kDaysPerYear = 365;
constexpr std::uint64_t kBurstShare = 8;       // of the daily bytes, the bucket holds one part
constexpr std::uint64_t kChunksPerBurst = 64;  // a steady writer makes 448 records a day
constexpr std::uint64_t kUnlimitedRecordBytes = std::uint64_t{4} << 30;  // between records where nothing is limited
constexpr double kRateFromDays = 1.0 / 24;                               // less time than that makes no rate
constexpr std::uint64_t kMagic = 0x0001'4257'4B46ULL;                    // "FKWB", version 1

std::uint64_t to_bytes(double bytes) {
  constexpr double kMax = 9e18;
  return static_cast<std::uint64_t>(std::clamp(bytes, 1.0, kMax));
}

std::uint64_t checksum(const WriteBudget::Record& record) {
  std::array<std::uint8_t, key::kShaBlockBytes> block{};
  std::memcpy(block.data(), record.data(), record.size() - sizeof(std::uint64_t));
  auto state = key::sha256_initial_state();
  key::sha256_compress(state, block);
  return key::to_block_key(state).high;
}

}  // namespace

WriteBudget::WriteBudget(const Endurance& endurance, std::uint64_t write_bytes_max, const std::optional<State>& saved,
                         Nanos now)
    : now_(now) {
  const double days = endurance.years * kDaysPerYear;
  double daily = std::numeric_limits<double>::infinity();
  if (endurance.dwpd > 0 && endurance.capacity_bytes > 0) {
    daily = endurance.dwpd * static_cast<double>(endurance.capacity_bytes);
  }
  if (endurance.tbw > 0 && days > 0) daily = std::min(daily, endurance.tbw * 1e12 / days);
  if (std::isfinite(daily)) {
    daily_ = to_bytes(daily);
    burst_ = daily_ / kBurstShare;
    chunk_ = std::max({burst_ / kChunksPerBurst, write_bytes_max, std::uint64_t{1}});
    life_bytes_ = daily * days;
  }
  level_ = burst_;
  if (saved) {
    sequence_ = saved->sequence;
    level_ = std::min(saved->level, burst_);
    written_ = saved->written;
    observed_ = static_cast<Nanos>(saved->observed_seconds) * kSecond;
    recent_ = saved->recent;
  }
  recorded_written_ = written_;
}

void WriteBudget::advance(Nanos now) {
  if (now <= now_) return;
  const Nanos elapsed = now - now_;
  now_ = now;
  observed_ += elapsed;
  recent_ *= std::exp(-static_cast<double>(elapsed) / static_cast<double>(kDay));
  const std::uint64_t room = burst_ - level_ - pending_ - reserved_;
  const auto filled = static_cast<Wide>(elapsed) * (daily_ - burst_) + fill_carry_;
  const auto bytes = filled / kDay;
  if (bytes >= room) {
    level_ += room;
    fill_carry_ = 0;
  } else {
    level_ += static_cast<std::uint64_t>(bytes);
    fill_carry_ = static_cast<std::uint64_t>(filled % kDay);
  }
}

bool WriteBudget::take(std::uint64_t bytes, Nanos now) {
  advance(now);
  if (closed_ || (limited() && bytes > reserved_)) return false;
  if (limited()) reserved_ -= bytes;
  written_ += bytes;
  recent_ += static_cast<double>(bytes);
  return true;
}

double WriteBudget::pressure(Nanos now) {
  if (!limited()) return 0;
  advance(now);
  const auto left = static_cast<double>(level_ + pending_ + reserved_);
  return burst_ == 0 ? 1 : std::clamp(1 - 2 * left / static_cast<double>(burst_), 0.0, 1.0);
}

WriteBudget::State WriteBudget::state() const {
  return {sequence_, level_, written_ + pending_ + reserved_, static_cast<std::uint64_t>(observed_ / kSecond), recent_};
}

std::optional<WriteBudget::State> WriteBudget::next_record(Nanos now) {
  if (recording_ || closed_) return std::nullopt;
  advance(now);
  if (limited() ? reserved_ >= chunk_ || level_ < chunk_ : written_ - recorded_written_ < kUnlimitedRecordBytes) {
    return std::nullopt;
  }
  level_ -= chunk_;
  pending_ = chunk_;
  recorded_written_ = written_;
  recording_ = true;
  ++sequence_;
  return state();
}

void WriteBudget::recorded() {
  FLEXKV_ASSERT(recording_);
  reserved_ += pending_;
  pending_ = 0;
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
  Report report{written_, daily_, 0, std::numeric_limits<double>::infinity()};
  const double observed_days = static_cast<double>(observed_) / static_cast<double>(kDay);
  report.bytes_per_day = recent_ / (1 - std::exp(-std::max(observed_days, kRateFromDays)));
  if (limited() && report.bytes_per_day > 0) {
    report.days_left = std::max(0.0, life_bytes_ - static_cast<double>(written_)) / report.bytes_per_day;
  }
  return report;
}

WriteBudget::Record WriteBudget::encode(const State& state) {
  Record record{};
  const std::uint64_t words[] = {kMagic,        state.sequence,         state.level,
                                 state.written, state.observed_seconds, std::bit_cast<std::uint64_t>(state.recent)};
  static_assert(sizeof(words) + sizeof(std::uint64_t) == kRecordBytes);
  std::memcpy(record.data(), words, sizeof(words));
  const std::uint64_t sum = checksum(record);
  std::memcpy(record.data() + sizeof(words), &sum, sizeof(sum));
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
  const auto recent = std::bit_cast<double>(words[5]);
  constexpr std::uint64_t kSecondsMax = std::numeric_limits<Nanos>::max() / 2 / kSecond;
  if (!(recent >= 0 && std::isfinite(recent)) || words[4] > kSecondsMax) {
    return Error{ErrorCode::kCorruption, std::string(kWhat) + "impossible figures"};
  }
  return State{words[1], words[2], words[3], words[4], recent};
}

}  // namespace flexkv::admission
