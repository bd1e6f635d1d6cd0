// What a process must hear from the tier, and read from it.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "disk_kill.h"

namespace flexkv::testing {

using disk::Outcome;

namespace {

std::string text_of(std::uint32_t slot, const KillEntry& entry) {
  return "slot " + std::to_string(slot) + ", key " + std::to_string(entry.key) + ", version " +
         std::to_string(entry.version) + " of generation " + std::to_string(entry.generation);
}

}  // namespace

key::BlockKey block_key(std::uint32_t key) {
  return key == 0 ? disk::kNoParent : key::BlockKey{Prng::mix(7), Prng::mix(key)};
}

void fill(std::uint32_t key, std::uint64_t version, std::span<std::byte> out) {
  std::memcpy(out.data(), &version, sizeof version);
  std::uint64_t word = Prng::mix(version ^ (std::uint64_t{key} << 48));
  for (std::size_t i = sizeof version; i < out.size(); i += sizeof word) {
    word = Prng::mix(word);
    std::memcpy(out.data() + i, &word, sizeof word);
  }
}

void KillUser::fail(const std::string& what) {
  if (!ledger_.failed.exchange(true)) {
    std::snprintf(ledger_.failure.data(), ledger_.failure.size(), "%s", what.c_str());
  }
  ::_exit(9);
}

// ---- openings ------------------------------------------------------------------------------------------------------

void KillUser::on_recovered(disk::SpaceHandle, std::span<const disk::Chain> chains) {
  std::lock_guard lock(mutex_);
  for (const disk::Chain& chain : chains) {
    key::BlockKey before = chain.parent;
    for (std::size_t i = 0; i < chain.keys.size(); ++i) {
      const std::uint32_t number = chain.slots[i];
      const auto key = keys_.find(chain.keys[i].low);
      check(number < kKillSlots && key != keys_.end(), "a block is found that was never written");
      const std::uint32_t parent = parent_of(key->second);
      check(before == block_key(parent), "a block is found after another one than its parent");
      check(parent == 0 || places_.contains(parent), "a block is found before its parent");
      check(recovered_.emplace(number, key->second).second, "a slot is found twice");
      check(places_.emplace(key->second, number).second, "a key is found twice");
      before = chain.keys[i];
      const KillSlot& slot = ledger_.slots[number];
      const auto may = [&](bool there, const KillEntry& entry) {
        return there && entry.key == key->second && entry.generation >= floor_;
      };
      check(reset_at_once_ || may(true, slot.done_entry()) || may(slot.is_pending(), slot.pending_entry()),
            "a block is found that cannot be there: slot " + std::to_string(number) + ", key " +
                std::to_string(key->second));
      ++ledger_.totals.recovered;
    }
  }
}

void KillUser::on_opened(disk::SpaceHandle, const disk::Opened& opened) {
  std::lock_guard lock(mutex_);
  for (const std::uint32_t slots : opened.slots) {
    check(slots == kKillSlotsPerDrive, "an opening gives " + std::to_string(slots) + " slots");
  }
  // A directory may have missed a reset that was cut off, and its first header may have been.
  const bool whole = ledger_.established && ledger_.resets_begun == ledger_.resets_durable;
  check(!whole || opened.dropped_files.empty(), opened.dropped_files.empty() ? "" : opened.dropped_files[0]);
  if (!ledger_.established) {
    ledger_.secret = home_->secret;
    ledger_.established = true;
  }
  opened_ = true;
  change_.notify_all();
}

// Under the mutex. Keys whose blocks, and those before them, must be there have been found.
void KillUser::check_expected() {
  if (ledger_.resets_begun != ledger_.resets_durable) return;
  std::map<std::uint32_t, std::uint64_t> versions;
  for (const KillSlot& slot : ledger_.slots) {
    if (slot.is_pending()) ++ledger_.totals.cut_off;
    if (!must_be_there(slot)) continue;
    std::uint64_t& version = versions[slot.done_entry().key];
    version = std::max(version, slot.done_entry().version);
  }
  for (const auto& [key, version] : versions) {
    bool whole = true;
    for (std::uint32_t at = parent_of(key); at != 0; at = parent_of(at)) whole = whole && versions.contains(at);
    if (!whole) continue;
    const auto place = places_.find(key);
    check(place != places_.end(),
          "a block that was written is not found: key " + std::to_string(key) + ", version " + std::to_string(version));
    const KillSlot& slot = ledger_.slots[place->second];
    const auto young = [&](bool there, const KillEntry& entry) {
      return there && entry.key == key && entry.version >= version;
    };
    // A young record may also be one whose block was being overwritten, and hide an older copy.
    check(young(true, slot.done_entry()) || young(slot.is_pending(), slot.pending_entry()),
          "an old copy is found: " + text_of(place->second, slot.done_entry()));
    ++ledger_.totals.expected;
  }
}

// ---- the ends of transfers -----------------------------------------------------------------------------------------

void KillUser::ended(const disk::Completion& completion) {
  const auto node = ops_.extract(completion.id);
  check(!node.empty(), "a transfer ends that is not under way");
  const Op& op = node.mapped();
  if (op.write && completion.outcome == Outcome::kDone) {
    ledger_.slots[op.slot].done();
    ++ledger_.totals.writes;
  } else if (!op.write && completion.outcome == Outcome::kDone) {
    bytes_read(op);
  } else if (!op.write && (completion.outcome == Outcome::kChecksum || completion.error_number == ENODATA)) {
    read_refused(op);  // of another block, or of a slot that the file has not grown to
  } else {
    check(closing_ && completion.outcome == Outcome::kCanceled, std::string("a transfer fails: ") +
                                                                    disk::outcome_name(completion.outcome) + ", " +
                                                                    std::strerror(completion.error_number));
  }
  busy_[op.slot] = false;
  free_.push_back(op.buffer);
}

void KillUser::read_refused(const Op& op) {
  KillSlot& slot = ledger_.slots[op.slot];
  ++ledger_.totals.refused_reads;
  check(!op.must || floor_ > op.floor, "a block that was written is not there: " + text_of(op.slot, slot.done_entry()));
  // Until a reset is durable, what it took may come back.
  if (op.opening || slot.done_entry().generation >= op.floor) slot.lost();
}

void KillUser::bytes_read(const Op& op) {
  KillSlot& slot = ledger_.slots[op.slot];
  ++ledger_.totals.reads;
  std::uint64_t version = 0;
  std::memcpy(&version, buffer(op.buffer).data(), sizeof version);
  const auto is_it = [&](bool there, const KillEntry& entry) {
    return there && entry.key == op.entry.key && entry.version == version && entry.generation >= op.floor;
  };
  const bool completed = is_it(slot.is_pending(), slot.pending_entry());
  check(completed || is_it(slot.has_done(), slot.done_entry()),
        "a read of key " + std::to_string(op.entry.key) + " gives version " + std::to_string(version) +
            ", not what was written: " + text_of(op.slot, slot.done_entry()));
  fill(op.entry.key, version, expected_bytes_);
  check(std::memcmp(expected_bytes_.data(), buffer(op.buffer).data(), expected_bytes_.size()) == 0,
        "a read gives a mixture of bytes: " + text_of(op.slot, slot.done_entry()));
  if (op.opening && completed) {
    slot.done();
    ++ledger_.totals.completed;
  }
}

void KillUser::on_completions(std::span<const disk::Completion> completions) {
  std::lock_guard lock(mutex_);
  for (const disk::Completion& completion : completions) ended(completion);
  change_.notify_all();
}

void KillUser::on_overdue(disk::OpId) { fail("a transfer without deadline is overdue"); }

void KillUser::on_health(unsigned drive, const disk::Health& health) {
  check(health.reads && health.writes, "drive " + std::to_string(drive) + " is called off: " + health.why);
}

}  // namespace flexkv::testing
