// What a request is to load of what is kept, and what its engine computes anew (docs/decisions/0016).

#include <algorithm>
#include <utility>

#include "flexkv/node/node_state.h"

namespace flexkv::node {
namespace {

// Of the pool: what a prompt may take. A load holds its whole prompt.
constexpr std::uint64_t kPromptShare = 75;
// A drive that is not worth it, and that nothing was read from for kUntried, gives so many blocks that nobody waits
// for: their speed tells whether it is worth it now.
constexpr Nanos kUntried = kSecond;
constexpr std::uint32_t kTriedBlocks = 16;

}  // namespace

void Node::set_prefill(EngineHandle handle, const plan::PrefillTime& time) {
  if (Engine* engine = find_engine(handle)) engine->prefill = time;
}

double Node::disk_bytes_per_second() const {
  double sum = 0;
  if (disk_ == nullptr) return sum;
  for (const plan::FlowRate& reads : disk_->reads) sum += reads.bytes_per_second();
  return sum;
}

std::vector<Choice> Node::choices() const {
  std::vector<Choice> latest;
  if (disk_ == nullptr) return latest;
  const std::uint64_t count = disk_->choice_count;
  for (std::uint64_t i = count - std::min<std::uint64_t>(count, kChoicesKept); i < count; ++i) {
    latest.push_back(disk_->choices[i % kChoicesKept]);
  }
  return latest;
}

// What of a match can and should be loaded: as far as drives serve, as host memory can hold it, and as it is faster
// than computing. Leaves the match's slots in the scratch vectors.
Node::Served Node::served(const Engine& engine, const Sequence& sequence, Purpose purpose) {
  const Space& space = *engine.space;
  Served result{{sequence.matched, Reason::kNone, 0, sequence.matched}, std::nullopt, now_};
  Lookup& found = result.lookup;
  if (disk_ == nullptr || space.index.block_count(kDiskTier) == 0) return result;
  auto& host = disk_->host_slots;
  auto& disk = disk_->disk_slots;
  host.resize(sequence.matched);
  space.index.collect(sequence.pin, kHostTier, 0, host);
  const std::uint32_t engine_blocks = std::min(sequence.engine_blocks, sequence.matched);
  auto at = std::find(host.begin() + engine_blocks, host.end(), index::kNoSlot);
  if (at == host.end()) return result;
  const auto in_host = static_cast<std::uint32_t>(at - host.begin());
  disk.resize(sequence.matched);
  space.index.collect(sequence.pin, kDiskTier, 0, disk);
  const std::uint32_t room = room_for_prompt(space);
  bool all_serve = true;
  for (unsigned drive = 0; drive < disk_->port.drive_count(); ++drive) all_serve &= disk_->port.can_read(drive);
  // Then only what there is no room for can be in the way.
  if (all_serve)
    at = std::max(at, host.begin() + static_cast<std::ptrdiff_t>(std::min<std::size_t>(room, host.size())));
  while ((at = std::find(at, host.end(), index::kNoSlot)) != host.end()) {
    const auto block = static_cast<std::uint32_t>(at - host.begin());
    const bool off = !disk_->port.can_read(space.disk_slots->drive_of(disk[block]));
    if (!off && block < room) {
      ++at;
      continue;
    }
    found = {block, off ? Reason::kDiskOff : Reason::kNoRoomToLoad, 0, 0};
    break;
  }
  if (found.matched_blocks > in_host) {
    result.choice = choose(engine, sequence, found.matched_blocks, purpose);
    std::uint32_t blocks = 0;
    for (const plan::Stretch& stretch : disk_->stretches) {
      if ((blocks += stretch.blocks) <= result.choice->chosen_blocks)
        result.arrives = now_ + static_cast<Nanos>(stretch.arrives);
    }
    if (result.choice->chosen_blocks < found.matched_blocks) {
      found = {result.choice->chosen_blocks, Reason::kNotWorthLoading, 0, 0};
    }
  }
  found.host_blocks = std::min(in_host, found.matched_blocks);
  found.disk_blocks =
      static_cast<std::uint32_t>(std::count(host.begin() + std::min(engine_blocks, found.matched_blocks),
                                            host.begin() + found.matched_blocks, index::kNoSlot));
  return result;
}

// What the space has of host memory and could get. Other models keep what they have as long as they have engines.
std::uint64_t Node::slots_in_reach(const Space& space) const {
  std::uint64_t bytes = ranges_.free_bytes();
  for (const auto& other : spaces_) {
    if (other.get() != &space && idle(*other)) bytes += other->slots.slot_count() * other->slots.slot_bytes();
  }
  return space.slots.slot_count() + bytes / space.slots.slot_bytes();
}

// How many blocks of a prompt host memory can hold at once.
std::uint32_t Node::room_for_prompt(const Space& space) const {
  const std::uint64_t reach = slots_in_reach(space);
  return static_cast<std::uint32_t>(std::max<std::uint64_t>(reach * kPromptShare / 100, reach > 0 ? 1 : 0));
}

double Node::from_now(Nanos time) const { return static_cast<double>(std::max<Nanos>(time - now_, 0)); }

// How many blocks of what was found in the stretches to load, as the engine is now.
plan::LoadChoice Node::choose_load(const Engine& engine, const Sequence& sequence,
                                   std::span<const plan::Stretch> stretches, std::uint32_t behind) {
  arrivals_.clear();
  for (const auto& [job, one] : engine.arrivals) {
    arrivals_.push_back({from_now(one.arrives), static_cast<double>(one.compute)});
  }
  std::ranges::sort(arrivals_, {}, &plan::Arrival::arrives);
  plan::LoadQuestion question;
  question.stretches = stretches;
  question.block_tokens = engine.block_tokens;
  question.prompt_blocks = static_cast<std::uint32_t>(sequence.keys.size());
  question.engine_blocks = sequence.engine_blocks;
  question.prefill = engine.prefill;
  question.engine_free = from_now(engine.computes_until);
  question.arrivals = arrivals_;
  question.behind = behind;
  return plan::choose_load(question);
}

// Of the first `blocks`, whose slots are in the scratch vectors.
Choice Node::choose(const Engine& engine, const Sequence& sequence, std::uint32_t blocks, Purpose purpose) {
  Choice choice;
  choice.at = now_;
  choice.engine = engine.handle;
  choice.sequence = sequence.id;
  choice.prompt_blocks = static_cast<std::uint32_t>(sequence.keys.size());
  choice.engine_blocks = sequence.engine_blocks;
  choice.chosen_blocks = blocks;
  choice.read_bytes_per_second = look_at_drives(*engine.space, purpose);
  for (const auto& drive : disk_->reading) choice.read_wait = std::max(choice.read_wait, drive.free);
  look_at_blocks(*engine.space, sequence, choice, blocks, purpose);
  choice.engine_wait = from_now(engine.computes_until);
  choice.behind = purpose == Purpose::kLookup ? engine.announced : 0;
  choice.basis = options_.always_load                                  ? Choice::Basis::kAlways
                 : choice.read_bytes_per_second <= 0                   ? Choice::Basis::kReadsUnknown
                 : !engine.prefill.known() || engine.block_tokens == 0 ? Choice::Basis::kPrefillUnknown
                                                                       : Choice::Basis::kCost;
  if (choice.read_bytes_per_second <= 0 || !engine.prefill.known() || engine.block_tokens == 0) return choice;
  const plan::LoadChoice best = choose_load(engine, sequence, disk_->stretches, choice.behind);
  choice.expected_if_all = best.nanos_if_all;
  choice.expected_if_none = best.nanos_if_none;
  choice.expected = choice.basis == Choice::Basis::kCost ? best.nanos : best.nanos_if_all;
  if (choice.basis == Choice::Basis::kCost) choice.chosen_blocks = best.blocks;
  return choice;
}

// How fast each drive reads, and when it has read what it has to and what waits for it here: scratch vector. Loads do
// not wait for prefetches that no drive has yet. Returns the speed of all; 0: not known.
double Node::look_at_drives(const Space& space, Purpose purpose) {
  double sum = 0;
  double known = 0;
  for (const plan::FlowRate& reads : disk_->reads) {
    sum += reads.bytes_per_second();
    known += reads.bytes_per_second() > 0;
  }
  if (known == 0) return 0;
  const auto drives = static_cast<double>(disk_->reads.size());
  const std::size_t queued = disk_->loads.size() + (purpose == Purpose::kPrefetch ? disk_->prefetches.size() : 0);
  const double queued_bytes = static_cast<double>(queued * space.slots.slot_bytes()) / drives;
  for (std::size_t i = 0; i < disk_->reads.size(); ++i) {
    const plan::FlowRate& reads = disk_->reads[i];
    const double rate = reads.bytes_per_second() > 0 ? reads.bytes_per_second() : sum / known;
    const double waiting = static_cast<double>(reads.waiting_bytes()) + queued_bytes;
    const double nanos_per_byte = static_cast<double>(kSecond) / rate;
    disk_->reading[i] = {nanos_per_byte, waiting * nanos_per_byte, 0, 0};
  }
  return sum / known * drives;
}

// Where the blocks are, and when they could be in host memory: stretches, in the scratch vector. What the engine has
// itself costs nothing, and what host memory has is taken to: links to devices are far faster than any engine computes.
void Node::look_at_blocks(const Space& space, const Sequence& sequence, Choice& choice, std::uint32_t blocks,
                          Purpose purpose) {
  enum class Where { kHost, kComing, kDrive };
  const auto slot_bytes = static_cast<double>(space.slots.slot_bytes());
  auto& stretches = disk_->stretches;
  stretches.clear();
  Where last = Where::kHost;
  double arrives = 0;
  double reading = 0;
  // A drive reads what it is asked for one after the other: what a stretch takes is known at its end.
  const auto end_stretch = [&] {
    if (stretches.empty()) return;
    for (Disk::Reading& drive : disk_->reading) {
      if (drive.asked == 0) continue;
      const double time = std::exchange(drive.asked, 0) * slot_bytes * drive.nanos_per_byte;
      arrives = std::max(arrives, drive.free += time);
      reading = std::max(reading, drive.own += time);
    }
    plan::Stretch& stretch = stretches.back();
    stretch.arrives = arrives;
    stretch.reading = reading;
    (last == Where::kHost     ? choice.host_blocks
     : last == Where::kComing ? choice.coming_blocks
                              : choice.drive_blocks) += stretch.blocks;
  };
  for (std::uint32_t i = 0; i < blocks; ++i) {
    Where here = Where::kHost;
    unsigned number = 0;
    const Fetch* fetch = nullptr;
    if (i >= choice.engine_blocks && disk_->host_slots[i] == index::kNoSlot) {
      number = space.disk_slots->drive_of(disk_->disk_slots[i]);
      fetch = space.fetches.empty() ? nullptr : on_its_way(space, sequence.keys[i], purpose);
      here = fetch != nullptr ? Where::kComing : Where::kDrive;
    }
    if (i == 0 || here != last) {
      end_stretch();
      stretches.push_back({});
      last = here;
    }
    ++stretches.back().blocks;
    Disk::Reading& drive = disk_->reading[number];
    if (here == Where::kDrive) ++drive.asked;
    if (here != Where::kComing) continue;
    const bool begun = fetch->host != index::kNoSlot;
    const std::uint64_t waiting = begun ? disk_->reads[number].waiting_bytes_until(fetch->position) : 0;
    arrives = std::max(arrives, begun ? static_cast<double>(waiting) * drive.nanos_per_byte : drive.free);
  }
  end_stretch();
  choice.host_blocks -= choice.engine_blocks;
}

// The block's fetch, if who asks need not ask for another: loads do not wait for prefetches that no drive has yet.
const Node::Fetch* Node::on_its_way(const Space& space, const key::BlockKey& key, Purpose purpose) {
  const auto found = space.fetches.find(key);
  if (found == space.fetches.end()) return nullptr;
  const Fetch& fetch = found->second;
  return fetch.host != index::kNoSlot || !fetch.prefetch || purpose == Purpose::kPrefetch ? &fetch : nullptr;
}

// What it gives the engine to do: now, or when its blocks have come.
void Node::note_compute(Engine& engine, Sequence& sequence, const Served& served) {
  sequence.arrives = served.arrives;
  sequence.compute = 0;
  if (engine.prefill.known() && engine.block_tokens > 0) {
    const double there =
        double{1} * std::max(served.lookup.matched_blocks, sequence.engine_blocks) * engine.block_tokens;
    const double tokens = static_cast<double>(sequence.keys.size() * engine.block_tokens) - there;
    sequence.compute = static_cast<Nanos>(engine.prefill.estimate(std::max(tokens, 1.0), there));
  }
  sequence.computing = served.lookup.disk_blocks == 0;
  if (sequence.computing) engine.computes_until = std::max(engine.computes_until, now_) + sequence.compute;
}

// Remembers what was chosen for a lookup.
void Node::note_choice(Engine& engine, Sequence& sequence, const Served& served, bool first) {
  note_compute(engine, sequence, served);
  if (!served.choice) return;
  const Choice& choice = *served.choice;
  const std::uint32_t found = choice.found_blocks();
  // Asked again, it replaces what was chosen before.
  const bool kept = sequence.choice != 0 && sequence.choice + kChoicesKept > disk_->choice_count;
  if (!kept) sequence.choice = ++disk_->choice_count;
  disk_->choices[(sequence.choice - 1) % kChoicesKept] = choice;
  if (first) {
    ++(choice.chosen_blocks == found                 ? stats_.choices_all
       : choice.chosen_blocks > choice.engine_blocks ? stats_.choices_part
                                                     : stats_.choices_none);
    stats_.recomputed_blocks += found - choice.chosen_blocks;
  }
  if (choice.chosen_blocks < found) try_slow_drives(*engine.space, sequence, choice);
}

void Node::try_slow_drives(Space& space, const Sequence& sequence, const Choice& choice) {
  const bool tried = std::ranges::any_of(disk_->reads, [&](const auto& reads) { return reads.idle(now_) < kUntried; });
  if (tried || !disk_->prefetches.empty()) return;
  const std::uint32_t found = choice.found_blocks();
  std::uint32_t end = choice.chosen_blocks;
  for (std::uint32_t on_drives = 0; end < found && on_drives < kTriedBlocks; ++end) {
    on_drives += disk_->host_slots[end] == index::kNoSlot;
  }
  fetch_ahead(space, sequence, end);
}

// Of a block that begins a chain.
bool Node::can_load(Engine& engine, const key::BlockKey& key, Nanos now) {
  Sequence alone;
  alone.keys.push_back(key);
  refresh_match(engine, alone, 1, false, now);
  Served found = served(engine, alone, Purpose::kLookup);
  look_beyond(engine, alone, found);
  drop_pin(*engine.space, alone.pin);
  return found.lookup.matched_blocks > 0;
}

Node::Lookup Node::lookup_last(EngineHandle handle, SequenceId id, std::span<const key::BlockKey> keys, Nanos now) {
  tell_time(now);
  Engine* engine = find_engine(handle);
  if (engine == nullptr || engine->space == nullptr) return {0, Reason::kNotReady, 0, 0};
  if (keys.empty()) return {};
  bool counted = false;
  if (const auto before = engine->sequences.find(id); before != engine->sequences.end()) {
    // Asked again, only the last answer counts.
    if (std::exchange(before->second.computing, false)) engine->computes_until -= before->second.compute;
    counted = before->second.counted;
    close_sequence(handle, id);
  }
  std::size_t number = keys.size();
  while (number > 0 && !can_load(*engine, keys[number - 1], now)) --number;
  const auto [sequence, problem] = sequence_of(*engine, id, 0, number > 0 ? keys.subspan(number - 1, 1) : keys.last(1));
  if (sequence == nullptr) return {0, problem, 0, 0};
  sequence->counted = counted;
  Lookup found = lookup(handle, id, 1, {}, now);
  if (found.matched_blocks > 0) found.matched_blocks = static_cast<std::uint32_t>(number);
  return found;
}

Node::Lookup Node::lookup(EngineHandle engine, const proto::LookupRequest& request, Nanos now) {
  return request.alone ? lookup_last(engine, request.sequence, request.keys, now)
                       : lookup(engine, request.sequence, request.base, request.keys, now, request.engine_blocks);
}

}  // namespace flexkv::node
