#include "disk_kill.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "flexkv/file/open_drive.h"

namespace flexkv::testing {
namespace {

constexpr disk::SpaceId kSpace{7};

}  // namespace

KillUser::KillUser(const std::vector<std::string>& directories, KillLedger& ledger)
    : ledger_(ledger),
      prng_(ledger.seed),
      pool_(static_cast<std::byte*>(std::aligned_alloc(file::kDirectAlignment, kInFlight * ledger.slot_bytes))),
      expected_bytes_(ledger.slot_bytes) {
  for (std::uint32_t key = 1; key <= kKillKeys; ++key) keys_[block_key(key).low] = key;
  for (unsigned i = 0; i < kInFlight; ++i) free_.push_back(i);
  open_tier(directories);
}

void KillUser::run() {
  open_space(prng_.chance(5));
  while (ledger_.steps_done < ledger_.steps) {
    step();
    ++ledger_.steps_done;
  }
  close();
}

void KillUser::enter(KillPhase phase) {
  ledger_.phase = phase;
  ++ledger_.arrivals[static_cast<std::size_t>(phase)];
}

// ---- opening -------------------------------------------------------------------------------------------------------

void KillUser::open_tier(const std::vector<std::string>& directories) {
  auto home = disk::Home::open(directories);
  if (!home) fail("the directories cannot be opened: " + home.error().message);
  home_ = std::move(home).value();
  check(!ledger_.established || home_->secret == ledger_.secret, "the node's secret is another one");
  std::vector<disk::VolumeSpec> volumes;
  for (const auto& place : home_->places) {
    check(place.why_not.empty(), "a directory cannot be used: " + place.why_not);
    file::DriveOptions drive;
    drive.directory = place.path;
    drive.keep_free_bytes = 0;
    drive.limits.breaker.stall_after = kPatience;
    volumes.push_back({place.path, place.why_not, place.found,
                       [drive](file::DriveSink& sink) { return file::open_drive(drive, sink); }});
  }
  disk::TierOptions options;
  options.bytes_max = ledger_.share_bytes * volumes.size();
  options.strict = ledger_.strict;
  tier_ = std::make_unique<disk::DiskTier>(options, volumes, *this);
  tier_->register_memory({pool_.get(), static_cast<std::size_t>(kInFlight * ledger_.slot_bytes)});
}

void KillUser::open_space(bool reset_at_once) {
  enter(KillPhase::kOpening);
  {
    Lock lock(mutex_);
    opened_ = false;
    reset_at_once_ = reset_at_once;
    recovered_.clear();
    places_.clear();
    // Without a word about the last reset either side of it may be there.
    floor_ = ledger_.resets_durable;
    ++handle_;
  }
  tier_->open_space(disk::SpaceHandle{handle_}, kSpace, ledger_.slot_bytes);
  if (reset_at_once) reset();
  Lock lock(mutex_);
  wait(lock, "the opening", [&] { return opened_; });
  ++ledger_.totals.openings;
  if (reset_at_once) return;
  check_expected();
  lock.unlock();
  read_back();
}

// Every slot once: a second failure would close it for writes.
void KillUser::read_back() {
  enter(KillPhase::kReading);
  const bool settled = ledger_.resets_begun == ledger_.resets_durable;
  for (std::uint32_t number = 0; number < kKillSlots; ++number) {
    std::uint32_t key = 0;
    bool must = false;
    {
      std::lock_guard lock(mutex_);
      KillSlot& slot = ledger_.slots[number];
      const auto found = recovered_.find(number);
      if (found != recovered_.end()) {
        key = found->second;
      } else if (slot.has_done() && (!slot.is_pending() || prng_.chance(50))) {
        key = slot.done_entry().key;
      } else if (slot.is_pending()) {
        key = slot.pending_entry().key;
      }
      must = settled && must_be_there(slot);
    }
    if (key != 0) read(number, key, must, true);
  }
  Lock lock(mutex_);
  wait(lock, "reading back", [&] { return ops_.empty(); });
  // Now it is known which side of the last reset is there, and its epoch is on stable storage.
  const std::uint64_t now = ledger_.resets_begun;
  for (KillSlot& slot : ledger_.slots) slot.renew(ledger_.resets_durable, now);
  ledger_.resets_durable = now;
  floor_ = now;
}

// ---- use -----------------------------------------------------------------------------------------------------------

void KillUser::step() {
  const std::uint64_t dice = prng_.below(1000);
  if (dice < ledger_.resets_in_1000) {
    reset();
  } else if (dice < ledger_.resets_in_1000 + ledger_.reopens_in_1000) {
    {
      Lock lock(mutex_);
      wait(lock, "transfers", [&] { return ops_.empty(); });
      wait(lock, "a reset", [&] { return ledger_.resets_begun == ledger_.resets_durable; });
    }
    tier_->close_space(disk::SpaceHandle{handle_});
    open_space(false);
  } else if (prng_.chance(25)) {
    const auto number = static_cast<std::uint32_t>(prng_.below(kKillSlots));
    Lock lock(mutex_);
    const KillSlot& slot = ledger_.slots[number];
    if (busy_[number] || !slot.has_done() || slot.done_entry().generation < floor_) return;
    const std::uint32_t key = slot.done_entry().key;
    const bool must = must_be_there(slot);
    lock.unlock();
    read(number, key, must, false);
  } else {
    enter(KillPhase::kWriting);
    write();
  }
}

// Under the mutex. A free one, else one without blocks that follow it, as far as three tries find one.
std::optional<std::uint32_t> KillUser::slot_to_write() {
  std::optional<std::uint32_t> best;
  std::uint32_t best_key = 0;
  for (unsigned i = 0; i < 3; ++i) {
    const auto number = static_cast<std::uint32_t>(prng_.below(kKillSlots));
    if (busy_[number]) continue;
    const KillSlot& slot = ledger_.slots[number];
    const std::uint32_t key =
        slot.has_done() && slot.done_entry().generation >= floor_ ? slot.done_entry().key : kKillKeys + 1;
    if (key > best_key) {
      best = number;
      best_key = key;
    }
  }
  return best;
}

// Under the mutex.
bool KillUser::is_held(std::uint32_t key) const {
  return key == 0 || std::ranges::any_of(ledger_.slots, [&](const KillSlot& slot) {
           return must_be_there(slot) && slot.done_entry().key == key;
         });
}

void KillUser::write() {
  Op op;
  Lock lock(mutex_);
  wait(lock, "transfers", [&] { return !free_.empty(); });
  const auto slot = slot_to_write();
  if (!slot) return;
  op.write = true;
  op.slot = *slot;
  const KillSlot& old = ledger_.slots[*slot];
  op.entry.key = 1 + static_cast<std::uint32_t>(prng_.below(kKillKeys));
  for (unsigned i = 0; i < 8 && (!is_held(parent_of(op.entry.key)) || is_held(op.entry.key)); ++i) {
    op.entry.key = 1 + static_cast<std::uint32_t>(prng_.below(kKillKeys));
  }
  if (old.has_done() && prng_.chance(10)) op.entry.key = old.done_entry().key;
  op.entry.version = ledger_.next_version++;
  op.entry.generation = ledger_.resets_begun;
  op.buffer = free_.back();
  free_.pop_back();
  busy_[op.slot] = true;
  fill(op.entry.key, op.entry.version, buffer(op.buffer));
  const disk::OpId id = next_op_++;
  ops_[id] = op;
  ledger_.slots[op.slot].begin(op.entry);
  lock.unlock();
  const disk::Admission admission = tier_->write({id, disk::SpaceHandle{handle_}, op.slot, block_key(op.entry.key),
                                                  block_key(parent_of(op.entry.key)), buffer(op.buffer)});
  if (admission == disk::Admission::kQueued) return;
  // Reads of what a kill tore count as failures of the slot.
  check(admission == disk::Admission::kQuarantined, "a write is not taken");
  lock.lock();
  ops_.erase(id);
  free_.push_back(op.buffer);
  busy_[op.slot] = false;
}

void KillUser::read(std::uint32_t slot, std::uint32_t key, bool must, bool opening) {
  Op op;
  Lock lock(mutex_);
  wait(lock, "transfers", [&] { return !free_.empty(); });
  op.slot = slot;
  op.entry.key = key;
  op.floor = floor_;
  op.must = must;
  op.opening = opening;
  op.buffer = free_.back();
  free_.pop_back();
  busy_[slot] = true;
  std::ranges::fill(buffer(op.buffer).first(file::kDirectAlignment), std::byte{0xA5});
  const disk::OpId id = next_op_++;
  ops_[id] = op;
  lock.unlock();
  const auto admission = tier_->read({id, disk::SpaceHandle{handle_}, slot, block_key(key), buffer(op.buffer)});
  check(admission == disk::Admission::kQueued, "a read is not taken");
}

// Reads of what was there before must fail, at once and after each restart once it was reported durable.
void KillUser::reset() {
  const bool wait_for_it = ledger_.strict || prng_.chance(50);
  std::vector<std::pair<std::uint32_t, std::uint32_t>> old;
  std::uint64_t generation = 0;
  {
    std::lock_guard lock(mutex_);
    if (!reset_at_once_ || opened_) enter(KillPhase::kResetting);
    generation = ++ledger_.resets_begun;
    floor_ = generation;
    for (std::uint32_t i = 0; i < kKillSlots && old.size() < 2; ++i) {
      const std::uint32_t number = (i * 7 + static_cast<std::uint32_t>(generation)) % kKillSlots;
      const KillSlot& slot = ledger_.slots[number];
      if (opened_ && !busy_[number] && slot.has_done()) old.push_back({number, slot.done_entry().key});
    }
  }
  tier_->reset_space(disk::SpaceHandle{handle_}, [this, generation](bool durable) {
    std::lock_guard lock(mutex_);
    check(durable, "a reset is not written down");
    ledger_.resets_durable = std::max<std::uint64_t>(ledger_.resets_durable, generation);
    ++ledger_.totals.resets;
    change_.notify_all();
  });
  for (const auto& [slot, key] : old) read(slot, key, false, false);
  if (!wait_for_it) return;
  Lock lock(mutex_);
  wait(lock, "a reset", [&] { return ledger_.resets_durable >= generation; });
}

void KillUser::close() {
  enter(KillPhase::kClosing);
  {
    Lock lock(mutex_);
    if (prng_.chance(50)) wait(lock, "transfers", [&] { return ops_.empty(); });
    closing_ = true;
  }
  check(tier_->close(kPatience), "a drive hangs");
  home_.reset();
}

}  // namespace flexkv::testing
