// What may lie in the directories of the SSD tier: files of a store in which bytes, slots and whole files were damaged,
// swapped, cut or brought back, and bytes that were never a store. The first byte of the input chooses.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "flexkv/admission/write_budget.h"
#include "flexkv/base/assert.h"
#include "flexkv/disk/recovery.h"
#include "input.h"

namespace flexkv::disk {
namespace {

using admission::WriteBudget;
using fuzz::Bytes;
using fuzz::Input;
using KeyPair = std::pair<std::uint64_t, std::uint64_t>;

constexpr std::size_t kSlotBytes = 32;
constexpr unsigned kDrives = 2;
constexpr unsigned kModels = 2;
constexpr std::uint32_t kSlots = 8;  // of a drive
constexpr std::uint64_t kKeys = 12;

KeyPair pair(const key::BlockKey& key) { return {key.high, key.low}; }
// 0: none. The block before block n is n / 2.
key::BlockKey key_of(std::uint64_t block) { return {block, block % 3}; }

// Hands in the records of all drives, then checks what comes out, and that every record is accounted for.
template <typename Serve>
void recover(const SpaceCodec& codec, std::uint64_t epoch, const std::vector<Bytes>& drives,
             const std::vector<std::uint32_t>& slot_limits, Serve serve) {
  std::size_t count = 0;
  std::size_t empty = 0;
  for (const Bytes bytes : drives) {
    for (std::size_t at = 0; at + kRecordBytes <= bytes.size(); at += kRecordBytes, ++count) {
      empty += std::ranges::all_of(bytes.subspan(at, kRecordBytes), [](std::byte byte) { return byte == std::byte{}; });
    }
  }
  Recovery recovery(codec, epoch, static_cast<unsigned>(drives.size()), count);
  for (unsigned drive = 0; drive < drives.size(); ++drive) recovery.add(drive, 0, slot_limits[drive], drives[drive]);
  std::set<KeyPair> keys;
  std::set<std::uint32_t> slots;
  recovery.emit([&](std::span<const Chain> chains) {
    for (const Chain& chain : chains) {
      FLEXKV_ASSERT(!chain.keys.empty() && chain.keys.size() == chain.slots.size());
      key::BlockKey parent = chain.parent;
      for (std::size_t i = 0; i < chain.keys.size(); ++i) {
        const std::uint32_t index = chain.slots[i] / kDrives;
        const Bytes drive = drives[chain.slots[i] % kDrives];
        FLEXKV_ASSERT(index < slot_limits[chain.slots[i] % kDrives]);
        const auto bytes = drive.subspan(index * kRecordBytes).first<kRecordBytes>();
        Record record;
        FLEXKV_ASSERT(codec.decode(bytes, index, record) == SpaceCodec::Found::kRecord);
        FLEXKV_ASSERT(record.key == chain.keys[i] && record.parent == parent && record.epoch == epoch);
        FLEXKV_ASSERT(parent == kNoParent || keys.contains(pair(parent)));  // no hole
        FLEXKV_ASSERT(keys.insert(pair(chain.keys[i])).second && slots.insert(chain.slots[i]).second);
        parent = chain.keys[i];
        serve(chain.keys[i], chain.slots[i], bytes);
      }
    }
  });
  const Discarded& discarded = recovery.discarded();
  FLEXKV_ASSERT(recovery.recovered() == keys.size());
  FLEXKV_ASSERT(keys.size() + empty + discarded.damaged + discarded.other_epoch + discarded.out_of_range +
                    discarded.duplicate + discarded.orphan ==
                count);
}

// ---- a store that was written, and then damaged --------------------------------------------------------------------

class Store {
 public:
  using File = std::vector<std::byte>;

  Store() {
    for (unsigned model = 0; model < kModels; ++model) {
      codecs_.emplace_back(SpaceId{static_cast<std::uint8_t>(model + 1)}, kSlotBytes);
    }
    for (unsigned i = 0; i < kModels * kDrives; ++i) {
      records_[i].resize(kHeaderBytes + kSlots * kRecordBytes);
      blocks_[i].resize(kSlots * kSlotBytes);
    }
    for (unsigned model = 0; model < kModels; ++model) reset(model);
  }

  void write(unsigned model, std::uint32_t slot, std::uint64_t block) {
    const SpaceCodec& codec = codecs_[model];
    const key::BlockKey key = key_of(block);
    std::array<std::byte, kSlotBytes> payload{};
    ++sequence_;
    std::memcpy(payload.data(), &sequence_, sizeof sequence_);
    written_[{model, epochs_[model], block}].insert(sequence_);
    const std::uint64_t checksum = codec.payload_checksum(key, epochs_[model], payload);
    const std::uint32_t index = slot / kDrives;
    const RecordBytes record = codec.encode({key, key_of(block / 2), checksum, sequence_, epochs_[model]}, index);
    const unsigned file = model * kDrives + slot % kDrives;
    put(blocks_[file], index * kSlotBytes, payload);
    put(records_[file], kHeaderBytes + index * kRecordBytes, record);
  }
  void reset(unsigned model) {
    epochs_[model] = next_epoch(epochs_[model], 0, 7);
    const HeaderPage page = encode_header({codecs_[model].space(), kSlotBytes, epochs_[model]});
    for (unsigned drive = 0; drive < kDrives; ++drive) put(records_[model * kDrives + drive], 0, page);
  }

  // All files, records and blocks.
  File& file(std::uint8_t number) {
    const unsigned chosen = number % (2 * kModels * kDrives);
    return chosen < kModels * kDrives ? records_[chosen] : blocks_[chosen - kModels * kDrives];
  }
  static void put(File& file, std::size_t at, Bytes bytes) {
    if (at >= file.size()) return;
    std::copy_n(bytes.begin(), std::min(bytes.size(), file.size() - at),
                file.begin() + static_cast<std::ptrdiff_t>(at));
  }
  // Swaps slots, or the headers, of two files.
  static void swap(File& a, std::size_t a_at, File& b, std::size_t b_at, std::size_t size) {
    if (a_at + size > a.size() || b_at + size > b.size()) return;
    std::vector<std::byte> kept(a.begin() + static_cast<std::ptrdiff_t>(a_at),
                                a.begin() + static_cast<std::ptrdiff_t>(a_at + size));
    put(a, a_at, Bytes(b).subspan(b_at, size));
    put(b, b_at, kept);
  }

  // As a node that starts: the youngest header counts, files without a good one are empty.
  void open(unsigned model) const {
    const SpaceCodec& codec = codecs_[model];
    std::uint64_t epoch = 0;
    std::vector<Bytes> records(kDrives);
    std::vector<std::uint32_t> limits(kDrives);
    for (unsigned drive = 0; drive < kDrives; ++drive) {
      const Bytes bytes = records_[model * kDrives + drive];
      Header header;
      if (decode_header(bytes, codec.space(), kSlotBytes, header) != HeaderFault::kNone) continue;
      epoch = std::max(epoch, header.epoch);
      records[drive] = bytes.subspan(kHeaderBytes);
      const std::size_t slots = blocks_[model * kDrives + drive].size() / kSlotBytes;
      limits[drive] = static_cast<std::uint32_t>(std::min(slots, records[drive].size() / kRecordBytes));
    }
    recover(codec, epoch, records, limits, [&](const key::BlockKey& key, std::uint32_t slot, const auto& record) {
      const std::uint32_t index = slot / kDrives;
      const auto payload = Bytes(blocks_[model * kDrives + slot % kDrives]).subspan(index * kSlotBytes, kSlotBytes);
      if (!codec.holds(record, payload, index, key, epoch)) return;
      std::uint64_t sequence = 0;
      std::memcpy(&sequence, payload.data(), sizeof sequence);
      FLEXKV_ASSERT(key == key_of(key.high));
      const auto found = written_.find({model, epoch, key.high});
      FLEXKV_ASSERT(found != written_.end() && found->second.contains(sequence));
      FLEXKV_ASSERT(
          std::ranges::all_of(payload.subspan(sizeof sequence), [](std::byte b) { return b == std::byte{}; }));
    });
  }

 private:
  std::vector<SpaceCodec> codecs_;
  std::array<std::uint64_t, kModels> epochs_{};
  std::array<File, kModels * kDrives> records_;
  std::array<File, kModels * kDrives> blocks_;
  std::uint64_t sequence_ = 0;
  // By model, epoch and block: what was written there begins with this.
  std::map<std::tuple<unsigned, std::uint64_t, std::uint64_t>, std::set<std::uint64_t>> written_;
};

void fuzz_store(Input input) {
  Store store;
  std::map<std::uint8_t, Store::File> kept;
  const auto number = [&] { return input.pod<std::uint8_t>(); };
  while (!input.empty()) {
    switch (number() % 12) {
      case 0:
        store.reset(number() % kModels);
        break;
      case 1: {  // whole slots, of files of any kind
        const std::uint8_t what = number();
        const std::size_t size = what % 3 == 0 ? kHeaderBytes : what % 3 == 1 ? kRecordBytes : kSlotBytes;
        const std::size_t base = what % 3 == 1 ? kHeaderBytes : 0;
        Store::File& first = store.file(number());
        const std::size_t first_at = base + number() % kSlots * size;
        Store::swap(first, first_at, store.file(number()), base + number() % kSlots * size, size);
        break;
      }
      case 2:
        std::swap(store.file(number()), store.file(number()));
        break;
      case 3: {  // one byte
        Store::File& file = store.file(number());
        const std::size_t at = input.pod<std::uint16_t>();
        if (at < file.size()) file[at] ^= input.pod<std::byte>();
        break;
      }
      case 4: {  // shorter, or longer by zeros
        const std::uint8_t which = number();
        store.file(which).resize(input.pod<std::uint16_t>() % (kHeaderBytes + 2 * kSlots * kRecordBytes));
        break;
      }
      case 5: {
        const std::uint8_t which = number();
        kept[which] = store.file(which);
        break;
      }
      case 6:  // what lay there once comes back
        if (const auto old = kept.find(number()); old != kept.end()) store.file(old->first) = old->second;
        break;
      default: {
        const unsigned model = number() % kModels;
        const std::uint32_t slot = number() % (kSlots * kDrives);
        store.write(model, slot, 1 + number() % kKeys);
      }
    }
  }
  for (unsigned model = 0; model < kModels; ++model) store.open(model);
}

// ---- bytes ---------------------------------------------------------------------------------------------------------

// Records whose checks are right and that say anything: what a node wrote that had gone wrong.
void fuzz_records(Input input) {
  const SpaceCodec codec({1}, kSlotBytes);
  std::vector<std::vector<std::byte>> drives(kDrives);
  while (!input.empty()) {
    const auto choice = input.pod<std::uint8_t>();
    std::vector<std::byte>& drive = drives[choice % kDrives];
    const auto index = static_cast<std::uint32_t>(drive.size() / kRecordBytes);
    RecordBytes bytes{};
    if (choice % 5 == 0) {
      const Bytes raw = input.bytes(kRecordBytes);
      std::ranges::copy(raw, bytes.begin());
    } else if (choice % 5 < 4) {
      const auto any_key = [&] { return key::BlockKey{input.pod<std::uint8_t>() % 8U, 0}; };
      const key::BlockKey key = any_key();
      bytes = codec.encode({key, any_key(), 0, input.pod<std::uint8_t>(), 1 + std::uint64_t{choice} / 128}, index);
    }
    drive.insert(drive.end(), bytes.begin(), bytes.end());
  }
  std::vector<Bytes> records(drives.begin(), drives.end());
  std::vector<std::uint32_t> limits;
  for (const Bytes bytes : records) limits.push_back(static_cast<std::uint32_t>(bytes.size() / kRecordBytes));
  recover(codec, 1, records, limits, [](auto&&...) {});
}

// What is taken for a header, a record or a name is what would be written.
void fuzz_bytes(Input input) {
  const auto index = input.pod<std::uint32_t>();
  const Bytes bytes = input.rest();
  const SpaceId space{1};
  const SpaceCodec codec(space, kSlotBytes);
  HeaderPage page{};
  std::copy_n(bytes.begin(), std::min(bytes.size(), page.size()), page.begin());
  constexpr std::size_t kUsed = 80;
  Header header;
  if (decode_header(page, space, kSlotBytes, header) == HeaderFault::kNone) {
    FLEXKV_ASSERT(header.space == space && header.slot_bytes == kSlotBytes && header.epoch != 0);
    FLEXKV_ASSERT(std::memcmp(encode_header(header).data(), page.data(), kUsed) == 0);
  }
  FLEXKV_ASSERT(decode_header(bytes.first(std::min(bytes.size(), kHeaderBytes - 1)), space, kSlotBytes, header) ==
                HeaderFault::kDamaged);
  const std::span<const std::byte, kRecordBytes> first(page.data(), kRecordBytes);
  Record record;
  if (codec.decode(first, index, record) == SpaceCodec::Found::kRecord) {
    FLEXKV_ASSERT(std::ranges::equal(codec.encode(record, index), first));
  }
  const std::string_view name(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  SpaceId named{};
  if (parse_space_name(name, named)) FLEXKV_ASSERT(space_name(named) == name);
}

// What a day grants, whatever the record says.
void check_budget(const WriteBudget::State& saved, Input input) {
  admission::Endurance endurance;
  endurance.dwpd = input.pod<std::uint8_t>();
  endurance.capacity_bytes = std::uint64_t{1} << 30;
  Nanos now = 1;
  WriteBudget budget(endurance, input.pod<std::uint16_t>(), saved, now);
  const Nanos end = now + admission::kDay;
  const std::uint64_t daily = budget.daily_bytes();
  std::uint64_t granted = 0;
  while (!input.empty()) {
    now = std::min(end, now + static_cast<Nanos>(input.pod<std::uint8_t>()) * 60 * kSecond);
    const std::uint64_t bytes = daily / 1024 * input.pod<std::uint8_t>() + 1;
    if (budget.take(bytes, now) == WriteBudget::Answer::kGranted) granted += bytes;
    if (const auto state = budget.next_record(now)) {
      FLEXKV_ASSERT(WriteBudget::decode(WriteBudget::encode(*state)).ok());
      budget.recorded();
      if (budget.take(bytes, now) == WriteBudget::Answer::kGranted) granted += bytes;
    }
    const double pressure = budget.pressure(now);
    FLEXKV_ASSERT(pressure >= 0 && pressure <= 1);
    (void)budget.report(now);
    FLEXKV_ASSERT(!budget.limited() || granted <= daily - daily / 64);
  }
}

// Bytes as they come, and a good record of which one byte was changed.
void fuzz_budget(Input input) {
  const auto at = input.pod<std::uint8_t>();
  const auto change = input.pod<std::byte>();
  const Bytes raw = input.rest().first(std::min(input.rest().size(), WriteBudget::kRecordBytes));
  if (const auto state = WriteBudget::decode(raw); state.ok()) {
    FLEXKV_ASSERT(std::ranges::equal(WriteBudget::encode(state.value()), raw));
  }
  WriteBudget::State written{input.pod<std::uint64_t>(),
                             input.pod<std::uint64_t>(),
                             input.pod<std::uint64_t>(),
                             input.pod<std::uint64_t>(),
                             {}};
  written.hours.fill(input.pod<std::uint64_t>());
  WriteBudget::Record record = WriteBudget::encode(written);
  const auto saved = WriteBudget::decode(record);
  FLEXKV_ASSERT(saved.ok() == (written.observed_seconds <= std::numeric_limits<Nanos>::max() / 2 / kSecond));
  if (saved.ok()) check_budget(saved.value(), input);
  if (at >= record.size() || change == std::byte{}) return;
  record[at] ^= change;
  FLEXKV_ASSERT(!WriteBudget::decode(record).ok());
}

}  // namespace
}  // namespace flexkv::disk

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flexkv::disk;
  flexkv::fuzz::Input input(std::as_bytes(std::span(data, size)));
  switch (input.pod<std::uint8_t>() % 4) {
    case 0:
      fuzz_records(input);
      break;
    case 1:
      fuzz_bytes(input);
      break;
    case 2:
      fuzz_budget(input);
      break;
    default:
      fuzz_store(input);
  }
  return 0;
}
