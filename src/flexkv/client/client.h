// The scheduler's side of an engine: which blocks of a prompt are kept, and orders to load or save them.
//
// Thread-compatible: one thread (the engine's scheduler) calls it. Nothing here waits for a transfer. With an embedded
// node every call is a function call; with a daemon only lookup() of something new waits for an answer, at most
// kLookupPatience, and everything else is posted. Without a node (not started, killed) lookups find nothing; the client
// reattaches when it comes back.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "flexkv/client/node_port.h"
#include "flexkv/events/follower.h"
#include "flexkv/key/block_key.h"
#include "flexkv/key/namespace.h"
#include "flexkv/proto/messages.h"

namespace flexkv::client {

using proto::JobId;
using proto::Reason;
using proto::SequenceId;

class Client {
 public:
  // `first_job`: the jobs of this client are numbered from here. Ranks may outlive a client and remember jobs of the
  // one before it under the same engine id, so two clients of one engine must not share numbers: see
  // random_first_job(). Also tells its weight epochs from those of any other client.
  Client(std::unique_ptr<NodePort> port, const proto::ClientHello& hello, JobId first_job = 1);

  // A request's chain of blocks. `hashes` is always the whole chain so far, as the engine's own chained block hashes;
  // only those not seen before are read.
  using Hashes = std::span<const std::span<const std::byte>>;

  SequenceId open_sequence();
  void close_sequence(SequenceId sequence);
  // How many leading blocks are kept. Repeated calls are cheap; what was found is protected from eviction for a while.
  std::uint32_t known_hashes(SequenceId sequence);
  // `engine_blocks`: so many of them the engine has itself, and will not load.
  proto::LookupReply lookup(SequenceId sequence, std::uint32_t first_hash, Hashes hashes,
                            std::uint32_t engine_blocks = 0);
  // Of blocks that need none of the others: the number, from 1, of the last one that can be loaded, in matched_blocks.
  // The sequence, which is for such questions only, is then a chain of that block alone: its block 0.
  proto::LookupReply lookup_last(SequenceId sequence, Hashes hashes);
  // Asks for the blocks that are kept on drives only to be brought to host memory. Waits for nothing.
  void prefetch(SequenceId sequence, std::uint32_t first_hash, Hashes hashes);
  // When a transfer may begin. Engines whose workers hear nothing from their scheduler order it at a time when the
  // device blocks may be touched, and nobody arms it.
  enum class Start : std::uint8_t { kWhenArmed, kAtOnce };
  // The id to arm on every rank; the ranks report how it ended. 0, and only if it starts at once: there is no node.
  JobId load(SequenceId sequence, std::uint32_t first_block, std::span<const std::uint32_t> device_blocks,
             Start start = Start::kWhenArmed);
  // 0: there is no node to save to. Blocks that are kept already cost nothing.
  JobId save(SequenceId sequence, std::uint32_t first_hash, Hashes hashes, std::uint32_t first_block,
             std::span<const std::uint32_t> device_blocks, Start start = Start::kWhenArmed);
  // A step of the engine computed so many tokens of prompts, `pairs` of a token and one that it attends to, in that
  // time: by that the node judges what is worth loading.
  void observe_step(std::uint32_t tokens, double pairs, Nanos duration);
  // What a save has not kept by now, it will not keep: its device blocks may be overwritten at once. Never fails: where
  // the node cannot be told, the connection ends, and with it all jobs.
  void cancel(JobId job);
  // Jobs that have ended, well or not, since the last call: their device blocks are no longer in use. A save that kept
  // all its blocks has no reason; one that kept some is kDone with a reason. Best effort: a node that went away does
  // not say it, see generation(); of jobs that started at once it is said a second later, when the ranks are quiet.
  std::vector<proto::JobResult> take_ended_jobs();
  // Waits until take_ended_jobs() has something to say; false: it had not in time, or the node is gone.
  bool wait_ended_jobs(Nanos timeout) { return port_->wait_ended_jobs(timeout); }
  // What the engine calls blocks of a sequence, for those who follow what is kept: before they are saved, and of what a
  // lookup found from first_undescribed() on. `request.sequence` is set here. REQUIRES: proto::valid(request)
  void describe(SequenceId sequence, proto::DescribeRequest request);
  std::uint32_t first_undescribed(SequenceId sequence) const;
  // Which of this model's blocks, of those described, the node has come to keep or lost since the last call, each block
  // and tier once: kAdded and kRemoved only. Waits for nothing; without a node all are lost. The first call begins it.
  std::vector<events::Change> take_changes();
  // All of them that were added and not removed, parents first: for who has forgotten.
  std::vector<events::Change> told() const { return follower_.told(); }
  // The weights may be others from now on: a new weight epoch, part of every key, begins. Nothing that this client or
  // any other saved before is found by it again, and nothing that it saves from now on by any other client, whose
  // weights may not have changed. The node is told to forget what it has of the model as well.
  void reset();

  bool ready();
  // Whether all ranks are there, so that blocks can be kept. Waits for them where their coming is told (embedded).
  bool served(Nanos timeout);
  // Changes whenever what was ordered before may never be reported, and what was kept may be gone: another connection,
  // or a rank that went away. 0: no node now.
  std::uint64_t generation() { return port_->generation(); }

 private:
  struct Sequence {
    SequenceId at_node = 0;        // another one after a reset: the node knows it by keys of before
    std::uint64_t generation = 0;  // of the connection that its keys were sent over
    std::uint32_t known = 0;       // hashes folded and sent
    proto::LookupReply last{};
    std::uint32_t last_engine_blocks = 0;  // that it was asked with
    Nanos looked_up_at = 0;
    std::vector<key::BlockKey> alone{};  // that lookup_last() got `last` for
  };

  bool settle(std::uint64_t generation);
  key::Root root() const;
  void leave_to_close(SequenceId at_node);
  Sequence* current(SequenceId id);
  std::vector<key::BlockKey> fold(Sequence& sequence, std::uint32_t first_hash, Hashes hashes) const;

  std::unique_ptr<NodePort> port_;
  const proto::ClientHello hello_;
  const JobId first_job_;
  std::uint64_t epoch_ = 0;       // resets so far
  std::uint64_t generation_ = 0;  // that root_ is of
  key::Root root_{};
  std::unordered_map<SequenceId, Sequence> sequences_;
  // What the node must not miss is posted again until it is sure to have arrived.
  static constexpr std::size_t kUnclosedMax = 65536;  // beyond that, the node forgets them with the connection
  std::vector<SequenceId> unclosed_;
  plan::PrefillCost prefill_;
  plan::PrefillTime told_prefill_;  // to the node of this generation
  bool reset_owed_ = false;         // no answer of the node has come since
  std::uint64_t reset_posted_ = 0;  // over the connection of this generation
  events::Follower follower_{false};
  SequenceId next_sequence_ = 1;
  JobId next_job_;
};

// Never 0, and far from where any other client begins.
JobId random_first_job();

}  // namespace flexkv::client
