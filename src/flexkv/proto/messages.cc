#include "flexkv/proto/messages.h"

#include <limits>

#include "flexkv/ipc/wire.h"

namespace flexkv::proto {
namespace {

using ipc::Reader;
using ipc::Writer;

constexpr std::size_t kNameBytesMax = 4096;
constexpr double kPrefillNanosMax = 1e15;

// First byte of every message on a ring.
enum class Tag : std::uint8_t {
  kCopy = 1,
  kCancelCopy = 2,
  kJobReport = 3,
  kLookup = 4,
  kTransfer = 5,
  kCloseSequence = 6,
  kCancel = 7,
  kReset = 8,
  kLookupReply = 9,
  kJobResult = 10,
  kPrefetch = 11,
  kPrefillSpeed = 12,
  kDescribe = 13,
  kChangesRequest = 14,
  kChangesReply = 15,
  kCommit = 16,
};

Error malformed(const char* what) {
  return {ErrorCode::kPeer, std::string("malformed ") + what + ": wrong length, count or enumerator"};
}

template <typename T>
Result<T> finish(const Reader& reader, T value, const char* what) {
  if (!reader.done()) return malformed(what);
  return value;
}

template <typename Enum>
bool read_enum(Reader& reader, Enum last, Enum& out) {
  const auto raw = reader.pod<std::uint8_t>();
  if (!reader.ok() || raw > static_cast<std::uint8_t>(last)) return false;
  out = static_cast<Enum>(raw);
  return true;
}

template <typename T>
std::vector<T> read_blocks(Reader& reader) {
  return reader.array<T>(kBlocksPerMessageMax);
}

// Neither the numbers of a run's blocks nor its offsets may go round, nor may there be more than a message may name.
bool valid_runs(const CopyCommand& command) {
  std::uint64_t blocks = 0;
  for (const BlockRun& run : command.runs) {
    if (run.count == 0 || run.count > kBlocksPerMessageMax) return false;
    blocks += run.count;
    const std::uint64_t rest = run.count - 1;
    if (rest > std::numeric_limits<std::uint32_t>::max() - run.device_block) return false;
    if (rest > 0 && command.host_stride > (std::numeric_limits<std::uint64_t>::max() - run.host_offset) / rest) {
      return false;
    }
  }
  return blocks <= kBlocksPerMessageMax;
}

// Of a load, each block of the runs is one of the job's; of a save nothing is said.
bool valid_spans(const CopyCommand& command) {
  std::uint64_t blocks = 0;
  for (const BlockSpan& span : command.spans) {
    if (span.count == 0 || std::uint64_t{span.first} + span.count > command.job_blocks) return false;
    blocks += span.count;
  }
  return blocks == (command.direction == device::Direction::kToDevice ? command.block_count() : 0);
}

bool read_flag(Reader& reader, bool& out) {
  const auto raw = reader.pod<std::uint8_t>();
  out = raw == 1;
  return raw <= 1;
}

constexpr auto kLastReason = static_cast<Reason>(kReasonCount - 1);
static_assert(kLastReason == Reason::kStoreFailed, "kReasonCount follows the list");

}  // namespace

const char* reason_name(Reason reason) {
  static constexpr std::array<const char*, kReasonCount> kNames = {"none",
                                                                   "never_seen",
                                                                   "evicted",
                                                                   "reset",
                                                                   "in_flight",
                                                                   "not_ready",
                                                                   "no_node",
                                                                   "pool_full",
                                                                   "parent_missing",
                                                                   "gone",
                                                                   "queue_full",
                                                                   "too_many_sequences",
                                                                   "unknown_sequence",
                                                                   "rank_failed",
                                                                   "deadline",
                                                                   "canceled",
                                                                   "checksum",
                                                                   "disk_failed",
                                                                   "disk_off",
                                                                   "disk_full",
                                                                   "recovering",
                                                                   "no_room_to_load",
                                                                   "not_worth_loading",
                                                                   "unlikely",
                                                                   "budget",
                                                                   "budget_low",
                                                                   "disk_busy",
                                                                   "peer_busy",
                                                                   "peer_unreachable",
                                                                   "damaged",

                                                                   "store_off",
                                                                   "store_failed"};
  return kNames[static_cast<std::size_t>(reason)];
}

std::size_t CopyCommand::block_count() const {
  std::size_t count = 0;
  for (const BlockRun& run : runs) count += run.count;
  return count;
}

std::vector<device::BlockCopy> CopyCommand::blocks() const {
  std::vector<device::BlockCopy> copies;
  copies.reserve(block_count());
  for (const BlockRun& run : runs) {
    for (std::uint32_t i = 0; i < run.count; ++i) copies.push_back(run.at(i, host_stride));
  }
  return copies;
}

std::vector<std::byte> encode(const AgentHello& value) {
  Writer writer;
  writer.string(value.engine_id);
  writer.pod(value.rank);
  writer.pod(value.rank_count);
  writer.pod(value.layout_id);
  writer.pod(value.shard_bytes);
  writer.pod(value.block_count);
  writer.string(value.device);
  writer.pod(value.shard_number());
  return writer.take();
}

Result<AgentHello> decode_agent_hello(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  AgentHello value;
  value.engine_id = reader.string(kNameBytesMax);
  value.rank = reader.pod<std::uint32_t>();
  value.rank_count = reader.pod<std::uint32_t>();
  value.layout_id = reader.pod<std::array<std::byte, 16>>();
  value.shard_bytes = reader.pod<std::uint64_t>();
  value.block_count = reader.pod<std::uint32_t>();
  value.device = reader.string(kNameBytesMax);
  value.shard = reader.pod<std::uint32_t>();
  return finish(reader, std::move(value), "agent hello");
}

std::vector<std::byte> encode(const ClientHello& value) {
  Writer writer;
  writer.string(value.engine_id);
  writer.pod(value.rank_count);
  writer.string(value.model);
  writer.pod(value.fingerprint);
  writer.pod(value.block_tokens);
  return writer.take();
}

Result<ClientHello> decode_client_hello(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  ClientHello value;
  value.engine_id = reader.string(kNameBytesMax);
  value.rank_count = reader.pod<std::uint32_t>();
  value.model = reader.string(kNameBytesMax);
  value.fingerprint = reader.pod<std::array<std::byte, 32>>();
  value.block_tokens = reader.pod<std::uint32_t>();
  return finish(reader, std::move(value), "client hello");
}

std::vector<std::byte> encode(const ScrubRequest& value) {
  Writer writer;
  writer.pod(value.bytes_per_second);
  return writer.take();
}

Result<ScrubRequest> decode_scrub_request(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  return finish(reader, ScrubRequest{reader.pod<std::uint64_t>()}, "scrub request");
}

std::vector<std::byte> encode(const Welcome& value) {
  Writer writer;
  writer.pod(value.epoch);
  writer.pod(value.pool_bytes);
  writer.pod(value.key_secret);
  return writer.take();
}

Result<Welcome> decode_welcome(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  Welcome value;
  value.epoch = reader.pod<std::uint64_t>();
  value.pool_bytes = reader.pod<std::uint64_t>();
  value.key_secret = reader.pod<std::array<std::uint8_t, 32>>();
  return finish(reader, value, "welcome");
}

std::vector<std::byte> encode(const ToAgent& value) {
  Writer writer;
  if (const auto* copy = std::get_if<CopyCommand>(&value)) {
    writer.pod(Tag::kCopy);
    writer.pod(copy->job);
    writer.pod(copy->direction);
    writer.pod(static_cast<std::uint8_t>(copy->armed));
    writer.pod(copy->host_stride);
    writer.array(std::span<const BlockRun>(copy->runs));
    writer.pod(copy->piece);
    writer.pod(static_cast<std::uint8_t>(copy->last));
    writer.pod(copy->job_blocks);
    writer.array(std::span<const BlockSpan>(copy->spans));
  } else {
    writer.pod(Tag::kCancelCopy);
    writer.pod(std::get<CancelCommand>(value).job);
  }
  return writer.take();
}

Result<ToAgent> decode_to_agent(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  switch (reader.pod<Tag>()) {
    case Tag::kCopy: {
      CopyCommand copy;
      copy.job = reader.pod<JobId>();
      if (!read_enum(reader, device::Direction::kToDevice, copy.direction) || !read_flag(reader, copy.armed)) break;
      copy.host_stride = reader.pod<std::uint64_t>();
      copy.runs = read_blocks<BlockRun>(reader);
      copy.piece = reader.pod<std::uint32_t>();
      if (!read_flag(reader, copy.last)) break;
      copy.job_blocks = reader.pod<std::uint32_t>();
      copy.spans = read_blocks<BlockSpan>(reader);
      if (!valid_runs(copy) || !valid_spans(copy)) break;
      return finish<ToAgent>(reader, std::move(copy), "copy command");
    }
    case Tag::kCancelCopy:
      return finish<ToAgent>(reader, CancelCommand{reader.pod<JobId>()}, "cancel command");
    default:
      break;
  }
  return malformed("message to an agent");
}

std::vector<std::byte> encode(const JobReport& value) {
  Writer writer;
  writer.pod(Tag::kJobReport);
  writer.pod(value.job);
  writer.pod(value.status);
  writer.pod(value.good_blocks);
  writer.array(std::span<const std::uint64_t>(value.sums));
  return writer.take();
}

Result<JobReport> decode_job_report(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  JobReport value;
  if (reader.pod<Tag>() != Tag::kJobReport) return malformed("message from an agent");
  value.job = reader.pod<JobId>();
  if (!read_enum(reader, JobStatus::kCanceled, value.status)) return malformed("job report");
  value.good_blocks = reader.pod<std::uint32_t>();
  value.sums = reader.array<std::uint64_t>(kSumsPerReportMax);
  return finish(reader, std::move(value), "job report");
}

std::vector<std::byte> encode(const FromClient& value) {
  Writer writer;
  if (const auto* lookup = std::get_if<LookupRequest>(&value)) {
    writer.pod(Tag::kLookup);
    writer.pod(lookup->request);
    writer.pod(lookup->sequence);
    writer.pod(lookup->base);
    writer.array(std::span<const key::BlockKey>(lookup->keys));
    writer.pod(lookup->engine_blocks);
    writer.pod(static_cast<std::uint8_t>(lookup->alone));
  } else if (const auto* transfer = std::get_if<TransferRequest>(&value)) {
    writer.pod(Tag::kTransfer);
    writer.pod(static_cast<std::uint8_t>(transfer->save));
    writer.pod(static_cast<std::uint8_t>(transfer->armed));
    writer.pod(transfer->sequence);
    writer.pod(transfer->job);
    writer.pod(transfer->base);
    writer.array(std::span<const key::BlockKey>(transfer->keys));
    writer.pod(transfer->first_block);
    writer.array(std::span<const std::uint32_t>(transfer->device_blocks));
    writer.pod(static_cast<std::uint8_t>(transfer->on_commit));
  } else if (const auto* prefetch = std::get_if<PrefetchRequest>(&value)) {
    writer.pod(Tag::kPrefetch);
    writer.pod(prefetch->sequence);
    writer.pod(prefetch->base);
    writer.array(std::span<const key::BlockKey>(prefetch->keys));
  } else if (const auto* speed = std::get_if<PrefillSpeed>(&value)) {
    writer.pod(Tag::kPrefillSpeed);
    writer.pod(speed->time.fixed);
    writer.pod(speed->time.per_token);
    writer.pod(speed->time.per_pair);
    writer.pod(speed->time.step_tokens);
  } else if (const auto* closed = std::get_if<CloseSequence>(&value)) {
    writer.pod(Tag::kCloseSequence);
    writer.pod(closed->sequence);
  } else if (const auto* cancel = std::get_if<CancelRequest>(&value)) {
    writer.pod(Tag::kCancel);
    writer.pod(cancel->job);
  } else if (const auto* commit = std::get_if<CommitRequest>(&value)) {
    writer.pod(Tag::kCommit);
    writer.pod(commit->job);
  } else if (const auto* describe = std::get_if<DescribeRequest>(&value)) {
    writer.pod(Tag::kDescribe);
    write(writer, *describe);
  } else {
    writer.pod(std::holds_alternative<ChangesRequest>(value) ? Tag::kChangesRequest : Tag::kReset);
  }
  return writer.take();
}

Result<FromClient> decode_from_client(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  switch (reader.pod<Tag>()) {
    case Tag::kLookup: {
      LookupRequest lookup;
      lookup.request = reader.pod<std::uint64_t>();
      lookup.sequence = reader.pod<SequenceId>();
      lookup.base = reader.pod<std::uint32_t>();
      lookup.keys = read_blocks<key::BlockKey>(reader);
      lookup.engine_blocks = reader.pod<std::uint32_t>();
      if (!read_flag(reader, lookup.alone)) break;
      return finish<FromClient>(reader, std::move(lookup), "lookup request");
    }
    case Tag::kTransfer: {
      TransferRequest transfer;
      if (!read_flag(reader, transfer.save) || !read_flag(reader, transfer.armed)) break;
      transfer.sequence = reader.pod<SequenceId>();
      transfer.job = reader.pod<JobId>();
      transfer.base = reader.pod<std::uint32_t>();
      transfer.keys = read_blocks<key::BlockKey>(reader);
      transfer.first_block = reader.pod<std::uint32_t>();
      transfer.device_blocks = read_blocks<std::uint32_t>(reader);
      if (!read_flag(reader, transfer.on_commit) || (transfer.on_commit && !transfer.save)) break;
      return finish<FromClient>(reader, std::move(transfer), "transfer request");
    }
    case Tag::kPrefetch: {
      PrefetchRequest prefetch;
      prefetch.sequence = reader.pod<SequenceId>();
      prefetch.base = reader.pod<std::uint32_t>();
      prefetch.keys = read_blocks<key::BlockKey>(reader);
      return finish<FromClient>(reader, std::move(prefetch), "prefetch request");
    }
    case Tag::kPrefillSpeed: {
      plan::PrefillTime time;
      time.fixed = reader.pod<double>();
      time.per_token = reader.pod<double>();
      time.per_pair = reader.pod<double>();
      time.step_tokens = reader.pod<double>();
      for (const double value : {time.fixed, time.per_token, time.per_pair, time.step_tokens}) {
        if (!(value >= 0 && value <= kPrefillNanosMax)) return malformed("prefill speed");
      }
      return finish<FromClient>(reader, PrefillSpeed{time}, "prefill speed");
    }
    case Tag::kCloseSequence:
      return finish<FromClient>(reader, CloseSequence{reader.pod<SequenceId>()}, "close request");
    case Tag::kCancel:
      return finish<FromClient>(reader, CancelRequest{reader.pod<JobId>()}, "cancel request");
    case Tag::kCommit:
      return finish<FromClient>(reader, CommitRequest{reader.pod<JobId>()}, "commit request");
    case Tag::kReset:
      return finish<FromClient>(reader, ResetRequest{}, "reset request");
    case Tag::kDescribe:
      if (auto describe = read_describe_request(reader)) {
        return finish<FromClient>(reader, std::move(*describe), "describe request");
      }
      break;
    case Tag::kChangesRequest:
      return finish<FromClient>(reader, ChangesRequest{}, "changes request");
    default:
      break;
  }
  return malformed("message from a client");
}

std::vector<std::byte> encode(const ToClient& value) {
  Writer writer;
  if (const auto* reply = std::get_if<LookupReply>(&value)) {
    writer.pod(Tag::kLookupReply);
    writer.pod(reply->request);
    writer.pod(reply->matched_blocks);
    writer.pod(reply->disk_blocks);
    writer.pod(reply->host_blocks);
    writer.pod(reply->described_blocks);
    writer.pod(reply->reason);
  } else if (const auto* changes = std::get_if<ChangesReply>(&value)) {
    writer.pod(Tag::kChangesReply);
    write(writer, *changes);
  } else {
    const auto& result = std::get<JobResult>(value);
    writer.pod(Tag::kJobResult);
    writer.pod(result.job);
    writer.pod(result.status);
    writer.pod(result.reason);
    writer.pod(result.good_blocks);
  }
  return writer.take();
}

Result<ToClient> decode_to_client(std::span<const std::byte> bytes) {
  Reader reader(bytes);
  switch (reader.pod<Tag>()) {
    case Tag::kLookupReply: {
      LookupReply reply;
      reply.request = reader.pod<std::uint64_t>();
      reply.matched_blocks = reader.pod<std::uint32_t>();
      reply.disk_blocks = reader.pod<std::uint32_t>();
      reply.host_blocks = reader.pod<std::uint32_t>();
      reply.described_blocks = reader.pod<std::uint32_t>();
      if (!read_enum(reader, kLastReason, reply.reason)) break;
      return finish<ToClient>(reader, reply, "lookup reply");
    }
    case Tag::kJobResult: {
      JobResult result;
      result.job = reader.pod<JobId>();
      if (!read_enum(reader, JobStatus::kCanceled, result.status) || !read_enum(reader, kLastReason, result.reason))
        break;
      result.good_blocks = reader.pod<std::uint32_t>();
      return finish<ToClient>(reader, result, "job result");
    }
    case Tag::kChangesReply:
      if (auto changes = read_changes_reply(reader)) {
        return finish<ToClient>(reader, std::move(*changes), "changes");
      }
      break;
    default:
      break;
  }
  return malformed("message to a client");
}

}  // namespace flexkv::proto
