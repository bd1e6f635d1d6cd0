#include "flexkv/disk/opening.h"

#include <algorithm>
#include <random>
#include <utility>

#include "flexkv/base/log.h"

namespace flexkv::disk {
namespace {

constexpr std::uint32_t kPieceRecords = (1 << 20) / kRecordBytes;
constexpr unsigned kPiecesAhead = 3;  // per drive
// By which a read of records must have begun; a drive that hangs is not waited for.
constexpr Nanos kReadPatience = 10 * kSecond;

}  // namespace

std::uint64_t new_epoch(std::uint64_t previous, const TierOptions& options) {
  return next_epoch(previous, options.wall_seconds(), static_cast<std::uint32_t>(std::random_device{}()));
}

Opening::Opening(SpaceHandle space, const SpaceCodec& codec, std::span<const std::shared_ptr<Volume>> volumes,
                 const Volume::Environment& environment, std::function<void(Result)> done)
    : space_(space),
      codec_(codec),
      volumes_(volumes),
      environment_(environment),
      done_(std::move(done)),
      begun_(environment.options.now()),
      parts_(volumes.size()) {}

void Opening::begin() {
  pending_ = volumes_.size();
  for (unsigned i = 0; i < volumes_.size(); ++i) {
    volumes_[i]->begin_open(
        space_, codec_, [self = shared_from_this(), i](Volume::Found found) { self->on_found(i, std::move(found)); });
  }
}

void Opening::on_found(unsigned drive, Volume::Found found) {
  {
    std::lock_guard lock(mutex_);
    parts_[drive].adopted.why_not = found.why_not;
    parts_[drive].found = std::move(found);
    if (--pending_ > 0) return;
  }
  choose_epoch();
}

void Opening::choose_epoch() {
  std::vector<unsigned> usable;
  {
    std::lock_guard lock(mutex_);
    std::uint64_t youngest = 0;  // of whatever was there, so that a new one is younger
    for (unsigned i = 0; i < parts_.size(); ++i) {
      const Volume::Found& found = parts_[i].found;
      if (!found.why_not.empty()) continue;
      usable.push_back(i);
      youngest = std::max(youngest, found.header.epoch);
      if (found.fault == HeaderFault::kNone) epoch_ = std::max(epoch_, found.header.epoch);
    }
    if (epoch_ == 0) epoch_ = new_epoch(youngest, environment_.options);
    pending_ = usable.size();
  }
  if (usable.empty()) return finish();
  for (const unsigned i : usable) {
    // No lock: nobody else changes it now.
    const Volume::Found& found = parts_[i].found;
    const std::uint64_t written = found.fault == HeaderFault::kNone ? found.header.epoch : 0;
    volumes_[i]->adopt(space_, epoch_, written, [self = shared_from_this(), i](Volume::Adopted adopted) {
      self->on_adopted(i, std::move(adopted));
    });
  }
}

void Opening::on_adopted(unsigned drive, Volume::Adopted adopted) {
  {
    std::lock_guard lock(mutex_);
    parts_[drive].adopted = std::move(adopted);
    if (--pending_ > 0) return;
  }
  read();
}

void Opening::read() {
  std::uint64_t records = 0;
  for (Part& part : parts_) {
    if (!part.adopted.why_not.empty()) part.adopted.record_count = 0;
    records += part.adopted.record_count;
  }
  if (records == 0) return finish();
  {
    std::lock_guard lock(mutex_);
    recovery_.emplace(codec_, epoch_, static_cast<unsigned>(volumes_.size()), records);
    pending_ = 1;  // this loop
  }
  for (unsigned ahead = 0; ahead < kPiecesAhead; ++ahead) {
    for (unsigned i = 0; i < volumes_.size(); ++i) read_next(i);
  }
  bool over = false;
  {
    std::lock_guard lock(mutex_);
    over = --pending_ == 0;
  }
  if (over) finish();
}

void Opening::read_next(unsigned drive) {
  Piece piece;
  {
    std::lock_guard lock(mutex_);
    Part& part = parts_[drive];
    const std::uint32_t left = part.adopted.record_count - part.next;
    if (left == 0) return;
    piece = {drive, part.next, std::min(left, kPieceRecords), nullptr};
    part.next += piece.count;
    ++pending_;
  }
  volumes_[drive]->read_records(space_, piece.first, piece.count, environment_.options.now() + kReadPatience,
                                [self = shared_from_this(), piece](Outcome outcome, int, Volume::Buffer bytes) mutable {
                                  if (outcome == Outcome::kDone) piece.bytes = std::move(bytes);
                                  self->on_piece(std::move(piece), outcome);
                                });
}

void Opening::on_piece(Piece piece, Outcome outcome) {
  {
    std::lock_guard lock(mutex_);
    Part& part = parts_[piece.drive];
    if (outcome != Outcome::kDone && outcome != Outcome::kFailed) {
      // The drive is off or hangs: no more of it.
      unread_ += part.adopted.record_count - part.next;
      part.next = part.adopted.record_count;
    }
    pieces_.push_back(std::move(piece));
    if (std::exchange(adding_, true)) return;
  }
  // Not on the drive's thread.
  environment_.checksums.post([self = shared_from_this()] { self->add_pieces(); });
}

void Opening::add_pieces() {
  bool over = false;
  while (!over) {
    std::vector<Piece> pieces;
    {
      std::lock_guard lock(mutex_);
      pieces.swap(pieces_);
      adding_ = !pieces.empty();
      if (pieces.empty()) return;
    }
    // `adding_`: nobody else touches the recovery.
    for (const Piece& piece : pieces) {
      read_next(piece.drive);
      if (piece.bytes != nullptr) {
        recovery_->add(piece.drive, piece.first, parts_[piece.drive].adopted.slots_on_file, *piece.bytes);
      }
    }
    std::lock_guard lock(mutex_);
    for (const Piece& piece : pieces) {
      if (piece.bytes == nullptr) unread_ += piece.count;
    }
    pending_ -= pieces.size();
    over = pending_ == 0;
  }
  finish();
}

void Opening::finish() {
  Result result;
  Opened& opened = result.opened;
  if (recovery_) {
    if (emits_) {
      recovery_->emit([&](std::span<const Chain> chains) {
        if (emits_) environment_.sink.on_recovered(space_, chains);
      });
    }
    opened.recovered = recovery_->recovered();
    opened.discarded = recovery_->discarded();
    result.sequence_max = recovery_->sequence_max();
    recovery_.reset();
  }
  opened.discarded.damaged += unread_;
  result.all_read = unread_ == 0;
  for (unsigned i = 0; i < parts_.size(); ++i) {
    const Part& part = parts_[i];
    const std::string& directory = volumes_[i]->directory();
    const std::string& why_not = part.adopted.why_not;
    opened.slots.push_back(why_not.empty() ? part.adopted.slots_max : 0);
    result.all_read = result.all_read && why_not.empty();
    if (!why_not.empty()) log_warning("SSD cache: " + directory + " is not used for a model: " + why_not);
    std::string dropped = part.adopted.dropped;
    if (part.found.any_file && part.found.why_not.empty()) {
      if (part.found.fault != HeaderFault::kNone) {
        dropped = fault_name(part.found.fault);
      } else if (part.found.header.epoch != epoch_) {
        dropped = "they missed a reset";
      }
    }
    if (!dropped.empty()) opened.dropped_files.push_back(directory + ": old blocks are not used: " + dropped);
  }
  opened.duration = environment_.options.now() - begun_;
  result.epoch = epoch_;
  done_(std::move(result));
}

}  // namespace flexkv::disk
