// Opens one space on all volumes: settles the epoch, reads the records in one pass, hands the blocks found to the sink.
// Thread-safe. Lives as long as something of it is under way.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "flexkv/disk/volume.h"

namespace flexkv::disk {

class Opening : public std::enable_shared_from_this<Opening> {
 public:
  struct Result {
    Opened opened;
    std::uint64_t epoch = 0;
    std::uint64_t sequence_max = 0;
    bool all_read = true;  // false: there may be records of higher sequences
  };
  // `done` is called once, on any thread. The volumes are left as they are: those with slots to be finished or closed.
  Opening(SpaceHandle space, const SpaceCodec& codec, std::span<const std::shared_ptr<Volume>> volumes,
          const Volume::Environment& environment, std::function<void(Result)> done);

  void begin();
  // No more blocks are wanted. One call of on_recovered() may be under way.
  void stop_emitting() { emits_ = false; }

 private:
  // Of one volume.
  struct Part {
    Volume::Found found;
    Volume::Adopted adopted;
    std::uint32_t next = 0;  // record to be asked for
  };
  struct Piece {
    unsigned drive = 0;
    std::uint32_t first = 0;
    std::uint32_t count = 0;
    Volume::Buffer bytes;  // null: it could not be read
  };

  void on_found(unsigned drive, Volume::Found found);
  void choose_epoch();
  void on_adopted(unsigned drive, Volume::Adopted adopted);
  void read();
  void read_next(unsigned drive);
  void on_piece(Piece piece, Outcome outcome);
  void add_pieces();
  void finish();

  const SpaceHandle space_;
  const SpaceCodec codec_;
  const std::span<const std::shared_ptr<Volume>> volumes_;
  const Volume::Environment environment_;
  const std::function<void(Result)> done_;
  const Nanos begun_;
  std::atomic<bool> emits_ = true;

  std::mutex mutex_;
  std::vector<Part> parts_;
  std::size_t pending_ = 0;  // answers of volumes, then pieces on their way
  std::uint64_t epoch_ = 0;
  std::optional<Recovery> recovery_;
  std::vector<Piece> pieces_;
  bool adding_ = false;
  std::uint64_t unread_ = 0;  // records
};

// By the options' clock.
std::uint64_t new_epoch(std::uint64_t previous, const TierOptions& options);

}  // namespace flexkv::disk
