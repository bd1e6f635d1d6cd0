#include "flexkv/server/beyond.h"

#include <algorithm>

#include "flexkv/base/assert.h"
#include "flexkv/server/read_choice.h"

namespace flexkv::server {
namespace {

// Of what comes at one speed and what comes at another, one after the other. A speed that is not known is taken to be
// the other one.
node::RemoteFound together(const node::RemoteFound& a, const node::RemoteFound& b) {
  node::RemoteFound both{a.blocks + b.blocks, std::max(a.bytes_per_second, b.bytes_per_second), a.wait + b.wait};
  if (a.bytes_per_second > 0 && b.bytes_per_second > 0) {
    both.bytes_per_second = both.blocks / (a.blocks / a.bytes_per_second + b.blocks / b.bytes_per_second);
  }
  return both;
}

}  // namespace

void Beyond::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  slot_bytes_[space] = slot_bytes;
  for (node::RemotePort* const source : sources_) source->open_space(space, name, slot_bytes);
}

void Beyond::close_space(node::SpaceNumber space) {
  slot_bytes_.erase(space);
  for (node::RemotePort* const source : sources_) source->close_space(space);
}

// Who to read it from; see choose_read().
std::optional<Beyond::Best> Beyond::best(node::SpaceNumber space, std::span<const key::BlockKey> keys,
                                         std::uint32_t first, const std::vector<bool>& without, double block_nanos,
                                         Nanos now) {
  std::vector<node::RemoteFound> found(sources_.size());
  double known = 0;  // speed of one of them
  bool all_known = true;
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    if (!without.empty() && without[i]) continue;
    found[i] = sources_[i]->find(space, keys, first, block_nanos, now);
    if (found[i].blocks == 0) continue;
    known = std::max(known, found[i].bytes_per_second);
    all_known &= found[i].bytes_per_second > 0;
  }
  const auto slot_bytes = static_cast<double>(slot_bytes_.at(space));
  std::vector<ReadPlace> places;
  std::vector<std::size_t> sources;
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    if (found[i].blocks == 0) continue;
    const double speed = found[i].bytes_per_second > 0 ? found[i].bytes_per_second : std::max(known, 1.0);
    places.push_back({found[i].blocks, static_cast<double>(found[i].wait), slot_bytes / speed * kSecond, i});
    sources.push_back(i);
  }
  if (places.empty()) return std::nullopt;
  const ReadChoice choice = choose_read(places, all_known ? block_nanos : 0);
  Best best{sources[choice.first], places[choice.first].blocks, sources[choice.first], found[sources[choice.first]]};
  if (choice.then) {
    best.last = sources[*choice.then];
    node::RemoteFound rest = found[best.last];
    rest.blocks -= best.blocks;
    best.found = together(best.found, rest);
  }
  return best;
}

node::RemoteFound Beyond::find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                               double block_nanos, Nanos now) {
  const auto head = best(space, keys, first, {}, block_nanos, now);
  if (!head) return {};
  const std::uint32_t next = first + head->found.blocks;
  if (next >= keys.size() || sources_.size() < 2) return head->found;
  // Also what begins in the middle.
  std::vector<bool> asked(sources_.size());
  asked[head->last] = true;
  const auto tail = best(space, keys, next, asked, block_nanos, now);
  if (!tail) return head->found;
  const double reading = tail->found.blocks * static_cast<double>(slot_bytes_.at(space)) /
                         std::max(tail->found.bytes_per_second, 1.0) * kSecond;
  const bool told = block_nanos > 0 && tail->found.bytes_per_second > 0;
  const bool worth = !told || static_cast<double>(tail->found.wait) + reading < tail->found.blocks * block_nanos;
  return worth ? together(head->found, tail->found) : head->found;
}

void Beyond::read(node::RemoteRead asked) {
  Read& read = reads_[asked.op];
  read.asked = std::move(asked);
  read.failed.resize(sources_.size());
  const auto found = best(read.asked.space, read.asked.keys, read.asked.first, read.failed, 0, monotonic_now());
  // Who has nothing any more says so, which may not be said from here.
  ask(read, found ? found->source : 0, found ? found->blocks : read.wanted());
}

// For the next ones of its blocks.
void Beyond::ask(Read& read, std::size_t source, std::uint32_t blocks) {
  read.source = source;
  read.begun = read.done;
  read.ordered = std::min(blocks, read.wanted() - read.done);
  read.part = next_part_++;
  parts_[read.part] = read.asked.op;
  node::RemoteRead part;
  part.op = read.part;
  part.space = read.asked.space;
  part.first = read.asked.first + read.done;
  part.keys.assign(read.asked.keys.begin(), read.asked.keys.begin() + part.first + read.ordered);
  const auto offsets = std::span(read.asked.host_offsets).subspan(read.done, read.ordered);
  part.host_offsets.assign(offsets.begin(), offsets.end());
  part.deadline = read.asked.deadline;
  sources_[source]->read(std::move(part));
}

void Beyond::reset(node::ResetId reset) {
  for (node::RemotePort* const source : sources_) source->reset(reset);
}

void Beyond::cancel(node::RemoteOp op) {
  const auto found = reads_.find(op);
  if (found == reads_.end()) return;
  found->second.canceled = true;
  sources_[found->second.source]->cancel(found->second.part);
}

std::optional<Nanos> Beyond::next_time() const {
  std::optional<Nanos> next;
  for (const node::RemotePort* const source : sources_) {
    if (const auto one = source->next_time()) next = std::min(next.value_or(*one), *one);
  }
  return next;
}

void Beyond::on_time(Nanos now) {
  for (node::RemotePort* const source : sources_) source->on_time(now);
}

void Beyond::on_block(node::Node& node, node::RemoteOp part, std::uint32_t index, Nanos now) {
  Read& read = reads_.at(parts_.at(part));
  FLEXKV_ASSERT(read.part == part && read.begun + index == read.done && index < read.ordered);
  node.on_remote_block(read.asked.op, read.done++, now);
}

void Beyond::on_end(node::Node& node, node::RemoteOp part, node::RemoteOutcome outcome, Nanos now) {
  const auto at = reads_.find(parts_.extract(part).mapped());
  Read& read = at->second;
  FLEXKV_ASSERT(read.part == part);
  const bool all = read.done == read.wanted();
  // Who did not bring what it was asked for is not asked again.
  if (read.done - read.begun < read.ordered) read.failed[read.source] = true;
  if (!all && !read.canceled && now < read.asked.deadline) {
    const auto next = best(read.asked.space, read.asked.keys, read.asked.first + read.done, read.failed, 0, now);
    if (next) return ask(read, next->source, next->blocks);
  }
  const node::RemoteOp op = read.asked.op;
  reads_.erase(at);
  if (all) outcome = node::RemoteOutcome::kDone;
  if (!all && outcome == node::RemoteOutcome::kDone) outcome = node::RemoteOutcome::kMissing;
  node.on_remote_end(op, outcome, now);
}

}  // namespace flexkv::server
