#include "flexkv/server/disk_bridge.h"

#include <algorithm>
#include <cstdio>

#include "flexkv/base/bounded_call.h"
#include "flexkv/base/log.h"
#include "flexkv/server/damage_log.h"

namespace flexkv::server {
namespace {

// At the end, for the last record of what was written.
constexpr Nanos kRecordPatience = kSecond;
// At the start, for each step with a drive.
constexpr Nanos kOpenPatience = 10 * kSecond;
// What a small file and its directory take.
constexpr std::uint64_t kSmallFileWrite = 2 * disk::kPageBytes;
constexpr char kHangs[] = " hangs: no answer in 10 s";

node::DiskAdmission to_node(disk::Admission admission) {
  switch (admission) {
    case disk::Admission::kQueued:
      return node::DiskAdmission::kQueued;
    case disk::Admission::kBusy:
      return node::DiskAdmission::kBusy;
    case disk::Admission::kQuarantined:
      return node::DiskAdmission::kBadSlot;
    case disk::Admission::kLater:
      return node::DiskAdmission::kLater;
    case disk::Admission::kBudget:
      return node::DiskAdmission::kBudget;
    case disk::Admission::kUnavailable:
      break;
  }
  return node::DiskAdmission::kUnavailable;
}

node::DiskOutcome to_node(disk::Outcome outcome) {
  switch (outcome) {
    case disk::Outcome::kDone:
      return node::DiskOutcome::kDone;
    case disk::Outcome::kChecksum:
      return node::DiskOutcome::kChecksum;
    case disk::Outcome::kDeadline:
      return node::DiskOutcome::kDeadline;
    case disk::Outcome::kCanceled:
      return node::DiskOutcome::kCanceled;
    case disk::Outcome::kUnavailable:
      return node::DiskOutcome::kUnavailable;
    case disk::Outcome::kNoRoom:
      return node::DiskOutcome::kNoRoom;
    case disk::Outcome::kDamaged:
      return node::DiskOutcome::kDamaged;
    case disk::Outcome::kFailed:
      break;
  }
  return node::DiskOutcome::kFailed;
}

// One that comes too late was asked for nothing, so it says nothing to its sink, and goes.
Result<std::unique_ptr<file::Drive>> open_in_time(const file::DriveOptions& drive, const DiskOptions::OpenDrive& open,
                                                  file::DriveSink& sink) {
  auto opened = within(kOpenPatience, [drive, open, &sink] { return open(drive, sink); });
  if (opened) return std::move(*opened);
  return Error{ErrorCode::kTimeout, drive.directory + kHangs};
}

}  // namespace

DiskBridge::DiskBridge(disk::Home home, std::span<std::byte> pool, Apply apply)
    : home_(std::move(home)), pool_(pool), apply_(std::move(apply)), readable_(home_.places.size()) {
  for (auto& readable : readable_) readable = true;
}

Result<std::unique_ptr<DiskBridge>> DiskBridge::open(const DiskOptions& options, std::span<std::byte> pool,
                                                     Apply apply) {
  auto home = disk::Home::open(options.directories, options.make_parents, options.secret);
  if (!home) return home.error();
  std::unique_ptr<DiskBridge> bridge(new DiskBridge(std::move(home).value(), pool, std::move(apply)));
  bridge->open_budgets(options);
  bridge->read_resets();
  std::vector<disk::VolumeSpec> volumes;
  for (std::size_t i = 0; i < bridge->home_.places.size(); ++i) {
    const auto& place = bridge->home_.places[i];
    const auto& budget = bridge->budgets_[i];
    file::DriveOptions drive;
    drive.directory = place.path;
    drive.direct = options.direct;
    drive.reserve_by_writing = budget == nullptr || budget->status().report.daily_bytes == 0;
    volumes.push_back(
        {place.path, place.why_not, place.found,
         [drive, open = options.open_drive](file::DriveSink& sink) { return open_in_time(drive, open, sink); },
         budget});
  }
  disk::TierOptions tier;
  tier.bytes_max = options.bytes;
  tier.strict = options.strict;
  disk::TierSink& sink = *bridge;
  bridge->tier_ = std::make_unique<disk::DiskTier>(tier, volumes, sink);
  bridge->tier_->register_memory(pool);
  bridge->tell_fresh_drives();
  return Result<std::unique_ptr<DiskBridge>>(std::move(bridge));
}

DiskBridge::~DiskBridge() {
  if (tier_ != nullptr && !closed_) (void)close(0);
}

// A directory whose limit cannot be kept is not used.
void DiskBridge::open_budgets(const DiskOptions& options) {
  std::map<std::uint64_t, double> shares;  // directories of one drive
  for (const auto& place : home_.places) {
    if (place.directory != nullptr) ++shares[place.device];
  }
  for (std::size_t i = 0; i < home_.places.size(); ++i) {
    auto& place = home_.places[i];
    auto& budget = budgets_.emplace_back();
    if (place.directory == nullptr) continue;
    DriveBudget::Options one{options.endurance, place.fresh, options.now};
    if (one.endurance.capacity_bytes == 0) one.endurance.capacity_bytes = place.capacity_bytes;
    if (one.endurance.dwpd > 0 && one.endurance.capacity_bytes == 0) {
      place.why_not = "ssd_dwpd needs a size, and this file system tells none; set ssd_capacity_gb";
      place.directory = nullptr;
      continue;
    }
    one.endurance.dwpd /= shares.at(place.device);
    one.endurance.tbw /= shares.at(place.device);
    auto read = within(kOpenPatience, [this, directory = place.directory, one] {
      return std::make_shared<DriveBudget>(
          directory, one, [this] { apply_([](node::Node& node) { node.on_disk_ready(monotonic_now()); }); });
    });
    if (read) {
      budget = std::move(*read);
      continue;
    }
    place.why_not = place.path + kHangs;
    place.directory = nullptr;
  }
}

void DiskBridge::read_resets() {
  for (auto& place : home_.places) {
    if (place.directory == nullptr || place.fresh) continue;
    const auto read = within(kOpenPatience, [directory = place.directory] { return read_resets_seen(*directory); });
    if (!read) {
      place.why_not = place.path + kHangs;
      place.directory = nullptr;
    } else if (resets_seen_.value_or(*read) == *read) {
      resets_seen_ = *read;
    } else {
      resets_seen_ = ResetsSeen();  // they know of different ones: so of none for sure
      return;
    }
  }
}

// Nothing old is on them. Without a record they would be taken for drives that know of no reset at the next start.
void DiskBridge::tell_fresh_drives() {
  const bool fresh = std::ranges::any_of(home_.places, [](const auto& place) { return place.fresh; });
  if (fresh && resets_seen_ && *resets_seen_ != ResetsSeen()) note_resets(*resets_seen_);
}

bool DiskBridge::close(Nanos patience) {
  closed_ = true;
  const Nanos until = monotonic_now() + patience;
  const bool quiet = tier_->close(patience);
  for (const auto& budget : budgets_) {
    if (budget != nullptr) budget->close(std::max(until - monotonic_now(), kRecordPatience));
  }
  return quiet;
}

// That of the drive which may still take most: the others refuse what comes, and it goes there.
double DiskBridge::write_pressure() const {
  double least = 1;
  bool any = false;
  for (std::size_t i = 0; i < budgets_.size(); ++i) {
    if (budgets_[i] == nullptr || !can_read(static_cast<unsigned>(i))) continue;
    least = std::min(least, budgets_[i]->pressure());
    any = true;
  }
  return any ? least : 0;
}

DiskBridge::Status DiskBridge::status() const {
  Status status;
  for (auto& volume : tier_->stats()) {
    const auto& budget = budgets_[status.drives.size()];
    auto& drive = status.drives.emplace_back();
    drive.volume = std::move(volume);
    if (budget != nullptr) drive.budget = budget->status();
  }
  status.write_pressure = write_pressure();
  std::lock_guard lock(mutex_);
  status.spaces = opened_;
  return status;
}

// ---- what the node wants -------------------------------------------------------------------------------------------

void DiskBridge::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  slot_bytes_[space] = slot_bytes;
  tier_->open_space(disk::SpaceHandle{space}, name, slot_bytes);
}

void DiskBridge::close_space(node::SpaceNumber space) {
  slot_bytes_.erase(space);
  tier_->close_space(disk::SpaceHandle{space});
}

void DiskBridge::reset_space(node::SpaceNumber space) {
  {
    std::lock_guard lock(mutex_);
    ++resetting_;
  }
  tier_->reset_space(disk::SpaceHandle{space}, [this](bool durable) {
    {
      std::lock_guard lock(mutex_);
      --resetting_;
      reset_failed_ = reset_failed_ || !durable;
    }
    write_resets();
  });
}

void DiskBridge::reset_closed_spaces(const std::optional<node::ModelName>& model) {
  tier_->remove_closed(model ? std::span<const std::uint8_t>(*model) : std::span<const std::uint8_t>());
}

void DiskBridge::note_resets(const ResetsSeen& seen) {
  {
    std::lock_guard lock(mutex_);
    noted_ = seen;
  }
  write_resets();
}

// A crash before that, or a drive that could not forget, costs hits only: the next start forgets once more.
void DiskBridge::write_resets() {
  std::optional<ResetsSeen> seen;
  {
    std::lock_guard lock(mutex_);
    if (resetting_ > 0 || reset_failed_) return;
    seen = std::exchange(noted_, std::nullopt);
  }
  if (!seen) return;
  for (unsigned drive = 0; drive < home_.places.size(); ++drive) {
    if (home_.places[drive].directory == nullptr) continue;
    tier_->when_removed(drive, [directory = home_.places[drive].directory, budget = budgets_[drive], seen = *seen] {
      budget->charge(kSmallFileWrite);
      if (const auto written = write_resets_seen(*directory, seen); !written) {
        log_warning("SSD cache: " + directory->path() + ": a reset is not recorded, so what is there is forgotten " +
                    "again at the next start: " + written.error().message);
      }
    });
  }
}

std::span<std::byte> DiskBridge::host(const node::DiskTransfer& transfer) const {
  return pool_.subspan(transfer.host_offset, slot_bytes_.at(transfer.space));
}

node::DiskAdmission DiskBridge::write(const node::DiskTransfer& transfer) {
  disk::WriteOp op;
  op.id = transfer.op;
  op.space = disk::SpaceHandle{transfer.space};
  op.slot = transfer.slot;
  op.key = transfer.key;
  op.parent = transfer.parent;
  op.bytes = host(transfer);
  op.sums = transfer.sums;
  op.deadline = transfer.deadline;
  return to_node(tier_->write(op));
}

node::DiskAdmission DiskBridge::read(const node::DiskTransfer& transfer) {
  disk::ReadOp op;
  op.id = transfer.op;
  op.space = disk::SpaceHandle{transfer.space};
  op.slot = transfer.slot;
  op.key = transfer.key;
  op.bytes = host(transfer);
  op.deadline = transfer.deadline;
  return to_node(tier_->read(op));
}

node::DiskAdmission DiskBridge::verify(const node::DiskTransfer& transfer) {
  disk::ReadOp op;
  op.id = transfer.op;
  op.space = disk::SpaceHandle{transfer.space};
  op.slot = transfer.slot;
  op.key = transfer.key;
  op.urgency = file::Urgency::kScrub;
  return to_node(tier_->read(op));
}

// ---- what the tier says --------------------------------------------------------------------------------------------

void DiskBridge::on_completions(std::span<const disk::Completion> completions) {
  std::vector<node::DiskResult> results;
  results.reserve(completions.size());
  for (const disk::Completion& completion : completions) {
    results.push_back({completion.id, to_node(completion.outcome)});
    if (completion.outcome == disk::Outcome::kDamaged) log_damaged_block("written to a drive");
  }
  apply_([&](node::Node& node) { node.on_disk_done(results, monotonic_now()); });
}

void DiskBridge::on_overdue(disk::OpId id) {
  apply_([&](node::Node& node) { node.on_disk_overdue(id, monotonic_now()); });
}

void DiskBridge::on_recovered(disk::SpaceHandle space, std::span<const disk::Chain> chains) {
  std::vector<node::RecoveredChain> found;
  found.reserve(chains.size());
  for (const disk::Chain& chain : chains) found.push_back({chain.parent, chain.keys, chain.slots});
  apply_(
      [&](node::Node& node) { node.on_disk_recovered(static_cast<node::SpaceNumber>(space), found, monotonic_now()); });
}

void DiskBridge::on_opened(disk::SpaceHandle space, const disk::Opened& opened) {
  const double seconds = static_cast<double>(opened.duration) / kSecond;
  char line[80];
  std::snprintf(line, sizeof line, "SSD cache: %llu blocks found in %.3f s, records discarded: ",
                static_cast<unsigned long long>(opened.recovered), seconds);
  log_info(line + describe(opened.discarded));
  for (const std::string& dropped : opened.dropped_files) log_warning("SSD cache: " + dropped);
  {
    std::lock_guard lock(mutex_);
    opened_.push_back({opened.recovered, seconds, opened.discarded, opened.dropped_files});
  }
  apply_([&](node::Node& node) {
    node.on_disk_opened(static_cast<node::SpaceNumber>(space), opened.slots, monotonic_now());
  });
}

void DiskBridge::on_health(unsigned drive, const disk::Health& health) {
  readable_[drive].store(health.reads, std::memory_order_relaxed);
}

}  // namespace flexkv::server
