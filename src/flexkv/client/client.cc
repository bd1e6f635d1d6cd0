#include "flexkv/client/client.h"

#include <sys/random.h>

#include <algorithm>
#include <cmath>

#include "flexkv/base/assert.h"
#include "flexkv/key/namespace.h"

namespace flexkv::client {

namespace {

// The node is told of another prefill speed when that changes what it expects of such a prompt by more than this.
constexpr double kPrefillChange = 0.02;
constexpr double kTypicalTokens = 4096;

// Whether the node has taken the keys that it was asked for.
bool taken(const proto::LookupReply& reply) {
  switch (reply.reason) {
    case Reason::kNoNode:
    case Reason::kNotReady:
    case Reason::kTooManySequences:
    case Reason::kUnknownSequence:
      return false;
    default:
      return true;
  }
}

}  // namespace

JobId random_first_job() {
  JobId random = 0;
  FLEXKV_ASSERT(::getrandom(&random, sizeof random, 0) == sizeof random);
  return (random >> 2) + 1;  // room to count on
}

Client::Client(std::unique_ptr<NodePort> port, const proto::ClientHello& hello, JobId first_job)
    : port_(std::move(port)), hello_(hello), first_job_(first_job), next_job_(first_job) {}

key::Root Client::root() const {
  key::NamespaceBuilder fields(port_->key_secret());
  fields.add(key::Field::kModel, hello_.fingerprint);
  if (epoch_ > 0) {
    const std::uint64_t epoch[] = {first_job_, epoch_};
    fields.add(key::Field::kWeightEpoch, std::as_bytes(std::span(epoch)));
  }
  return fields.finish();
}

// Posts what is owed to the node. False: it may not be asked for blocks yet, it would serve some from before a reset.
bool Client::settle(std::uint64_t generation) {
  if (generation == 0) {
    unclosed_.clear();  // forgotten together with the connection
    return false;
  }
  if (reset_owed_ && reset_posted_ != generation) {
    if (!port_->post(proto::ResetRequest{})) return false;
    reset_posted_ = generation;
  }
  while (!unclosed_.empty() && port_->post(proto::CloseSequence{unclosed_.back()})) unclosed_.pop_back();
  return true;
}

// The sequence, on the connection of now: what another node was told does not count. Null without a node.
Client::Sequence* Client::current(SequenceId id) {
  const std::uint64_t generation = port_->generation();
  if (!settle(generation)) return nullptr;
  if (generation != generation_) {
    generation_ = generation;
    told_prefill_ = {};
    root_ = root();
  }
  Sequence& sequence = sequences_.try_emplace(id, Sequence{.at_node = id}).first->second;
  if (sequence.generation != generation) sequence = Sequence{.at_node = sequence.at_node, .generation = generation};
  return &sequence;
}

SequenceId Client::open_sequence() { return next_sequence_++; }

void Client::close_sequence(SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) return;
  leave_to_close(found->second.at_node);
  sequences_.erase(found);
  (void)settle(port_->generation());
}

// Whatever this side knows of it: an answer that came too late may have left it open.
void Client::leave_to_close(SequenceId at_node) {
  if (unclosed_.size() < kUnclosedMax) unclosed_.push_back(at_node);
}

std::uint32_t Client::known_hashes(SequenceId id) {
  const Sequence* sequence = current(id);
  return sequence == nullptr ? 0 : sequence->known;
}

std::vector<key::BlockKey> Client::fold(Sequence& sequence, std::uint32_t first_hash, Hashes hashes) const {
  std::vector<key::BlockKey> keys;
  const std::size_t repeated = sequence.known - first_hash;
  if (repeated < hashes.size()) keys.reserve(hashes.size() - repeated);
  for (std::size_t i = repeated; i < hashes.size(); ++i) {
    keys.push_back(key::fold_engine_hash(root_, hashes[i]));
  }
  return keys;
}

proto::LookupReply Client::lookup(SequenceId id, std::uint32_t first_hash, Hashes hashes, std::uint32_t engine_blocks) {
  Sequence* sequence = current(id);
  // A node that came back in this very moment knows none of the hashes that the caller left out: next time.
  if (sequence == nullptr || first_hash > sequence->known) return {0, 0, Reason::kNoNode, 0, 0};
  auto keys = fold(*sequence, first_hash, hashes);
  const auto added = static_cast<std::uint32_t>(keys.size());
  const Nanos now = monotonic_now();
  const bool asked = sequence->looked_up_at != 0 && keys.empty() && engine_blocks == sequence->last_engine_blocks;
  if (asked && now - sequence->looked_up_at < port_->reuse_time()) return sequence->last;
  const auto reply = port_->lookup({0, sequence->at_node, sequence->known, std::move(keys), engine_blocks});
  if (reply.reason != Reason::kNoNode) reset_owed_ = false;  // what was posted before has been read before
  if (!taken(reply)) return reply;                           // they are sent again
  sequence->known += added;
  sequence->last = reply;
  sequence->last_engine_blocks = engine_blocks;
  sequence->looked_up_at = now;
  return reply;
}

proto::LookupReply Client::lookup_last(SequenceId id, Hashes hashes) {
  Sequence* sequence = current(id);
  if (sequence == nullptr) return {0, 0, Reason::kNoNode, 0, 0};
  std::vector<key::BlockKey> keys;
  keys.reserve(hashes.size());
  for (const auto hash : hashes) keys.push_back(key::fold_engine_hash(root_, hash));
  const Nanos now = monotonic_now();
  const bool asked = !keys.empty() && keys == sequence->alone;
  if (asked && now - sequence->looked_up_at < port_->reuse_time()) return sequence->last;
  // An answer that does not come in time may change all the same which block the sequence is.
  sequence->alone.clear();
  sequence->known = 0;
  const auto reply = port_->lookup({0, sequence->at_node, 0, keys, 0, true});
  if (reply.reason != Reason::kNoNode) reset_owed_ = false;
  if (keys.empty() || !taken(reply)) return reply;
  sequence->known = 1;
  sequence->last = reply;
  sequence->alone = std::move(keys);
  sequence->looked_up_at = now;
  return reply;
}

void Client::prefetch(SequenceId id, std::uint32_t first_hash, Hashes hashes) {
  Sequence* sequence = current(id);
  if (sequence == nullptr || first_hash > sequence->known) return;
  proto::PrefetchRequest request{sequence->at_node, sequence->known, fold(*sequence, first_hash, hashes)};
  const auto added = static_cast<std::uint32_t>(request.keys.size());
  if (port_->post(std::move(request))) sequence->known += added;
}

JobId Client::load(SequenceId id, std::uint32_t first_block, std::span<const std::uint32_t> device_blocks,
                   Start start) {
  const JobId job = next_job_++;
  const bool armed = start == Start::kAtOnce;
  const JobId lost = armed ? 0 : job;  // who arms a job that no rank hears of is told by each of them that it failed
  Sequence* sequence = current(id);
  if (sequence == nullptr) return lost;
  proto::TransferRequest request{false, armed, sequence->at_node, job, sequence->known, {}, first_block, {}};
  request.device_blocks.assign(device_blocks.begin(), device_blocks.end());
  return port_->post(std::move(request)) ? job : lost;
}

JobId Client::save(SequenceId id, std::uint32_t first_hash, Hashes hashes, std::uint32_t first_block,
                   std::span<const std::uint32_t> device_blocks, Start start) {
  Sequence* sequence = current(id);
  if (sequence == nullptr || first_hash > sequence->known) return 0;
  const JobId job = next_job_++;
  proto::TransferRequest request{true,
                                 start == Start::kAtOnce,
                                 sequence->at_node,
                                 job,
                                 sequence->known,
                                 fold(*sequence, first_hash, hashes),
                                 first_block,
                                 {}};
  request.device_blocks.assign(device_blocks.begin(), device_blocks.end());
  const auto added = static_cast<std::uint32_t>(request.keys.size());
  if (!port_->post(std::move(request))) return 0;
  sequence->known += added;
  return job;
}

void Client::observe_step(std::uint32_t tokens, double pairs, Nanos duration) {
  prefill_.observe(tokens, pairs, duration);
  const plan::PrefillTime time = prefill_.time();
  if (!time.known() || port_->generation() == 0) return;
  const double now = time.estimate(kTypicalTokens, kTypicalTokens);
  const double told = told_prefill_.estimate(kTypicalTokens, kTypicalTokens);
  if (std::abs(now - told) <= kPrefillChange * told) return;
  if (port_->post(proto::PrefillSpeed{time})) told_prefill_ = time;
}

void Client::cancel(JobId job) {
  if (!port_->post(proto::CancelRequest{job})) port_->hang_up();
}

std::vector<proto::JobResult> Client::take_ended_jobs() {
  (void)settle(port_->generation());
  return port_->take_ended_jobs();
}

void Client::describe(SequenceId id, proto::DescribeRequest request) {
  Sequence* sequence = current(id);
  if (sequence == nullptr) return;
  const auto end = request.first_block + static_cast<std::uint32_t>(request.hashes.size());
  request.sequence = sequence->at_node;
  if (port_->post(std::move(request))) sequence->last.described_blocks = std::max(sequence->last.described_blocks, end);
}

std::uint32_t Client::first_undescribed(SequenceId id) const {
  const auto found = sequences_.find(id);
  return found == sequences_.end() ? 0 : found->second.last.described_blocks;
}

std::vector<events::Change> Client::take_changes() {
  std::vector<events::Change> news;
  if (port_->generation() == 0) {
    follower_.lose(news);
    return news;
  }
  for (const events::Change& change : port_->take_changes()) follower_.apply(change, news);
  return news;
}

void Client::reset() {
  ++epoch_;
  generation_ = 0;
  for (auto& [id, sequence] : sequences_) {
    leave_to_close(sequence.at_node);
    sequence = Sequence{.at_node = next_sequence_++};
  }
  reset_owed_ = true;
  reset_posted_ = 0;
  (void)settle(port_->generation());
}

bool Client::ready() { return port_->generation() != 0; }

bool Client::served(Nanos timeout) { return settle(port_->generation()) && port_->served(timeout); }

}  // namespace flexkv::client
