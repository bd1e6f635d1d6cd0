#include "flexkv/remote/engine.h"

#include <algorithm>
#include <utility>

#include "flexkv/base/assert.h"

namespace flexkv::remote {
namespace {

Outcome outcome_of(StoreOutcome outcome) {
  switch (outcome) {
    case StoreOutcome::kDone:
      return Outcome::kDone;
    case StoreOutcome::kMissing:
      return Outcome::kMissing;
    case StoreOutcome::kShort:
      return Outcome::kDamaged;
    case StoreOutcome::kUnavailable:
      return Outcome::kUnavailable;
    case StoreOutcome::kRefused:
    case StoreOutcome::kFailed:
      break;
  }
  return Outcome::kFailed;
}

}  // namespace

Engine::Engine(EngineOptions options, Store& store, RemoteSink& sink)
    : options_(options),
      sink_(sink),
      dispatch_(options.dispatch, store, options.seed, [this] { publish(); }),
      scan_backoff_(kSecond, std::max(options.scan_every, kSecond), options.seed),
      room_{options.blocks_max, 0} {}

Engine::~Engine() { end_all(); }

std::size_t Engine::contains(const SpaceName& space, std::span<const key::BlockKey> keys) const {
  const MutexLock lock(mutex_);
  const auto found = spaces_.find(space);
  if (found == spaces_.end() || !published_.reads_off.empty()) return 0;
  return found->second->catalog.leading(keys);
}

bool Engine::takes_writes() const {
  const MutexLock lock(mutex_);
  return published_.writes_off.empty();
}

std::uint64_t Engine::object_blocks(std::uint64_t slot_bytes) const {
  return std::clamp<std::uint64_t>(options_.object_bytes / (slot_bytes + kHeadBytes), 1, kObjectBlocksMax);
}

RemoteStats Engine::stats() const {
  const MutexLock lock(mutex_);
  RemoteStats stats = published_;
  stats.left_out = room_.left_out;
  for (const auto& [name, space] : spaces_) {
    stats.objects += space->catalog.objects();
    stats.blocks += space->catalog.blocks();
  }
  return stats;
}

// Before somebody is told of what is counted.
void Engine::publish() {
  counts_.gets = dispatch_.counts().gets;
  counts_.puts = dispatch_.counts().puts;
  counts_.lists = dispatch_.counts().lists;
  counts_.tried_again = dispatch_.counts().tried_again;
  counts_.reads_off = dispatch_.why_off(Dispatch::Kind::kRead);
  counts_.writes_off = dispatch_.why_off(Dispatch::Kind::kWrite);
  counts_.last_error = dispatch_.last_error();
  if (marks_) {
    counts_.marks = marks_->known.size();
    counts_.marks_unstored = marks_->unstored.size();
    counts_.marks_listed = marks_->listed;
    counts_.trouble = marks_->why_unread.empty() ? marks_->why_unwritten : marks_->why_unread;
  }
  const MutexLock lock(mutex_);
  published_ = counts_;
}

void Engine::open_space(const SpaceName& space, std::uint64_t slot_bytes, Nanos now) {
  if (find_space(space, slot_bytes)) return;
  close_space(space);
  const MutexLock lock(mutex_);
  auto& opened = spaces_[space];
  opened = std::make_shared<Space>(space, slot_bytes, room_);
  opened->scan_at = now;
}

void Engine::close_space(const SpaceName& space) {
  if (scan_ && scan_->space->codec.space() == space) drop_scan();
  const MutexLock lock(mutex_);
  spaces_.erase(space);
}

std::shared_ptr<Engine::Space> Engine::find_space(const SpaceName& name, std::uint64_t slot_bytes) const {
  const MutexLock lock(mutex_);
  const auto found = spaces_.find(name);
  if (found == spaces_.end() || found->second->codec.slot_bytes() != slot_bytes) return nullptr;
  return found->second;
}

// ---- reads ---------------------------------------------------------------------------------------------------------

void Engine::read(ReadRequest request, Nanos now) {
  FLEXKV_ASSERT(problem_of(request).empty());
  now_ = now;
  const RequestId id = request.id;
  deadlines_.emplace(request.deadline, id);
  const auto [place, added] = readings_.try_emplace(id);
  FLEXKV_ASSERT(added && !writings_.contains(id));
  Reading& reading = place->second;
  reading.space = find_space(request.space, request.slot_bytes);
  reading.want = request.keys.size();
  reading.there.resize(request.keys.size());
  reading.asked = std::move(request);
  if (reading.space == nullptr) {
    end_reading(id, Outcome::kMissing);
    return;
  }
  for (Piece& piece : pieces_of(reading)) order_read(id, reading, std::move(piece));
  tell(id);
}

std::vector<Engine::Piece> Engine::pieces_of(Reading& reading) const {
  const std::uint64_t at_once = std::max<std::uint64_t>(options_.object_bytes / reading.asked.slot_bytes, 1);
  std::vector<Piece> pieces;
  const MutexLock lock(mutex_);
  for (std::size_t i = 0; i < reading.want; ++i) {
    const auto place = reading.space->catalog.find(reading.asked.keys[i]);
    if (!place) {
      reading.want = i;
      reading.outcome = Outcome::kMissing;
      break;
    }
    if (!pieces.empty()) {
      Piece& last = pieces.back();
      if (last.object == place->object && last.index + last.count == place->index && last.count < at_once) {
        ++last.count;
        continue;
      }
    }
    pieces.push_back({place->object, place->index, i, 1, {}});
  }
  return pieces;
}

void Engine::order_read(RequestId id, Reading& reading, Piece piece) {
  const auto shared = std::make_shared<Piece>(std::move(piece));
  const ObjectCodec& codec = reading.space->codec;
  const auto buffers = std::span(reading.asked.buffers).subspan(shared->first, shared->count);
  const auto make = [&codec, shared, buffers]() -> Dispatch::StoreOp {
    GetOp op{codec.path_of(shared->object), codec.head_offset(shared->object.blocks, shared->index), {}};
    shared->heads.resize(shared->count);
    for (std::size_t i = 0; i < shared->count; ++i) {
      op.parts.emplace_back(shared->heads[i]);
      op.parts.push_back(buffers[i]);
    }
    return op;
  };
  reading.ops.insert(dispatch_.order(Dispatch::Kind::kRead, make, [this, id, shared](Ended& ended) {
    take_piece(id, ended.id, *shared, ended.outcome);
  }));
}

void Engine::take_piece(RequestId id, OpId op, Piece& piece, StoreOutcome outcome) {
  Reading& reading = readings_.at(id);
  reading.ops.erase(op);
  Space& space = *reading.space;
  if (outcome != StoreOutcome::kDone) {
    if (outcome == StoreOutcome::kMissing) blame(space, piece.object, Fault::kGone);
    if (outcome == StoreOutcome::kShort) blame(space, piece.object, Fault::kShort);
    stop_at(reading, piece.first, outcome_of(outcome));
  }
  for (std::size_t i = 0; outcome == StoreOutcome::kDone && i < piece.count; ++i) {
    const std::size_t block = piece.first + i;
    const auto fault = space.codec.check_block(piece.heads[i], reading.asked.buffers[block], reading.asked.keys[block]);
    if (fault) {
      blame(space, piece.object, *fault);
      stop_at(reading, block, Outcome::kDamaged);
      break;
    }
    reading.there[block] = true;
  }
  tell(id);
}

// No further than before this block.
void Engine::stop_at(Reading& reading, std::size_t block, Outcome outcome) {
  if (block >= reading.want) return;
  reading.want = block;
  reading.outcome = outcome;
}

void Engine::blame(Space& space, const ObjectName& object, Fault fault) {
  ++counts_.faults[static_cast<std::size_t>(fault)];
  const MutexLock lock(mutex_);
  if (fault == Fault::kGone) {
    space.catalog.forget(object);
  } else {
    space.catalog.condemn(object);
  }
}

// Of the blocks that are there; ends the request when that is all.
void Engine::tell(RequestId id) {
  Reading& reading = readings_.at(id);
  while (reading.next < reading.want && reading.there[reading.next]) {
    ++counts_.read_blocks;
    counts_.read_bytes += reading.asked.slot_bytes;
    sink_.on_block(id, static_cast<std::uint32_t>(reading.next++));
  }
  if (reading.next == reading.want) end_reading(id, reading.outcome);
}

void Engine::end_reading(RequestId id, Outcome outcome) {
  const Reading reading = std::move(readings_.extract(id).mapped());
  for (const OpId op : reading.ops) dispatch_.drop(op);
  deadlines_.erase({reading.asked.deadline, id});
  ++counts_.reads[static_cast<std::size_t>(outcome)];
  publish();
  sink_.on_end(id, outcome);
}

// ---- writes --------------------------------------------------------------------------------------------------------

void Engine::write(WriteRequest request, Nanos now) {
  FLEXKV_ASSERT(problem_of(request).empty());
  now_ = now;
  const RequestId id = request.id;
  deadlines_.emplace(request.deadline, id);
  const auto [place, added] = writings_.try_emplace(id);
  FLEXKV_ASSERT(added && !readings_.contains(id));
  Writing& writing = place->second;
  writing.space = find_space(request.space, request.slot_bytes);
  writing.asked = std::move(request);
  if (writing.space == nullptr) {
    end_writing(id, Outcome::kFailed);
    return;
  }
  const auto& blocks = writing.asked.blocks;
  const std::uint64_t at_once = object_blocks(writing.asked.slot_bytes);
  std::vector<bool> known(blocks.size());
  {
    const MutexLock lock(mutex_);
    for (std::size_t i = 0; i < blocks.size(); ++i) known[i] = writing.space->catalog.contains(blocks[i].key);
  }
  for (std::size_t first = 0, end = 0; first < blocks.size(); first = end) {
    end = first + 1;
    if (known[first]) continue;
    while (end < blocks.size() && end - first < at_once && !known[end] && blocks[end].parent == blocks[end - 1].key) {
      ++end;
    }
    order_write(id, writing, first, end - first);
  }
  if (writing.ops.empty()) end_writing(id, Outcome::kDone);
}

void Engine::order_write(RequestId id, Writing& writing, std::size_t first, std::size_t count) {
  struct Object {
    Chain chain;
    ObjectName name;
    std::vector<std::byte> header;
    std::vector<BlockHead> heads;
  };
  const auto object = std::make_shared<Object>();
  const auto blocks = std::span(writing.asked.blocks).subspan(first, count);
  const auto buffers = std::span(writing.asked.buffers).subspan(first, count);
  const std::shared_ptr<Space> space = writing.space;
  object->chain.parent = blocks[0].parent;
  for (const WriteRequest::Block& block : blocks) object->chain.keys.push_back(block.key);
  object->name = space->codec.name_of(object->chain);
  const auto make = [this, space, object, blocks, buffers]() -> Dispatch::StoreOp {
    PutOp op{space->codec.path_of(object->name), {}};
    {
      const MutexLock lock(mutex_);
      op.replace = space->catalog.condemned(object->name);
    }
    object->header = space->codec.encode_header(object->chain);
    object->heads.resize(blocks.size());
    op.parts.emplace_back(object->header);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      object->heads[i] = space->codec.encode_head(blocks[i].key, blocks[i].parent, buffers[i]);
      op.parts.emplace_back(object->heads[i]);
      op.parts.push_back(buffers[i]);
    }
    return op;
  };
  writing.ops.insert(dispatch_.order(Dispatch::Kind::kWrite, make, [this, id, space, object](Ended& ended) {
    Writing& request = writings_.at(id);
    request.ops.erase(ended.id);
    if (ended.outcome == StoreOutcome::kDone) {
      if (marks_) marks_->why_unwritten.clear();
      ++counts_.objects_written;
      counts_.written_blocks += object->chain.keys.size();
      counts_.written_bytes += object->chain.keys.size() * space->codec.slot_bytes();
      const MutexLock lock(mutex_);
      space->catalog.pardon(object->name);
      space->catalog.add(object->name, std::move(object->chain));
    } else {
      request.outcome = ended.outcome == StoreOutcome::kUnavailable ? Outcome::kUnavailable : Outcome::kFailed;
    }
    if (request.ops.empty()) end_writing(id, request.outcome);
  }));
}

void Engine::end_writing(RequestId id, Outcome outcome) {
  const Writing writing = std::move(writings_.extract(id).mapped());
  for (const OpId op : writing.ops) dispatch_.drop(op);
  deadlines_.erase({writing.asked.deadline, id});
  ++counts_.writes[static_cast<std::size_t>(outcome)];
  publish();
  sink_.on_written(id, outcome);
}

// ---- what ends them, and time --------------------------------------------------------------------------------------

void Engine::cancel(RequestId id) {
  if (readings_.contains(id)) end_reading(id, Outcome::kCanceled);
  if (writings_.contains(id)) end_writing(id, Outcome::kCanceled);
}

void Engine::end_all() {
  drop_scan();
  if (marks_) {
    for (const OpId op : std::exchange(marks_->ops, {})) dispatch_.drop(op);
  }
  while (!readings_.empty()) end_reading(readings_.begin()->first, Outcome::kCanceled);
  while (!writings_.empty()) end_writing(writings_.begin()->first, Outcome::kCanceled);
  publish();
}

void Engine::give_up(RequestId id, Nanos now) {
  const auto slow = [&](OpId op) { return dispatch_.slow(op, now); };
  if (const auto reading = readings_.find(id); reading != readings_.end()) {
    const bool gave_up = std::ranges::any_of(reading->second.ops, slow);
    end_reading(id, Outcome::kDeadline);
    if (gave_up) dispatch_.gave_up(Dispatch::Kind::kRead, now);
  } else if (const auto writing = writings_.find(id); writing != writings_.end()) {
    const bool gave_up = std::ranges::any_of(writing->second.ops, slow);
    end_writing(id, Outcome::kDeadline);
    if (gave_up) dispatch_.gave_up(Dispatch::Kind::kWrite, now);
  }
}

void Engine::end_overdue(Nanos now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) give_up(deadlines_.begin()->second, now);
}

void Engine::take(std::vector<Ended>& ended, Nanos now) {
  now_ = now;
  dispatch_.take(ended, now);
}

void Engine::on_time(Nanos now) {
  now_ = now;
  end_overdue(now);
  if (marks_ && marks_->due <= now && marks_->ops.empty()) look_for_marks();
  begin_due_scan(now);
  dispatch_.on_time(now);
  publish();
}

std::optional<Nanos> Engine::next_time() const {
  std::optional<Nanos> next = dispatch_.next_time();
  const auto at = [&](Nanos time) { next = std::min(next.value_or(time), time); };
  if (!deadlines_.empty()) at(deadlines_.begin()->first);
  if (marks_ && marks_->ops.empty()) at(marks_->due);
  if (scan_) return next;
  const MutexLock lock(mutex_);
  for (const auto& [name, space] : spaces_) at(space->scan_at);
  return next;
}

}  // namespace flexkv::remote
