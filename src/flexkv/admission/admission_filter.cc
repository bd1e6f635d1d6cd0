#include "flexkv/admission/admission_filter.h"

#include <algorithm>
#include <bit>

#include "flexkv/base/assert.h"

namespace flexkv::admission {

namespace {

constexpr double kSecondTouchFrom = 0.5;  // pressure
constexpr double kFrequencyFrom = 0.75;
constexpr unsigned kUsesAtFrequency = 3;
constexpr unsigned kUsesAtFullPressure = 10;
constexpr double kLikelihoodAtSecondTouch = 1.5;  // what the threshold rises by until only second touches get in
// These count blocks of 512 tokens.
constexpr std::uint32_t kUnitTokens = 512;
constexpr double kStep = 0.0005;      // of the threshold, per hit or lost hit: follows thousands of blocks
constexpr float kReusedMin = 16;      // before that nothing is known of which blocks come back
constexpr float kPriorBlocks = 256;   // as if so many average blocks had been seen in every context
constexpr float kFreshMax = 1 << 15;  // what was seen before so many new blocks counts half
constexpr float kScaleMax = 256;      // so that a float counts kFreshMax of smaller blocks exactly

constexpr double kThresholdMax = 4;   // so that it is soon back when the load changes
constexpr unsigned kPopularFrom = 8;  // uses: a prefix that many share, not one conversation
constexpr std::uint8_t kUsesMax = 255;

}  // namespace

const char* to_string(Refusal refusal) {
  switch (refusal) {
    case Refusal::kNone:
      return "none";
    case Refusal::kUnlikely:
      return "unlikely";
    case Refusal::kOnce:
      return "once";
    case Refusal::kRare:
      return "rare";
  }
  return "?";
}

AdmissionFilter::AdmissionFilter(const Options& options)
    : options_(options),
      scale_(std::min(static_cast<float>(kUnitTokens) / static_cast<float>(std::max(options.block_tokens, 1U)),
                      kScaleMax)) {
  if (!options_.enabled) return;
  constexpr std::size_t kPerBucket = std::tuple_size_v<decltype(Bucket::entries)>;
  buckets_.resize(std::bit_ceil(std::max<std::size_t>(options_.remembered_blocks / kPerBucket, 1)));
  outcomes_.resize(std::size_t{kDepths} * kLengths * kPopularities);
}

std::size_t AdmissionFilter::memory_bytes() const {
  return buckets_.capacity() * sizeof(Bucket) + outcomes_.capacity() * sizeof(Outcome);
}

AdmissionFilter::Bucket& AdmissionFilter::bucket_of(const key::BlockKey& key) {
  return buckets_[key.low & (buckets_.size() - 1)];
}

AdmissionFilter::Entry* AdmissionFilter::find(const key::BlockKey& key) {
  for (Entry& entry : bucket_of(key).entries) {
    if (entry.uses > 0 && entry.fingerprint == static_cast<std::uint32_t>(key.high)) return &entry;
  }
  return nullptr;
}

AdmissionFilter::Entry& AdmissionFilter::touch(const key::BlockKey& key) {
  auto& entries = bucket_of(key).entries;
  const Entry* found = find(key);
  const auto at = found == nullptr ? entries.size() - 1 : static_cast<std::size_t>(found - entries.data());
  const Entry entry = found == nullptr ? Entry{static_cast<std::uint32_t>(key.high), 0, 0, false} : *found;
  std::copy_backward(entries.begin(), entries.begin() + static_cast<std::ptrdiff_t>(at),
                     entries.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  return entries.front() = entry;
}

void AdmissionFilter::use_again(Entry& entry) {
  if (entry.uses == 1) {
    ++outcomes_[entry.context].reused;
    ++all_.reused;
  }
  if (entry.uses < kUsesMax) ++entry.uses;
}

std::uint16_t AdmissionFilter::context_of(std::uint32_t depth, std::uint32_t length, unsigned popularity) const {
  const unsigned d = std::min(static_cast<unsigned>(std::bit_width(depth)), kDepths - 1);
  const unsigned l = std::min(static_cast<unsigned>(std::bit_width(length)), kLengths - 1);
  return static_cast<std::uint16_t>((d * kLengths + l) * kPopularities + popularity);
}

double AdmissionFilter::likelihood(std::uint16_t context) const {
  if (!knows_enough()) return 1;
  // Begins at the average: few blocks, mostly of one prompt, prove little.
  const float average = all_.reused / all_.fresh;
  const Outcome& outcome = outcomes_[context];
  const float prior = kPriorBlocks * scale_;
  return static_cast<double>((outcome.reused + prior * average) / (outcome.fresh + prior) / average);
}

bool AdmissionFilter::knows_enough() const { return all_.reused >= kReusedMin * scale_; }

void AdmissionFilter::on_hit(std::span<const key::BlockKey> keys) {
  if (!options_.enabled) return;
  for (const auto& key : keys) {
    // Of a block that came from before the start nothing is known but that it was used before.
    Entry& entry = touch(key);
    if (entry.uses == 0) {
      entry.uses = 2;
    } else {
      use_again(entry);
    }
  }
  stats_.hits += keys.size();
  if (!knows_enough()) return;
  const double step = kStep / static_cast<double>(scale_) * options_.lost_hits_max;
  threshold_ = std::min(threshold_ + step * static_cast<double>(keys.size()), kThresholdMax);
}

void AdmissionFilter::on_save(std::span<const key::BlockKey> keys, const Origin& origin) {
  if (!options_.enabled) return;
  const Entry* before = origin.last_found == nullptr ? nullptr : find(*origin.last_found);
  const unsigned popularity = before == nullptr ? 0 : before->uses < kPopularFrom ? 1 : 2;
  const std::uint32_t end = origin.depth + static_cast<std::uint32_t>(keys.size());
  const std::uint32_t length = std::max(origin.prompt, end) - origin.found;
  std::uint32_t depth = origin.depth;
  for (const auto& key : keys) {
    Entry& entry = touch(key);
    if (entry.uses > 0) {
      use_again(entry);
      if (entry.refused) {
        ++stats_.lost_hits;
        threshold_ -= kStep / static_cast<double>(scale_) * (1 - options_.lost_hits_max);
      }
    } else {
      entry.uses = 1;
      entry.context = context_of(depth, length, popularity);
      for (Outcome* outcome : {&outcomes_[entry.context], &all_}) {
        if (++outcome->fresh > kFreshMax * scale_) outcome->fresh /= 2, outcome->reused /= 2;
      }
    }
    ++depth;
  }
  threshold_ = std::max(threshold_, 0.0);
}

Refusal AdmissionFilter::judge(unsigned uses, double likely, double pressure) const {
  if (pressure >= kFrequencyFrom) {
    const double rise = (pressure - kFrequencyFrom) / (1 - kFrequencyFrom) * (kUsesAtFullPressure - kUsesAtFrequency);
    if (uses < kUsesAtFrequency + static_cast<unsigned>(rise)) return Refusal::kRare;
  }
  if (uses >= 2) return Refusal::kNone;
  if (pressure >= kSecondTouchFrom) return Refusal::kOnce;
  const double asked = threshold_ + kLikelihoodAtSecondTouch * pressure / kSecondTouchFrom;
  return likely < asked ? Refusal::kUnlikely : Refusal::kNone;
}

AdmissionFilter::Verdict AdmissionFilter::admit(std::span<const key::BlockKey> keys, double pressure) {
  Verdict verdict{keys.size(), Refusal::kNone};
  if (!options_.enabled) {
    stats_.admitted += keys.size();
    return verdict;
  }
  bool unlikely = false;
  for (std::size_t at = 0; at < keys.size(); ++at) {
    Entry* entry = find(keys[at]);
    const unsigned uses = entry == nullptr ? 1 : entry->uses;
    const double likely = entry == nullptr ? 1 : likelihood(entry->context);
    if (verdict.why == Refusal::kNone) {
      verdict.why = judge(uses, likely, pressure);
      if (verdict.why != Refusal::kNone) verdict.count = at;
    }
    // Only what is refused without pressure, too, is the threshold's fault.
    unlikely = unlikely || judge(uses, likely, 0) != Refusal::kNone;
    if (entry != nullptr) entry->refused = unlikely;
  }
  const std::uint64_t refused = keys.size() - verdict.count;
  stats_.admitted += verdict.count;
  if (verdict.why == Refusal::kUnlikely) stats_.refused_unlikely += refused;
  if (verdict.why == Refusal::kOnce) stats_.refused_once += refused;
  if (verdict.why == Refusal::kRare) stats_.refused_rare += refused;
  return verdict;
}

}  // namespace flexkv::admission
