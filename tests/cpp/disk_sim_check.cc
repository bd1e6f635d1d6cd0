// What a simulated use of the disk tier must see, and the damage that is done on purpose.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "disk_sim.h"

namespace flexkv::testing {

using disk::Outcome;

void DiskSim::check(bool right, const std::string& what) {
  if (right) return;
  ADD_FAILURE() << "FLEXKV_SEED=" << seed_ << ", life " << life_ << ", at " << now_ << " ns: " << what;
}

void DiskSim::note(const std::string& what) const {
  if (verbose_) std::fprintf(stderr, "  %lld ns: %s\n", static_cast<long long>(now_), what.c_str());
}

key::BlockKey DiskSim::block_key(const Model& model, Key key) const {
  return key == 0 ? disk::kNoParent : key::BlockKey{Prng::mix(model.id[0]), Prng::mix(key)};
}

DiskSim::Key DiskSim::key_of(const Model& model, const key::BlockKey& key) const {
  for (Key i = 0; i < model.parents.size(); ++i) {
    if (block_key(model, i) == key) return i;
  }
  return ~Key{0};
}

void DiskSim::fill(const Model& model, Key key, std::uint64_t version, std::span<std::byte> out) const {
  std::memcpy(out.data(), &version, sizeof version);
  std::uint64_t word = Prng::mix(version ^ Prng::mix(key ^ (std::uint64_t{model.id[0]} << 32)));
  for (std::size_t i = sizeof version; i < out.size(); i += sizeof word) {
    word = Prng::mix(word);
    std::memcpy(out.data() + i, &word, sizeof word);
  }
}

void DiskSim::check_bytes(const Model& model, const Op& op) {
  std::uint64_t version = 0;
  std::memcpy(&version, op.bytes.get(), sizeof version);
  const auto versions = model.versions.find(op.key);
  const bool known = versions != model.versions.end() && versions->second.contains(version);
  check(known, "a read gives bytes that were not written under its key");
  if (!known) return;
  check(versions->second.at(version) >= model.floor, "a read gives bytes from before a reset");
  std::vector<std::byte> expected(model.slot_bytes);
  fill(model, op.key, version, expected);
  check(std::memcmp(expected.data(), op.bytes.get(), expected.size()) == 0, "a read gives a mixture of bytes");
}

void DiskSim::forget(Model& model, unsigned drive, std::uint32_t first, std::uint32_t end) {
  std::erase_if(model.expected, [&](const auto& entry) {
    const std::uint32_t index = entry.first / drive_count();
    return entry.first % drive_count() == drive && index >= first && index < end;
  });
}

void DiskSim::forget_header(Model& model, unsigned drive) {
  forget(model, drive, 0);
  for (auto& [generation, drives] : model.durable_resets) drives.erase(drive);
}

// ---- what the tier says --------------------------------------------------------------------------------------------

void DiskSim::on_completions(std::span<const disk::Completion> completions) {
  for (const disk::Completion& completion : completions) {
    auto node = ops_.extract(completion.id);
    check(!node.empty(), "a transfer ends that is not under way");
    if (node.empty()) continue;
    const Op& op = node.mapped();
    Model& model = models_[op.model];
    if (--model.busy[op.slot] == 0) model.busy.erase(op.slot);
    op.write ? write_ended(model, op, completion.outcome) : read_ended(model, op, completion.outcome);
  }
}

void DiskSim::write_ended(Model& model, const Op& op, Outcome outcome) {
  note("write of slot " + std::to_string(op.slot) + ", key " + std::to_string(op.key) + ", model " +
       std::to_string(op.model) + ": " + disk::outcome_name(outcome));
  if (outcome != Outcome::kDone) {
    ++totals_.writes_failed;
    check(faulty_ || hung_ || op.excused || outcome == Outcome::kNoRoom,
          std::string("a write fails on a drive that works: ") + disk::outcome_name(outcome));
    return;
  }
  ++totals_.writes_done;
  if (op.generation != model.generation || model.overlapped.contains(op.slot)) return;
  std::erase_if(model.held, [&](const auto& held) { return held.second == op.key; });
  std::erase_if(model.expected, [&](const auto& entry) { return entry.second.key == op.key; });
  model.held[op.slot] = op.key;
  // Of two writes of one key, that of the higher sequence is found, which may not be this one.
  if (model.last_version.at(op.key) == op.version) model.expected[op.slot] = {op.key, op.generation};
}

void DiskSim::read_ended(Model& model, const Op& op, Outcome outcome) {
  const auto expected = model.expected.find(op.slot);
  const bool must = expected != model.expected.end() && expected->second.key == op.key &&
                    op.generation == model.generation && !model.overlapped.contains(op.slot);
  note("read of slot " + std::to_string(op.slot) + ", key " + std::to_string(op.key) + ", model " +
       std::to_string(op.model) + ": " + disk::outcome_name(outcome));
  switch (outcome) {
    case Outcome::kDone:
      ++totals_.reads_done;
      totals_.verified += op.bytes == nullptr;
      return op.bytes == nullptr ? void() : check_bytes(model, op);
    case Outcome::kChecksum:
      ++totals_.checksum;
      check(!must, "a block that was written is not there");
      model.expected.erase(op.slot);
      model.held.erase(op.slot);
      return;
    case Outcome::kDeadline:
      ++totals_.deadline;
      [[fallthrough]];
    default:
      ++totals_.reads_failed;
      check(!must || faulty_ || hung_ || op.excused,
            std::string("a read fails on a drive that works: ") + disk::outcome_name(outcome));
  }
}

void DiskSim::on_overdue(disk::OpId id) {
  ++totals_.overdue;
  const auto op = ops_.find(id);
  check(op != ops_.end() && !op->second.write, "what is overdue is no read under way");
  if (op == ops_.end()) return;
  const bool late = op->second.deadline > 0 && op->second.deadline <= now_;
  const bool off = off_.contains(op->second.slot % drive_count());
  check((late || off) && !op->second.overdue, "overdue without reason");
  op->second.overdue = true;
}

void DiskSim::on_recovered(disk::SpaceHandle space, std::span<const disk::Chain> chains) {
  const auto found = std::ranges::find(models_, space, &Model::handle);
  check(found != models_.end() && found->state == Model::State::kOpening && !found->was_reset,
        "blocks are recovered that nobody wants");
  if (found == models_.end()) return;
  Model& model = *found;
  std::set<Key> keys;
  for (const auto& [slot, key] : model.found) keys.insert(key);
  for (const disk::Chain& chain : chains) {
    Key before = key_of(model, chain.parent);
    check(before == 0 || keys.contains(before), "a chain comes before its parent");
    check(!chain.keys.empty() && chain.keys.size() == chain.slots.size(), "a chain without blocks");
    for (std::size_t i = 0; i < chain.keys.size(); ++i) {
      const Key key = key_of(model, chain.keys[i]);
      check(key < model.parents.size() && model.parents[key] == before, "a block is recovered in the wrong place");
      check(keys.insert(key).second, "a block is recovered twice");
      check(model.found.emplace(chain.slots[i], key).second, "a slot is recovered twice");
      before = key;
      ++totals_.recovered;
    }
  }
}

void DiskSim::on_opened(disk::SpaceHandle space, const disk::Opened& opened) {
  const auto at = std::ranges::find(models_, space, &Model::handle);
  check(at != models_.end() && at->state == Model::State::kOpening, "a space opens that nobody wants");
  if (at == models_.end()) return;
  Model& model = *at;
  ++totals_.openings;
  std::string text = "opened model " + std::to_string(at - models_.begin()) + ", slots";
  for (const std::uint32_t slots : opened.slots) text.append(" ").append(std::to_string(slots));
  const disk::Discarded& discarded = opened.discarded;
  text.append("; recovered ")
      .append(std::to_string(opened.recovered))
      .append(", not: damaged, other epoch, out of range, duplicate, orphan");
  for (const std::uint64_t count :
       {discarded.damaged, discarded.other_epoch, discarded.out_of_range, discarded.duplicate, discarded.orphan}) {
    text.append(" ").append(std::to_string(count));
  }
  for (const std::string& line : opened.dropped_files) text.append("; ").append(line);
  note(text);
  *model.slots = opened.slots;
  model.state = Model::State::kOpen;
  check(opened.slots.size() == drive_count(), "a drive has no limit");
  for (unsigned i = 0; i < drive_count(); ++i) {
    if (opened.slots[i] > 0) continue;
    model.in_doubt = true;  // it may come back with a reset that the others do not know of
    forget(model, i, 0);
  }
  for (const auto& [slot, key] : model.found) {
    check(slot / drive_count() < opened.slots.at(slot % drive_count()), "a block is recovered that has no slot");
  }
  if (model.was_reset) return;
  model.generation = next_generation_ - 1;
  model.confirmed = true;
  for (const auto& [generation, drives] : model.durable_resets) {
    const bool known = std::ranges::any_of(drives, [&](unsigned drive) { return opened.slots[drive] > 0; });
    if (known) model.floor = std::max(model.floor, generation);
  }
  for (const auto& [slot, key] : model.found) {
    const bool young = std::ranges::any_of(model.versions[key], [&](const auto& v) { return v.second >= model.floor; });
    check(young, "a block is recovered from before a durable reset");
  }
  model.held = model.found;
  check_expected(model);
}

void DiskSim::check_expected(Model& model) {
  std::map<Key, std::uint32_t> slots;
  for (const auto& [slot, entry] : model.expected) slots[entry.key] = slot;
  std::map<std::uint32_t, Expected> kept;
  for (const auto& [slot, entry] : model.expected) {
    bool whole = slot / drive_count() < (*model.slots)[slot % drive_count()];
    for (Key key = entry.key; key != 0 && whole; key = model.parents[key]) {
      const auto at = slots.find(key);
      whole = at != slots.end() && at->second / drive_count() < (*model.slots)[at->second % drive_count()];
    }
    const auto found = model.found.find(slot);
    const bool there = found != model.found.end() && found->second == entry.key;
    if (there) kept[slot] = {entry.key, model.generation};
    if (!whole) continue;
    check(there || faulty_ || hung_ || model.in_doubt,
          "a block that was written is not found: slot " + std::to_string(slot));
    if (there) ++totals_.expected;
  }
  model.expected = std::move(kept);
}

void DiskSim::on_health(unsigned drive, const disk::Health& health) {
  if (!health.reads) ++totals_.unhealthy;
  if (health.reads) {
    off_.erase(drive);
  } else {
    off_.insert(drive);
  }
  note("drive " + std::to_string(drive) + " health: " + std::to_string(health.reads) + std::to_string(health.writes));
  check(faulty_ || hung_ || drives_[drive] == nullptr || health.reads, "a drive that works is called off");
}

// ---- damage --------------------------------------------------------------------------------------------------------

void DiskSim::damage() {
  for (std::uint64_t n = 1 + prng_.below(6); n > 0; --n) {
    const auto number = static_cast<unsigned>(prng_.below(models_.size()));
    damage_file(models_[number], number, static_cast<unsigned>(prng_.below(drive_count())));
  }
  check_media();
}

void DiskSim::damage_file(Model& model, unsigned number, unsigned drive) {
  auto& files = media_[drive]->files;
  const auto blocks_at = files.find(model.blocks_name);
  const auto records_at = files.find(model.records_name);
  if (blocks_at == files.end() || records_at == files.end()) return;
  SimFile& blocks = *blocks_at->second;
  SimFile& records = *records_at->second;
  const std::uint64_t slots = std::min(blocks.size() / model.slot_bytes,
                                       (std::max<std::uint64_t>(records.size(), 4096) - 4096) / disk::kRecordBytes);
  if (slots == 0) return;
  ++totals_.damages;
  const auto to = static_cast<std::uint32_t>(prng_.below(slots));
  const auto from = static_cast<std::uint32_t>(prng_.below(slots));
  const auto payload = [&](std::uint32_t i) { return blocks.bytes().subspan(i * model.slot_bytes, model.slot_bytes); };
  const auto record = [&](std::uint32_t i) {
    return records.bytes().subspan(disk::kHeaderBytes + i * disk::kRecordBytes, disk::kRecordBytes);
  };
  const auto flip = [&](std::span<std::byte> bytes) {
    bytes[prng_.below(bytes.size())] ^= std::byte{1} << prng_.below(8);
  };
  switch (prng_.below(10)) {
    case 0:
      flip(payload(to));
      return forget(model, drive, to, to + 1);
    case 1:
      flip(record(to));
      return forget(model, drive, to, to + 1);
    case 2:  // swapped
      std::ranges::swap_ranges(payload(to), payload(from));
      if (prng_.chance(50)) std::ranges::swap_ranges(record(to), record(from));
      forget(model, drive, to, to + 1);
      return forget(model, drive, from, from + 1);
    case 3:
      std::ranges::copy(record(from), record(to).begin());
      return forget(model, drive, to, to + 1);
    case 4:  // to become stale
      snapshots_.push_back(
          {number, drive, to, {payload(to).begin(), payload(to).end()}, {record(to).begin(), record(to).end()}});
      return;
    case 5: {
      if (snapshots_.empty()) return;
      const Snapshot& old = snapshots_[prng_.below(snapshots_.size())];
      if (old.model != number || old.drive != drive || old.index >= slots) return;
      if (prng_.chance(70)) std::ranges::copy(old.payload, payload(old.index).begin());
      if (prng_.chance(70)) std::ranges::copy(old.record, record(old.index).begin());
      // A younger block may be a copy of this one, and hidden by what came back.
      model.in_doubt = true;
      return forget(model, drive, old.index, old.index + 1);
    }
    case 6:
      blocks.truncate(prng_.below(blocks.size()));
      return forget(model, drive, static_cast<std::uint32_t>(blocks.size() / model.slot_bytes));
    case 7: {
      records.truncate(prng_.below(records.size()));
      const std::uint64_t left = std::max<std::uint64_t>(records.size(), disk::kHeaderBytes) - disk::kHeaderBytes;
      return forget(model, drive, static_cast<std::uint32_t>(left / disk::kRecordBytes));
    }
    case 8: {  // garbage
      const std::uint32_t end = std::min<std::uint32_t>(static_cast<std::uint32_t>(slots), to + 8);
      for (std::uint32_t i = to; i < end; ++i) {
        for (std::byte& byte : record(i)) byte = static_cast<std::byte>(prng_.below(256));
      }
      return forget(model, drive, to, end);
    }
    default:
      if (prng_.chance(70)) return;
      flip(records.bytes().first(80));
      return forget_header(model, drive);
  }
}

}  // namespace flexkv::testing
