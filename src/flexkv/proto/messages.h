// What engines, rank agents and the node say to each other: plain values, and their encoding.
//
// Every decode() checks every length and enumerator and returns an Error for anything malformed; nothing here trusts
// the sender. Thread-compatible values.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/device/device.h"
#include "flexkv/key/block_key.h"
#include "flexkv/plan/prefill_cost.h"
#include "flexkv/proto/changes.h"

namespace flexkv::proto {

using JobId = std::uint64_t;       // chosen by the client, unique within its engine
using SequenceId = std::uint64_t;  // chosen by the client, unique within its engine

// Who connects, in the Hello frame.
enum class Role : std::uint8_t { kAgent = 1, kClient = 2, kStatus = 3, kReset = 4, kScrub = 5 };

constexpr std::uint32_t kRanksMax = 1024;
constexpr std::uint32_t kBlocksPerMessageMax = 1U << 20;
constexpr std::uint32_t kSumsPerReportMax = device::CopyStream::kSumsMax;

struct AgentHello {
  std::string engine_id;
  std::uint32_t rank = 0;
  std::uint32_t rank_count = 1;  // 0: as many as the engine's scheduler says
  std::array<std::byte, 16> layout_id{};
  std::uint64_t shard_bytes = 0;  // host bytes of one block on this rank
  std::uint32_t block_count = 0;  // device blocks
  std::string device;
  // Which part of a block the rank holds, below rank_count: ranks of one engine that say the same number hold the same
  // bytes. Not set: that of its rank.
  std::optional<std::uint32_t> shard = std::nullopt;

  std::uint32_t shard_number() const { return shard.value_or(rank); }
};

struct ClientHello {
  std::string engine_id;
  std::uint32_t rank_count = 1;
  std::string model;                        // for people
  std::array<std::byte, 32> fingerprint{};  // of everything that KV bytes depend on, but for the tokens
  std::uint32_t block_tokens = 0;           // 0: not told
};

// An operator's; answered with the node's status.
struct ScrubRequest {
  std::uint64_t bytes_per_second = 0;  // 0: the scrub that runs is to stop
};

struct Welcome {
  std::uint64_t epoch = 0;  // differs between any two starts of a node
  std::uint64_t pool_bytes = 0;
  std::array<std::uint8_t, 32> key_secret{};  // clients only; zero for agents
};

enum class JobStatus : std::uint8_t { kDone = 0, kFailed = 1, kCanceled = 2 };

// `count` device blocks in a row, and as many extents of the pool, host_stride apart. Long prompts mostly lie in a few
// such runs on both sides, so what is said of a job does not grow with its blocks.
struct BlockRun {
  std::uint32_t device_block = 0;
  std::uint32_t count = 0;
  std::uint64_t host_offset = 0;  // of the first

  device::BlockCopy at(std::uint32_t i, std::uint64_t host_stride) const {
    return {device_block + i, host_offset + i * host_stride};
  }
};

// Blocks [first, first + count) of those that a job is about, in the order that its client gave.
struct BlockSpan {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
};

// node -> agent. A job comes in one piece, or in several as its host blocks become available. Of a save that other
// ranks can carry as well a rank may get a slice only, or nothing to copy; it reports all the same.
struct CopyCommand {
  JobId job = 0;
  device::Direction direction = device::Direction::kToHost;
  bool armed = false;             // may start at once; otherwise waits until the engine's worker arms it
  std::uint64_t host_stride = 0;  // bytes of a slot, all shards
  std::vector<BlockRun> runs;
  std::uint32_t piece = 0;  // 0, 1, ...
  bool last = true;         // no piece follows: the job is reported once this one is copied
  // Loads only: how many blocks the client asked for, and which of them the runs are, in their order. The node may
  // give up those from some block on, which are in no piece then.
  std::uint32_t job_blocks = 0;
  std::vector<BlockSpan> spans = {};

  std::size_t block_count() const;
  std::vector<device::BlockCopy> blocks() const;
};
struct CancelCommand {
  JobId job = 0;
};
using ToAgent = std::variant<CopyCommand, CancelCommand>;

// agent -> node: this rank will not touch the job's host blocks any more
struct JobReport {
  JobId job = 0;
  JobStatus status = JobStatus::kDone;
  std::uint32_t good_blocks = 0;  // of a load: leading ones that were copied whole, however it ended
  // Of a save that is done: the sums of its command's blocks as the device held them (base/block_sum.h), in their
  // order. kNoSum, or no entry: not known.
  std::vector<std::uint64_t> sums = {};
};

// Why a block was not served, or not kept. One closed list, counted per reason.
enum class Reason : std::uint8_t {
  kNone = 0,
  kNeverSeen,
  kEvicted,
  kReset,
  kInFlight,       // being saved right now
  kNotReady,       // the engine's ranks have not all registered yet
  kNoNode,         // no connection to the node
  kPoolFull,       // nothing could be evicted
  kParentMissing,  // the blocks before it are not kept
  kGone,           // evicted between lookup and load
  kQueueFull,
  kTooManySequences,
  kUnknownSequence,  // the node has forgotten the sequence: its keys must be sent again
  kRankFailed,
  kDeadline,
  kCanceled,
  kChecksum,         // what was kept was not the block
  kDiskFailed,       // the drive could not read or write it
  kDiskOff,          // the drive does not serve
  kDiskFull,         // no place on a drive, and nothing there could be evicted
  kRecovering,       // what the drives hold is still being read
  kNoRoomToLoad,     // host memory cannot hold so much of a prompt from a drive at once
  kNotWorthLoading,  // computing it is expected to be faster
  kUnlikely,         // not written to a drive: blocks like it are rarely used again
  kBudget,           // not written to a drive: its budget of bytes to be written is used up for now
  kBudgetLow,        // not written to a drive: not used often enough for a budget that runs low
  kDiskBusy,         // not written to a drive: loads kept it busy
  kPeerBusy,         // another node has it, and gives no more for now
  kPeerUnreachable,  // another node has it, and does not answer
  kDamaged,          // not written to a drive or a store: what is in host memory is not what the device held
  kStoreOff,         // the remote store is not asked for a while, because it failed or hung
  kStoreFailed,      // the remote store did not give or take it
};
constexpr std::size_t kReasonCount = 32;
const char* reason_name(Reason reason);

// client -> node
struct LookupRequest {
  std::uint64_t request = 0;
  SequenceId sequence = 0;
  std::uint32_t base = 0;  // keys the client has sent before
  std::vector<key::BlockKey> keys;
  std::uint32_t engine_blocks = 0;  // leading ones that the engine has itself, and will not load
  // The keys are blocks that need none of the others: the last one that can be loaded is looked for. See
  // Node::lookup_last.
  bool alone = false;
};
struct TransferRequest {
  bool save = false;
  bool armed = false;
  SequenceId sequence = 0;
  JobId job = 0;
  std::uint32_t base = 0;
  std::vector<key::BlockKey> keys;  // as in LookupRequest
  std::uint32_t first_block = 0;
  std::vector<std::uint32_t> device_blocks;
  // A save only: what its ranks have copied is kept once a CommitRequest says so, and not before (docs/decisions/0032).
  bool on_commit = false;
};
// Blocks that are only on drives are brought to host memory. No answer.
struct PrefetchRequest {
  SequenceId sequence = 0;
  std::uint32_t base = 0;
  std::vector<key::BlockKey> keys;  // as in LookupRequest
};
// How fast the engine computes prompts, when that has changed. No answer.
struct PrefillSpeed {
  plan::PrefillTime time;
};
struct CloseSequence {
  SequenceId sequence = 0;
};
struct CancelRequest {
  JobId job = 0;
};
// Of a save that said on_commit and was told to be done. No answer.
struct CommitRequest {
  JobId job = 0;
};
struct ResetRequest {};
using FromClient = std::variant<LookupRequest, TransferRequest, PrefetchRequest, PrefillSpeed, CloseSequence,
                                CancelRequest, ResetRequest, DescribeRequest, ChangesRequest, CommitRequest>;

// node -> client
struct LookupReply {
  std::uint64_t request = 0;
  std::uint32_t matched_blocks = 0;
  Reason reason = Reason::kNone;
  std::uint32_t disk_blocks = 0;       // of the matched ones, to be read from drives
  std::uint32_t host_blocks = 0;       // leading ones of the matched for which no drive is needed
  std::uint32_t described_blocks = 0;  // leading ones that need no DescribeRequest
};
struct JobResult {
  JobId job = 0;
  JobStatus status = JobStatus::kDone;
  Reason reason = Reason::kNone;
  std::uint32_t good_blocks = 0;  // of a load: leading ones that every rank has, also when it has failed
};
using ToClient = std::variant<LookupReply, JobResult, ChangesReply>;

std::vector<std::byte> encode(const AgentHello& value);
std::vector<std::byte> encode(const ClientHello& value);
std::vector<std::byte> encode(const ScrubRequest& value);
std::vector<std::byte> encode(const Welcome& value);
std::vector<std::byte> encode(const ToAgent& value);
std::vector<std::byte> encode(const JobReport& value);
std::vector<std::byte> encode(const FromClient& value);
std::vector<std::byte> encode(const ToClient& value);

Result<AgentHello> decode_agent_hello(std::span<const std::byte> bytes);
Result<ClientHello> decode_client_hello(std::span<const std::byte> bytes);
Result<ScrubRequest> decode_scrub_request(std::span<const std::byte> bytes);
Result<Welcome> decode_welcome(std::span<const std::byte> bytes);
Result<ToAgent> decode_to_agent(std::span<const std::byte> bytes);
Result<JobReport> decode_job_report(std::span<const std::byte> bytes);
Result<FromClient> decode_from_client(std::span<const std::byte> bytes);
Result<ToClient> decode_to_client(std::span<const std::byte> bytes);

}  // namespace flexkv::proto
