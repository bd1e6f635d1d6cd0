// The conversation trace through host memory and SSD, simulated with the real index and the real admission filter, at
// several sizes: what not to write everything costs in hits, and saves in wear. Blocks of 512 tokens; written to SSD
// when saved or used, while in host memory. No data is moved, no time is measured.
#include <algorithm>
#include <cstdio>

#include "bench/workloads.h"
#include "flexkv/admission/admission_filter.h"
#include "flexkv/index/prefix_index.h"

namespace flexkv::bench {
namespace {

constexpr index::Tier kHost = 0;
constexpr index::Tier kSsd = 1;

struct Rule {
  const char* name;
  bool enabled;
  double lost_hits_max;
  double pressure;
};

constexpr Rule kRules[] = {
    {"everything", false, 0, 0},
    {"lost hits <= 1 %", true, 0.01, 0},
    {"lost hits <= 3 % (default)", true, 0.03, 0},
    {"lost hits <= 10 %", true, 0.10, 0},
    {"pressure 0.10", true, 0.03, 0.10},
    {"pressure 0.15", true, 0.03, 0.15},
    {"pressure 0.20", true, 0.03, 0.20},
    {"pressure 0.30", true, 0.03, 0.30},
    {"pressure 0.50: used twice", true, 0.03, 0.50},
    {"pressure 0.75: used three times", true, 0.03, 0.75},
};

struct Figures {
  std::uint64_t asked = 0;
  std::uint64_t host_hits = 0;
  std::uint64_t ssd_hits = 0;
  std::uint64_t written = 0;
  admission::AdmissionFilter::Stats filter;
  double threshold = 0;

  std::uint64_t hits() const { return host_hits + ssd_hits; }
};

class TwoTiers {
 public:
  TwoTiers(std::uint32_t host_blocks, std::uint32_t ssd_blocks, const Rule& rule)
      : capacity_{host_blocks, ssd_blocks},
        rule_(rule),
        index_({.tier_count = 2, .policy = {}, .ghost_count_max = host_blocks + ssd_blocks}),
        filter_({rule.enabled, 2 * std::size_t{host_blocks + ssd_blocks}, rule.lost_hits_max, kTraceBlockTokens}) {}

  void request(std::span<const key::BlockKey> keys, Nanos now) {
    const auto found = index_.match(keys, true, now);
    const auto hits = keys.first(found.block_count);
    const auto fresh = keys.subspan(found.block_count);
    figures_.asked += keys.size();
    for (const auto slot : slots(found.pin, kHost, 0, found.block_count)) {
      ++(slot == index::kNoSlot ? figures_.ssd_hits : figures_.host_hits);
    }
    fill(found.pin, kHost, 0, found.block_count, now);
    make_room(kHost, fresh.size(), now);
    const std::vector<index::Slot> behind(fresh.size(), 0);
    index_.insert(found.pin, kHost, fresh, behind, now, rejected_);

    filter_.on_hit(hits);
    filter_.on_save(fresh, {found.block_count, static_cast<std::uint32_t>(keys.size()), found.block_count,
                            hits.empty() ? nullptr : &hits.back()});
    const auto on_ssd = slots(found.pin, kSsd, 0, static_cast<std::uint32_t>(keys.size()));
    const auto kept = static_cast<std::uint32_t>(std::ranges::find(on_ssd, index::kNoSlot) - on_ssd.begin());
    const auto verdict = filter_.admit(keys.subspan(kept), rule_.pressure);
    figures_.written += fill(found.pin, kSsd, kept, kept + static_cast<std::uint32_t>(verdict.count), now);
    index_.unpin(found.pin, evicted_);
  }

  Figures figures() const {
    Figures figures = figures_;
    figures.filter = filter_.stats();
    figures.threshold = filter_.threshold();
    return figures;
  }

 private:
  std::vector<index::Slot> slots(index::PinId pin, index::Tier tier, std::uint32_t first, std::uint32_t end) const {
    std::vector<index::Slot> out(end - first);
    index_.collect(pin, tier, first, out);
    return out;
  }
  void make_room(index::Tier tier, std::size_t blocks, Nanos now) {
    const std::uint64_t after = index_.block_count(tier) + blocks;
    if (after > capacity_[tier]) index_.evict(tier, static_cast<std::uint32_t>(after - capacity_[tier]), now, evicted_);
    evicted_.clear();
  }
  // Gives the blocks [first, end) of the path a slot in the tier; returns how many had none.
  std::uint64_t fill(index::PinId pin, index::Tier tier, std::uint32_t first, std::uint32_t end, Nanos now) {
    std::uint64_t missing = 0;
    for (const auto slot : slots(pin, tier, first, end)) missing += slot == index::kNoSlot;
    make_room(tier, missing, now);
    const std::vector<index::Slot> given(end - first, 0);
    index_.add_residency(pin, tier, first, given, now, rejected_);
    rejected_.clear();
    return missing;
  }

  const std::uint64_t capacity_[2];
  const Rule rule_;
  index::PrefixIndex index_;
  admission::AdmissionFilter filter_;
  Figures figures_;
  std::vector<index::PrefixIndex::Evicted> evicted_;
  std::vector<index::Slot> rejected_;
};

double percent(double part, double whole) { return whole == 0 ? 0 : 100 * part / whole; }

void replay(const std::vector<TraceRequest>& trace, std::uint32_t host_blocks, std::uint32_t ssd_blocks) {
  std::printf("\nhost %u blocks, SSD %u blocks\n%-34s %7s %7s %9s %9s %9s %7s %9s\n", host_blocks, ssd_blocks,
              "written to SSD", "host %", "SSD %", "hits", "written", "saved", "lost %", "threshold");
  Figures all;
  for (const Rule& rule : kRules) {
    TwoTiers tiers(host_blocks, ssd_blocks, rule);
    Keys keys;
    for (const auto& request : trace) {
      keys.clear();
      for (std::uint32_t at = 0; at < request.tokens / kTraceBlockTokens; ++at) {
        keys.push_back({Prng::mix(request.blocks[at] + 1), Prng::mix(~std::uint64_t{request.blocks[at]})});
      }
      tiers.request(keys, static_cast<Nanos>(request.seconds * kSecond));
    }
    const Figures one = tiers.figures();
    if (all.asked == 0) all = one;
    const auto asked = static_cast<double>(one.asked);
    std::printf("%-34s %7.2f %7.2f %+8.2f%% %9lu %+8.1f%% %7.2f %9.2f\n", rule.name,
                percent(static_cast<double>(one.host_hits), asked), percent(static_cast<double>(one.ssd_hits), asked),
                percent(static_cast<double>(one.hits()), static_cast<double>(all.hits())) - 100, one.written,
                percent(static_cast<double>(one.written), static_cast<double>(all.written)) - 100,
                percent(static_cast<double>(one.filter.lost_hits), static_cast<double>(one.hits())), one.threshold);
  }
}

}  // namespace
}  // namespace flexkv::bench

int main(int argc, char** argv) {
  using namespace flexkv::bench;
  if (argc != 2) {
    std::fprintf(stderr, "usage: admission_bench TRACE\n");
    return 2;
  }
  const auto trace = read_trace(argv[1]);
  if (!trace.ok()) {
    std::fprintf(stderr, "%s\n", trace.error().message.c_str());
    return 1;
  }
  constexpr std::pair<std::uint32_t, std::uint32_t> kSizes[] = {
      {2'000, 30'000}, {10'000, 30'000}, {10'000, 100'000}, {10'000, 200'000}, {50'000, 200'000}};
  for (const auto& [host_blocks, ssd_blocks] : kSizes) replay(trace.value(), host_blocks, ssd_blocks);
}
