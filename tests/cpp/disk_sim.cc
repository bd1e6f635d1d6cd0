#include "disk_sim.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

namespace flexkv::testing {
namespace {

constexpr Nanos kAnswerTime = 60 * kSecond;  // an opening and a reset take no longer, whatever a drive does
constexpr std::uint64_t kOverheadBytes = 64 << 10;

}  // namespace

class DiskSim::HandWorkers final : public disk::Workers {
 public:
  explicit HandWorkers(std::shared_ptr<Jobs> jobs) : jobs_(std::move(jobs)) {}
  void post(disk::Job job) override {
    if (!stopped_) jobs_->push_back(std::move(job));
  }
  void stop() override {
    stopped_ = true;
    Jobs().swap(*jobs_);
  }
  bool stop(Nanos, disk::Job last) override {
    stop();
    if (last) last();
    return true;
  }

 private:
  std::shared_ptr<Jobs> jobs_;
  bool stopped_ = false;
};

DiskSim::DiskSim(std::uint64_t seed, bool verbose, DiskSimTotals& totals)
    : seed_(seed),
      verbose_(verbose),
      totals_(totals),
      prng_(Prng::mix(seed + 1)),
      strict_(prng_.chance(50)),
      calm_(prng_.chance(50)) {
  const std::uint64_t drives = 1 + prng_.below(3);
  for (unsigned i = 0; i < drives; ++i) media_.push_back(std::make_shared<SimMedium>());
  for (std::uint8_t i = 0; i < 2; ++i) {
    Model& model = models_.emplace_back();
    model.id[0] = static_cast<std::uint8_t>(i + 1);
    model.slot_bytes = 4096 * (1 + prng_.below(3));
    model.blocks_name = disk::space_name(model.id) + ".blocks";
    model.records_name = disk::space_name(model.id) + ".records";
    model.blocks_bytes.resize(drives);
    model.parents.push_back(0);
    const Key keys = static_cast<Key>(8 + prng_.below(40));
    for (Key key = 1; key <= keys; ++key) {
      model.parents.push_back(prng_.chance(20) ? 0 : static_cast<Key>(prng_.below(key)));
    }
  }
}

void DiskSim::run() {
  const std::uint64_t lives = 3 + prng_.below(4);
  for (life_ = 0; life_ < lives && !::testing::Test::HasFailure(); ++life_) {
    start_life();
    live();
    end_life();
    if (prng_.chance(35)) damage();
  }
}

// ---- lives ---------------------------------------------------------------------------------------------------------

void DiskSim::start_life() {
  ++totals_.lives;
  if (share_ == 0 || prng_.chance(40)) {
    share_ = kOverheadBytes + 20000 + prng_.below(400000);
    if (prng_.chance(10)) share_ = kOverheadBytes + prng_.below(30000);
  }
  faulty_ = !calm_ && prng_.chance(35);
  overlaps_ = prng_.chance(20);
  hung_ = false;
  // What is too much for a smaller share goes first, by the lane.
  allowed_.clear();
  for (const auto& medium : media_) allowed_.push_back(std::max(share_, medium->used_bytes()));
  drives_.assign(drive_count(), nullptr);
  off_.clear();
  jobs_.clear();
  stuck_.clear();
  SimFaults faults;
  if (faulty_) {
    faults.fail = static_cast<unsigned>(prng_.below(8));
    faults.partial = static_cast<unsigned>(prng_.below(30));
    faults.retry = static_cast<unsigned>(prng_.below(20));
    faults.slow = static_cast<unsigned>(prng_.below(10));
  }
  const bool faults_at_once = prng_.chance(40);
  std::vector<disk::VolumeSpec> specs(drive_count());
  for (unsigned i = 0; i < drive_count(); ++i) {
    specs[i].directory = "drive " + std::to_string(i);
    media_[i]->capacity_bytes =
        faulty_ && prng_.chance(30) ? media_[i]->used_bytes() + prng_.below(100000) : 1ULL << 40;
    for (const Model& model : models_) {
      for (const std::string& name : {model.blocks_name, model.records_name}) {
        const auto file = media_[i]->files.find(name);
        if (file == media_[i]->files.end()) continue;
        specs[i].found[model.id].bytes += file->second->size();
        specs[i].found[model.id].last_use = static_cast<std::int64_t>(prng_.below(3));
      }
    }
    if (drive_count() > 1 && !calm_ && prng_.chance(12)) {
      specs[i].why_not = "away";
      ++totals_.absent;
      continue;
    }
    SimDriveOptions options;
    options.seed = prng_.next();
    options.start = now_;
    options.limits.io_bytes_max = 4096 * (1 + prng_.below(8));
    options.limits.depth = static_cast<std::uint32_t>(1 + prng_.below(16));
    if (faults_at_once) options.faults = faults;
    specs[i].open_drive = [this, i, options](file::DriveSink& sink) -> Result<std::unique_ptr<file::Drive>> {
      auto drive = std::make_unique<SimDrive>(options, media_[i], sink);
      drives_[i] = drive.get();
      return std::unique_ptr<file::Drive>(std::move(drive));
    };
  }
  disk::TierOptions options;
  options.bytes_max = share_ * drive_count();
  options.strict = strict_;
  options.requests_per_drive_max = static_cast<std::uint32_t>(4 + prng_.below(60));
  options.now = [this] { return now_; };
  options.wall_seconds = [this] { return wall_seconds_ += 1000; };
  tier_ = std::make_unique<disk::DiskTier>(options, specs, *this, [this](auto&&...) {
    return std::make_unique<HandWorkers>(jobs_.emplace_back(std::make_shared<Jobs>()));
  });
  if (verbose_) {
    std::fprintf(stderr, "life %u: %u drives, strict %d, share %llu, faulty %d (at once %d)\n", life_, drive_count(),
                 strict_, static_cast<unsigned long long>(share_), faulty_, faults_at_once);
  }
  for (unsigned i = 0; i < models_.size(); ++i) {
    if (prng_.chance(85)) open(i);
  }
  if (prng_.chance(10)) hang(true);
  if (prng_.chance(70)) settle();
  for (SimDrive* drive : drives_) {
    if (drive != nullptr) drive->set_faults(faults);
  }
}

void DiskSim::live() {
  const std::uint64_t actions = 20 + prng_.below(150);
  for (std::uint64_t i = 0; i < actions && !::testing::Test::HasFailure(); ++i) {
    act();
    for (std::uint64_t jobs = prng_.below(5); jobs > 0 && run_job(); --jobs) check_media();
    if (prng_.chance(60)) advance(now_ + static_cast<Nanos>(prng_.below(600 * kMicrosecond)));
  }
}

void DiskSim::act() {
  const auto model = static_cast<unsigned>(prng_.below(models_.size()));
  const std::uint64_t what = prng_.below(200);
  if (what < 110) return write(model);
  if (what < 165) return read(model);
  if (what < 168) return reset(model);
  if (what < 174) return close(model);
  if (what < 182) return open(model);
  if (what < 184) return hang(true);
  if (what < 187) return hang(false);
  if (what < 190) return settle();
  if (what < 191) return advance(now_ + 70 * kSecond);
  if (what < 192) {
    run_jobs();
    return tier_->remove_closed({});
  }
  if (what < 194) return read_all();
  if (ops_.empty()) return;
  auto op = ops_.begin();
  std::advance(op, static_cast<std::ptrdiff_t>(prng_.below(ops_.size())));
  op->second.excused = true;
  tier_->cancel(op->first);
}

void DiskSim::end_life() {
  const std::uint64_t how = prng_.below(10);
  if (how < 3 || prng_.chance(30)) settle();
  if (how >= 3 && how < 5) read_all();
  if (how >= 4) {
    const bool power = how >= 7;
    ++(power ? totals_.power_cuts : totals_.kills);
    for (SimDrive* drive : drives_) {
      if (drive != nullptr) power ? drive->power_cut() : drive->kill();
    }
    // What the tier still does on its way out does not happen.
    for (auto& medium : media_) {
      auto copy = std::make_shared<SimMedium>(*medium);
      for (auto& [name, file] : copy->files) file = std::make_shared<SimFile>(*file);
      medium = std::move(copy);
    }
    if (power && !strict_) {
      for (Model& model : models_) model.expected.clear();
    }
  }
  if (verbose_) std::fprintf(stderr, "  ends by %s\n", how < 4 ? "close" : how < 7 ? "kill" : "power cut");
  const bool idle = quiet() && std::ranges::none_of(drives_, [](const SimDrive* drive) {
                      return drive != nullptr && (drive->stats().queued > 0 || !drive->stats().available);
                    });
  for (auto& [id, op] : ops_) op.excused = true;
  const bool closed = tier_->close(0);
  if (how < 4 && idle) check(closed, "a tier that is idle does not close");
  tier_.reset();
  for (Model& model : models_) {
    if (!model.confirmed) model.expected.clear();
    for (const auto& [id, op] : ops_) {
      if (op.write && &models_[op.model] == &model) model.expected.erase(op.slot);
    }
    model.state = Model::State::kClosed;
    model.busy.clear();
  }
  ops_.clear();
  resets_pending_.clear();
  check_media();
}

// ---- actions -------------------------------------------------------------------------------------------------------

void DiskSim::open(unsigned number) {
  Model& model = models_[number];
  if (model.state != Model::State::kClosed) return;
  model.handle = disk::SpaceHandle{next_handle_++};
  model.state = Model::State::kOpening;
  model.slots = std::make_shared<std::vector<std::uint32_t>>(drive_count());
  model.floor = 0;
  model.was_reset = false;
  model.opened_by = now_ + kAnswerTime;
  model.found.clear();
  model.held.clear();
  model.overlapped.clear();
  note("opening of model " + std::to_string(number));
  tier_->open_space(model.handle, model.id, model.slot_bytes);
}

void DiskSim::close(unsigned number) {
  Model& model = models_[number];
  if (model.state == Model::State::kClosed || !model.busy.empty()) return;
  if (!model.confirmed || model.state == Model::State::kOpening) model.expected.clear();
  model.state = Model::State::kClosed;
  note("close of model " + std::to_string(number));
  tier_->close_space(model.handle);
}

void DiskSim::write(unsigned number) {
  Model& model = models_[number];
  if (model.state != Model::State::kOpen) return;
  const auto drive = static_cast<unsigned>(prng_.below(drive_count()));
  const std::uint32_t slots = (*model.slots)[drive];
  if (slots == 0) return;
  const auto slot =
      static_cast<std::uint32_t>(prng_.below(prng_.chance(50) ? std::min(slots, 6U) : slots)) * drive_count() + drive;
  if (model.busy.contains(slot) && !overlaps_) return;
  Key key = 0;
  for (int tries = 0; tries < 4; ++tries) {
    key = static_cast<Key>(1 + prng_.below(model.parents.size() - 1));
    const Key parent = model.parents[key];
    if (parent == 0 || std::ranges::any_of(model.held, [&](const auto& held) { return held.second == parent; })) break;
  }
  Op op;
  op.write = true;
  op.model = number;
  op.slot = slot;
  op.key = key;
  op.generation = model.generation;
  if (prng_.chance(10)) op.deadline = now_ + static_cast<Nanos>(prng_.below(kMillisecond));
  op.excused = op.deadline > 0;
  op.bytes.reset(static_cast<std::byte*>(std::aligned_alloc(4096, model.slot_bytes)));
  const std::span<std::byte> bytes(op.bytes.get(), model.slot_bytes);
  const std::uint64_t version = next_version_++;
  fill(model, key, version, bytes);
  const disk::OpId id = next_op_++;
  const auto admission = tier_->write(
      {id, model.handle, slot, block_key(model, key), block_key(model, model.parents[key]), bytes, op.deadline});
  if (admission != disk::Admission::kQueued) {
    ++totals_.refused;
    check(faulty_ || hung_ || drives_[drive] == nullptr || admission == disk::Admission::kBusy || overlaps_ ||
              (strict_ && !model.confirmed) || admission == disk::Admission::kQuarantined,
          "a write is refused by a drive that works");
    return;
  }
  model.versions[key][version] = op.generation;
  model.last_version[key] = op.version = version;
  std::erase_if(model.expected, [&](const auto& e) { return e.first == slot || e.second.key == key; });
  std::erase_if(model.held, [&](const auto& held) { return held.first == slot || held.second == key; });
  if (model.busy[slot]++ > 0) model.overlapped.insert(slot);
  ops_[id] = std::move(op);
}

void DiskSim::read(unsigned number) {
  Model& model = models_[number];
  if (model.state != Model::State::kOpen) return;
  Op op;
  op.model = number;
  if (!model.held.empty() && prng_.chance(95)) {
    auto held = model.held.begin();
    std::advance(held, static_cast<std::ptrdiff_t>(prng_.below(model.held.size())));
    op.slot = held->first;
    op.key = held->second;
  } else {
    // What need not be there.
    const auto drive = static_cast<unsigned>(prng_.below(drive_count()));
    if ((*model.slots)[drive] == 0) return;
    op.slot = static_cast<std::uint32_t>(prng_.below((*model.slots)[drive])) * drive_count() + drive;
    op.key = static_cast<Key>(1 + prng_.below(model.parents.size() - 1));
    if (model.busy.contains(op.slot)) return;
    const auto held = model.held.find(op.slot);
    if (held == model.held.end() || held->second != op.key) {
      model.expected.erase(op.slot);
      if (held != model.held.end()) model.held.erase(held);
    }
  }
  if (prng_.chance(20)) op.deadline = now_ + static_cast<Nanos>(prng_.below(3 * kMillisecond)) + 1;
  op.excused = op.deadline > 0;
  op.generation = model.generation;
  const bool verifies = prng_.chance(25);
  if (!verifies) op.bytes.reset(static_cast<std::byte*>(std::aligned_alloc(4096, model.slot_bytes)));
  const disk::OpId id = next_op_++;
  const auto admission = tier_->read({id,
                                      model.handle,
                                      op.slot,
                                      block_key(model, op.key),
                                      {op.bytes.get(), verifies ? 0 : model.slot_bytes},
                                      verifies ? file::Urgency::kScrub : file::Urgency::kLoad,
                                      op.deadline});
  if (admission != disk::Admission::kQueued) {
    ++totals_.refused;
    check(faulty_ || hung_ || admission == disk::Admission::kBusy, "a read is refused by a drive that works");
    return;
  }
  if (model.busy[op.slot]++ > 0 && overlaps_) model.overlapped.insert(op.slot);
  ops_[id] = std::move(op);
}

void DiskSim::read_all() {
  for (unsigned i = 0; i < models_.size(); ++i) {
    for (std::size_t n = models_[i].held.size(); n > 0; --n) {
      read(i);
      run_job();
      advance(now_ + 100 * kMicrosecond);
    }
  }
}

void DiskSim::reset(unsigned number) {
  Model& model = models_[number];
  if (model.state == Model::State::kClosed) return;
  ++totals_.resets;
  const std::uint64_t generation = next_generation_++;
  note("reset of model " + std::to_string(number) + ": generation " + std::to_string(generation));
  model.was_reset = true;
  model.floor = model.generation = generation;
  model.confirmed = false;
  model.held.clear();
  model.expected.clear();
  resets_pending_[generation] = now_ + kAnswerTime;
  tier_->reset_space(model.handle, [this, &model, generation, slots = model.slots](bool durable) {
    check(resets_pending_.erase(generation) == 1, "a reset is answered twice");
    if (!durable) {
      check(faulty_ || hung_, "a reset fails on drives that work");
      return;
    }
    ++totals_.resets_durable;
    note("generation " + std::to_string(generation) + " is durable");
    if (model.generation == generation) model.confirmed = true;
    for (unsigned i = 0; i < slots->size(); ++i) {
      if ((*slots)[i] > 0) model.durable_resets[generation].insert(i);
    }
  });
}

void DiskSim::hang(bool hanging) {
  if (hanging) {
    if (calm_) return;
    const auto which = static_cast<unsigned>(prng_.below(drive_count()));
    SimDrive* drive = drives_[which];
    if (drive == nullptr) return;
    ++totals_.hangs;
    hung_ = true;
    if (prng_.chance(40)) {
      note("a call for a file hangs");
      drive->hang_call(true);
      stuck_.insert(which);
    } else {
      note("a drive hangs");
      drive->hang(true);
    }
    if (!prng_.chance(50)) return;
    advance(now_ + 2 * kAnswerTime);
    check_time();
    return;
  }
  stuck_.clear();
  for (SimDrive* drive : drives_) {
    if (drive == nullptr) continue;
    drive->hang(false);
    drive->hang_call(false);
  }
}

// ---- time ----------------------------------------------------------------------------------------------------------

bool DiskSim::run_job() {
  std::vector<std::size_t> ready;
  for (std::size_t i = 0; i < jobs_.size(); ++i) {
    if (!jobs_[i]->empty() && !stuck(i)) ready.push_back(i);
  }
  if (ready.empty()) return false;
  const std::size_t which = ready[prng_.below(ready.size())];
  Jobs& jobs = *jobs_[which];
  // Several threads compute checksums.
  const std::size_t at = which == 0 ? prng_.below(std::min<std::size_t>(jobs.size(), 4)) : 0;
  const disk::Job job = std::move(jobs[at]);
  jobs.erase(jobs.begin() + static_cast<std::ptrdiff_t>(at));
  job();
  return true;
}

void DiskSim::run_jobs() {
  while (run_job()) {
  }
  for (unsigned i = 0; i < drive_count(); ++i) {
    if (!stuck_.contains(i)) allowed_[i] = share_;
  }
  check_media();
}

// Time does not pass while jobs wait, but for what live() does.
void DiskSim::advance(Nanos time) {
  const bool far = time > now_ + kSecond;
  while (true) {
    if (far) run_jobs();
    std::optional<Nanos> next;
    // What one does may give another something to do.
    for (std::size_t i = 0; i < 2 * drives_.size(); ++i) {
      if (SimDrive* drive = drives_[i % drives_.size()]) drive->run_until(now_);
    }
    for (SimDrive* drive : drives_) {
      if (drive == nullptr) continue;
      if (const auto at = drive->next_event(); at && (!next || *at < *next)) next = at;
    }
    bool ready = false;
    for (std::size_t i = 0; i < jobs_.size(); ++i) ready |= !jobs_[i]->empty() && !stuck(i);
    if (far && ready) continue;
    if (!next || *next > time) break;
    now_ = std::max(now_, *next);
  }
  now_ = std::max(now_, time);
  for (SimDrive* drive : drives_) {
    if (drive != nullptr) drive->run_until(now_);
  }
}

bool DiskSim::quiet() const {
  return ops_.empty() && resets_pending_.empty() &&
         std::ranges::all_of(jobs_, [](const auto& jobs) { return jobs->empty(); }) &&
         std::ranges::none_of(models_, [](const Model& m) { return m.state == Model::State::kOpening; });
}

// Until all is answered, which a drive that hangs must end for.
void DiskSim::settle() {
  hang(false);
  const Nanos until = now_ + 10 * kAnswerTime;
  do {
    run_jobs();
    advance(now_ + kMillisecond);
  } while (!quiet() && now_ < until && (ops_.empty() || now_ < until));
  check(quiet(), "something is never answered: " + std::to_string(ops_.size()) + " transfers, " +
                     std::to_string(resets_pending_.size()) + " resets");
  check_time();
}

void DiskSim::check_time() {
  for (const Model& model : models_) {
    if (model.state == Model::State::kOpening) check(now_ <= model.opened_by, "an opening takes too long");
  }
  for (const auto& [generation, by] : resets_pending_) check(now_ <= by, "a reset takes too long");
  for (const auto& [id, op] : ops_) {
    if (!op.write && op.deadline > 0) check(op.overdue || now_ <= op.deadline + kMillisecond, "a deadline is missed");
  }
}

void DiskSim::check_media() {
  for (unsigned i = 0; i < drive_count(); ++i) {
    SimMedium& medium = *media_[i];
    if (drives_[i] != nullptr) {
      check(medium.used_bytes() <= allowed_[i], "drive " + std::to_string(i) + " holds " +
                                                    std::to_string(medium.used_bytes()) + " bytes of " +
                                                    std::to_string(allowed_[i]));
    }
    // What makes room is forgotten.
    for (Model& model : models_) {
      const auto records = medium.files.find(model.records_name);
      if (records == medium.files.end() || records->second->size() < disk::kHeaderBytes) forget_header(model, i);
      const auto blocks = medium.files.find(model.blocks_name);
      const std::uint64_t bytes = blocks == medium.files.end() ? 0 : blocks->second->size();
      if (bytes < model.blocks_bytes[i]) forget(model, i, static_cast<std::uint32_t>(bytes / model.slot_bytes));
      model.blocks_bytes[i] = bytes;
    }
  }
}

}  // namespace flexkv::testing
