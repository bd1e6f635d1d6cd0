// Recovery against a naive model: what lies in the files after writes, resets and crashes of all kinds, and what of it
// may be found.
#include "flexkv/disk/recovery.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <ostream>

namespace flexkv::disk {
namespace {

constexpr std::uint64_t kSlotBytes = 4096;
constexpr SpaceId kSpace{7};
constexpr std::uint32_t kSlotsPerDrive = 24;
constexpr std::uint32_t kKeys = 40;

// A prompt tree: the block before block n is n / 2. Low bits few, so that the table's chains are long.
key::BlockKey key_of(std::uint32_t block) {
  return block == 0 ? kNoParent : key::BlockKey{block * 0x9E3779B97F4A7C15ULL, block % 5};
}

// How a write of a record ends.
enum class Fate : std::uint8_t {
  kLands,
  kLost,  // what was there before stays
  kTorn,  // its first bytes are there
  kLate,  // lands at the end, over whatever came after it
};

struct Step {
  enum class Kind : std::uint8_t { kWrite, kRemove, kReset } kind = Kind::kWrite;
  std::uint32_t block = 0;   // 1..kKeys
  std::uint32_t parent = 0;  // what its record says; only damage of the node's makes that anything but block / 2
  std::uint32_t slot = 0;
  Fate fate = Fate::kLands;
  std::uint32_t torn_bytes = 0;
};

std::ostream& operator<<(std::ostream& out, const Step& step) {
  constexpr const char* kFates[] = {"", " lost", " torn", " late"};
  if (step.kind == Step::Kind::kReset) return out << "reset";
  if (step.kind == Step::Kind::kRemove) return out << "remove " << step.slot;
  return out << "write " << step.block << " after " << step.parent << " to " << step.slot
             << kFates[static_cast<unsigned>(step.fate)];
}

rc::Gen<Step> any_step(unsigned drives) {
  using Kind = Step::Kind;
  return rc::gen::exec([drives] {
    Step step;
    step.kind = *rc::gen::weightedElement<Kind>({{150, Kind::kWrite}, {10, Kind::kRemove}, {1, Kind::kReset}});
    step.block = *rc::gen::weightedOneOf<std::uint32_t>({{1, rc::gen::inRange<std::uint32_t>(1, 4)},
                                                         {1, rc::gen::inRange<std::uint32_t>(1, 12)},
                                                         {1, rc::gen::inRange<std::uint32_t>(1, kKeys + 1)}});
    step.parent = *rc::gen::weightedOneOf<std::uint32_t>(
        {{20, rc::gen::just(step.block / 2)}, {1, rc::gen::inRange<std::uint32_t>(0, kKeys + 1)}});
    step.slot = *rc::gen::inRange<std::uint32_t>(0, kSlotsPerDrive * drives);
    step.fate =
        *rc::gen::weightedElement<Fate>({{12, Fate::kLands}, {1, Fate::kLost}, {1, Fate::kTorn}, {1, Fate::kLate}});
    step.torn_bytes = *rc::gen::inRange<std::uint32_t>(0, kRecordBytes);
    return step;
  });
}

struct Written {
  std::uint32_t slot = 0;
  Record record;
  RecordBytes bytes{};
};

// The files of all drives.
class Medium {
 public:
  Medium(const SpaceCodec& codec, unsigned drives)
      : codec_(codec), drives_(drives), slots_(drives * std::size_t{kSlotsPerDrive}) {}

  void apply(const Step& step) {
    if (step.kind == Step::Kind::kReset) {  // acknowledged: the header is on stable storage
      epoch_ = next_epoch(epoch_, 0, static_cast<std::uint32_t>(epoch_ * 77));
      at_reset_ = written_.size();
    } else if (step.kind == Step::Kind::kRemove) {
      slots_[step.slot] = {};
    } else {
      Written write{step.slot, {key_of(step.block), key_of(step.parent), step.block, ++sequence_, epoch_}, {}};
      write.bytes = codec_.encode(write.record, step.slot / drives_);
      RecordBytes& slot = slots_[step.slot];
      if (step.fate == Fate::kLands) slot = write.bytes;
      if (step.fate == Fate::kTorn) std::copy_n(write.bytes.begin(), step.torn_bytes, slot.begin());
      if (step.fate == Fate::kLate) late_.push_back(write);
      written_.push_back(write);
    }
  }
  void end() {
    for (const Written& write : late_) slots_[write.slot] = write.bytes;
  }

  std::uint64_t epoch() const { return epoch_; }
  std::vector<std::byte> file(unsigned drive) const {
    std::vector<std::byte> bytes;
    for (std::size_t slot = drive; slot < slots_.size(); slot += drives_) {
      bytes.insert(bytes.end(), slots_[slot].begin(), slots_[slot].end());
    }
    return bytes;
  }
  // What was written that lies in the slot whole, however it came there.
  const Written* in(std::uint32_t slot) const {
    const auto found =
        std::ranges::find_if(written_, [&](const Written& w) { return w.slot == slot && w.bytes == slots_[slot]; });
    return found == written_.end() ? nullptr : &*found;
  }
  bool empty(std::uint32_t slot) const { return slots_[slot] == RecordBytes{}; }
  std::uint32_t slot_count() const { return static_cast<std::uint32_t>(slots_.size()); }
  std::uint64_t writes_before_reset() const { return at_reset_; }

 private:
  const SpaceCodec& codec_;
  const unsigned drives_;
  std::vector<RecordBytes> slots_;
  std::vector<Written> written_;
  std::vector<Written> late_;
  std::uint64_t epoch_ = next_epoch(0, 1, 1);
  std::uint64_t sequence_ = 0;
  std::uint64_t at_reset_ = 0;  // writes before the last reset
};

// What must be found, by the plainest means.
struct Expected {
  std::map<std::uint64_t, const Written*> blocks;  // by key.high
  Discarded discarded;
  std::uint64_t sequence_max = 0;
};

Expected expect(const Medium& medium, unsigned drives, std::uint32_t slot_limit) {
  Expected expected;
  std::map<std::uint64_t, const Written*> newest;
  for (std::uint32_t slot = 0; slot < medium.slot_count(); ++slot) {
    const Written* written = medium.in(slot);
    if (written == nullptr) {
      expected.discarded.damaged += !medium.empty(slot);
      continue;
    }
    if (written->record.epoch != medium.epoch()) {
      ++expected.discarded.other_epoch;
      continue;
    }
    expected.sequence_max = std::max(expected.sequence_max, written->record.sequence);
    if (slot / drives >= slot_limit) {
      ++expected.discarded.out_of_range;
      continue;
    }
    const Written*& known = newest[written->record.key.high];
    expected.discarded.duplicate += known != nullptr;
    if (known == nullptr || known->record.sequence < written->record.sequence) known = written;
  }
  for (bool more = true; more;) {
    more = false;
    for (const auto& [key, written] : newest) {
      const bool reachable =
          written->record.parent == kNoParent || expected.blocks.contains(written->record.parent.high);
      if (reachable) more |= expected.blocks.emplace(key, written).second;
    }
  }
  expected.discarded.orphan = newest.size() - expected.blocks.size();
  return expected;
}

// The files, read in pieces in any order.
void read_all(Recovery& recovery, const Medium& medium, unsigned drives, std::uint32_t slot_limit) {
  struct Piece {
    unsigned drive = 0;
    std::uint32_t first = 0;
    std::uint32_t end = 0;
    std::uint32_t turn = 0;
  };
  std::vector<Piece> pieces;
  for (unsigned drive = 0; drive < drives; ++drive) {
    for (std::uint32_t first = 0; first < kSlotsPerDrive;) {
      const std::uint32_t end = first + *rc::gen::inRange<std::uint32_t>(1, kSlotsPerDrive - first + 1);
      pieces.push_back({drive, first, end, *rc::gen::arbitrary<std::uint32_t>()});
      first = end;
    }
  }
  std::ranges::sort(pieces, {}, &Piece::turn);
  for (const Piece& piece : pieces) {
    const auto bytes = medium.file(piece.drive);
    recovery.add(piece.drive, piece.first, slot_limit,
                 std::span(bytes).subspan(piece.first * kRecordBytes, (piece.end - piece.first) * kRecordBytes));
  }
}

TEST(Recovery, FindsWhatANaiveModelFinds) {
  EXPECT_TRUE(rc::check([] {
    const SpaceCodec codec(kSpace, kSlotBytes);
    const auto drives = *rc::gen::inRange<unsigned>(1, 4);
    const auto steps = *rc::gen::scale(4, rc::gen::container<std::vector<Step>>(any_step(drives)));
    const auto slot_limit = *rc::gen::weightedOneOf<std::uint32_t>(
        {{3, rc::gen::just(kSlotsPerDrive)}, {1, rc::gen::inRange<std::uint32_t>(0, kSlotsPerDrive + 1)}});
    Medium medium(codec, drives);
    for (const Step& step : steps) medium.apply(step);
    medium.end();
    const Expected expected = expect(medium, drives, slot_limit);

    Recovery recovery(codec, medium.epoch(), drives, medium.slot_count());
    read_all(recovery, medium, drives, slot_limit);
    std::map<std::uint64_t, std::uint32_t> found;  // slot by key.high
    std::uint64_t root_sequence = 0;               // of the chain without parent that came last
    recovery.emit([&](std::span<const Chain> chains) {
      for (const Chain& chain : chains) {
        RC_ASSERT(!chain.keys.empty());
        RC_ASSERT(chain.keys.size() == chain.slots.size());
        key::BlockKey before = chain.parent;
        std::uint64_t sequence = 0;
        for (std::size_t i = 0; i < chain.keys.size(); ++i) {
          // Its parent came before it, and it was stored, there, behind that parent, since the last reset.
          RC_ASSERT(before == kNoParent || found.contains(before.high));
          const auto block = expected.blocks.find(chain.keys[i].high);
          RC_ASSERT(block != expected.blocks.end());
          const Written& written = *block->second;
          RC_ASSERT(written.record.key == chain.keys[i]);
          RC_ASSERT(written.record.parent == before);
          RC_ASSERT(written.slot == chain.slots[i]);
          RC_ASSERT(written.record.sequence > medium.writes_before_reset());
          RC_ASSERT(found.emplace(chain.keys[i].high, chain.slots[i]).second);
          sequence = std::max(sequence, written.record.sequence);
          before = chain.keys[i];
        }
        RC_ASSERT(chain.sequence == sequence);
        root_sequence = std::max(root_sequence, sequence);
      }
    });
    RC_ASSERT(found.size() == expected.blocks.size());
    RC_ASSERT(recovery.recovered() == expected.blocks.size());
    RC_ASSERT(recovery.discarded() == expected.discarded);
    RC_ASSERT(recovery.sequence_max() == expected.sequence_max);
    RC_CLASSIFY(!expected.blocks.empty(), "something found");
    RC_CLASSIFY(expected.discarded.duplicate > 0, "several copies");
    RC_CLASSIFY(expected.discarded.orphan > 0, "orphans");
    RC_CLASSIFY(expected.discarded.other_epoch > 0, "before a reset");
    RC_CLASSIFY(expected.discarded.damaged > 0, "damaged");
  }));
}

// Chains longer than a batch, and more of them than are followed at once.
TEST(Recovery, FindsLongChainsWhole) {
  EXPECT_TRUE(rc::check([] {
    const SpaceCodec codec(kSpace, kSlotBytes);
    const auto lengths =
        *rc::gen::nonEmpty(rc::gen::container<std::vector<std::uint32_t>>(rc::gen::weightedOneOf<std::uint32_t>(
            {{10, rc::gen::inRange<std::uint32_t>(1, 50)}, {1, rc::gen::inRange<std::uint32_t>(1000, 40'000)}})));
    std::uint32_t count = 0;
    for (const std::uint32_t length : lengths) count += length;
    std::vector<std::byte> file(count * kRecordBytes);
    const auto step = *rc::gen::suchThat(rc::gen::inRange<std::uint32_t>(1, count + 1),
                                         [&](std::uint32_t s) { return std::gcd(s, count) == 1; });
    std::uint64_t slot = 0;
    std::uint64_t sequence = 0;
    for (std::uint32_t chain = 0; chain < lengths.size(); ++chain) {
      key::BlockKey parent = kNoParent;
      for (std::uint32_t i = 0; i < lengths[chain]; ++i) {
        const key::BlockKey key{chain + 1, (std::uint64_t{chain} << 32 | i) * 0x9E3779B97F4A7C15ULL + 1};
        const auto bytes = codec.encode({key, parent, 0, ++sequence, 1}, static_cast<std::uint32_t>(slot));
        std::ranges::copy(bytes, file.begin() + static_cast<std::ptrdiff_t>(slot * kRecordBytes));
        slot = (slot + step) % count;
        parent = key;
      }
    }
    Recovery recovery(codec, 1, 1, count);
    recovery.add(0, 0, count, file);
    std::map<std::uint64_t, std::pair<key::BlockKey, std::uint32_t>> ends;  // last key and length, by chain
    recovery.emit([&](std::span<const Chain> chains) {
      std::size_t blocks = 0;
      for (const Chain& chain : chains) {
        auto& [last, length] = ends[chain.keys.front().high];
        RC_ASSERT(chain.parent == last);
        last = chain.keys.back();
        length += static_cast<std::uint32_t>(chain.keys.size());
        blocks += chain.keys.size();
      }
      RC_ASSERT(blocks <= Recovery::kBatchBlocks);
    });
    RC_ASSERT(ends.size() == lengths.size());
    for (const auto& [chain, end] : ends) RC_ASSERT(end.second == lengths[chain - 1]);
  }));
}

}  // namespace
}  // namespace flexkv::disk
