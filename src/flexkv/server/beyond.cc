#include "flexkv/server/beyond.h"

#include <algorithm>

#include "flexkv/base/assert.h"

namespace flexkv::server {
namespace {

// The speed of blocks of which `a` come at one rate and `b` at another; a rate that is not known is taken to be the
// other one.
double together(std::uint32_t a, double rate_a, std::uint32_t b, double rate_b) {
  if (rate_a <= 0 || rate_b <= 0) return std::max(rate_a, rate_b);
  return (a + b) / (a / rate_a + b / rate_b);
}

}  // namespace

void Beyond::open_space(node::SpaceNumber space, const node::SpaceName& name, std::uint64_t slot_bytes) {
  for (node::RemotePort* const source : sources_) source->open_space(space, name, slot_bytes);
}

void Beyond::close_space(node::SpaceNumber space) {
  for (node::RemotePort* const source : sources_) source->close_space(space);
}

// Who has most of it.
Beyond::Best Beyond::best(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                          const std::vector<bool>& without, Nanos now) {
  Best best;
  for (std::size_t i = 0; i < sources_.size(); ++i) {
    if (!without.empty() && without[i]) continue;
    const node::RemoteFound found = sources_[i]->find(space, keys, first, now);
    if (found.blocks > best.found.blocks) best = {i, found};
  }
  return best;
}

node::RemoteFound Beyond::find(node::SpaceNumber space, std::span<const key::BlockKey> keys, std::uint32_t first,
                               Nanos now) {
  const Best head = best(space, keys, first, {}, now);
  node::RemoteFound found = head.found;
  const std::uint32_t next = first + found.blocks;
  if (found.blocks == 0 || next >= keys.size() || sources_.size() < 2) return found;
  std::vector<bool> asked(sources_.size());
  asked[head.source] = true;
  const node::RemoteFound tail = best(space, keys, next, asked, now).found;
  if (tail.blocks == 0) return found;
  found.bytes_per_second = together(found.blocks, found.bytes_per_second, tail.blocks, tail.bytes_per_second);
  found.wait = std::max(found.wait, tail.wait);
  found.blocks += tail.blocks;
  return found;
}

void Beyond::read(node::RemoteRead asked) {
  Read& read = reads_[asked.op];
  read.asked = std::move(asked);
  read.failed.resize(sources_.size());
  const Best found = best(read.asked.space, read.asked.keys, read.asked.first, read.failed, monotonic_now());
  // Who has nothing any more says so, which may not be said from here.
  ask(read, found.source, found.found.blocks > 0 ? found.found.blocks : read.wanted());
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
    const Best next = best(read.asked.space, read.asked.keys, read.asked.first + read.done, read.failed, now);
    if (next.found.blocks > 0) return ask(read, next.source, next.found.blocks);
  }
  const node::RemoteOp op = read.asked.op;
  reads_.erase(at);
  if (all) outcome = node::RemoteOutcome::kDone;
  if (!all && outcome == node::RemoteOutcome::kDone) outcome = node::RemoteOutcome::kMissing;
  node.on_remote_end(op, outcome, now);
}

}  // namespace flexkv::server
