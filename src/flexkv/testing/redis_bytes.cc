#include "flexkv/testing/redis_bytes.h"

#include "flexkv/meta/redis_command.h"

namespace flexkv::testing {
namespace {

using meta::Op;

constexpr std::uint64_t kMark = 1;  // what a reply begins with
constexpr std::uint64_t kEnd = 2;   // and a line ends with
constexpr std::uint64_t kNothing = 5;
constexpr std::uint64_t kSmallNumber = 4;
constexpr std::uint64_t kClockId = 15;  // an entry's id by the store's clock

std::uint64_t number_line(std::uint64_t number) { return kMark + std::to_string(number).size() + kEnd; }
std::uint64_t bulk(std::uint64_t size) { return number_line(size) + size + kEnd; }

// [id, [field, value]]
std::uint64_t entry(std::uint64_t id, std::uint64_t value) {
  return number_line(2) + bulk(id) + number_line(2) + bulk(1) + bulk(value);
}

// Without the names, of which there may be a thousand: copying them all only to count them would take most of a run.
std::uint64_t read_bytes(const Op& op) {
  const Op without{op.kind, {}, {}, op.number, op.ttl, {}};
  const auto words = meta::words_of(without);
  std::string command;
  meta::append_command(words, command);
  std::uint64_t bytes = command.size() - number_line(words.size()) + number_line(words.size() + 2 * op.streams.size());
  for (const meta::Position& position : op.streams) bytes += bulk(position.stream.size()) + bulk(position.after.size());
  return bytes;
}

std::uint64_t answer_bytes(const Op& op, const meta::Answer& answer) {
  switch (op.kind) {
    case Op::Kind::kGet:
    case Op::Kind::kGetPart:
      return answer.found ? bulk(answer.value.size()) : kNothing;
    case Op::Kind::kPut:
    case Op::Kind::kPutIfAbsent:
      return kNothing;  // as long as "+OK"
    case Op::Kind::kMembers: {
      std::uint64_t bytes = number_line(answer.members.size());
      for (const std::string& member : answer.members) bytes += bulk(member.size());
      return bytes;
    }
    case Op::Kind::kAppend:
      return bulk(meta::entry_id(op.number).size());
    case Op::Kind::kRing:
      return bulk(kClockId);
    case Op::Kind::kNewest:
      return answer.value == meta::kNoEntry ? kSmallNumber : number_line(1) + entry(kClockId, 0);
    case Op::Kind::kRead: {
      if (answer.entries.empty()) return kNothing;
      std::uint64_t bytes = 0;
      std::uint64_t streams = 0;
      for (std::size_t first = 0, end = 0; first < answer.entries.size(); first = end) {
        const std::uint32_t stream = answer.entries[first].stream;
        for (; end < answer.entries.size() && answer.entries[end].stream == stream; ++end) {
          bytes += entry(answer.entries[end].id.size(), answer.entries[end].value.size());
        }
        bytes += number_line(2) + bulk(op.streams[stream].stream.size()) + number_line(end - first);
        ++streams;
      }
      return bytes + number_line(streams);
    }
    default:
      return kSmallNumber;
  }
}

}  // namespace

std::uint64_t request_bytes(const meta::Request& request) {
  std::uint64_t bytes = 0;
  std::string command;
  for (const Op& op : request) {
    if (op.kind == Op::Kind::kRead) {
      bytes += read_bytes(op);
      continue;
    }
    command.clear();
    meta::append_command(meta::words_of(op), command);
    bytes += command.size();
  }
  return bytes;
}

std::uint64_t answer_bytes(const meta::Request& request, const meta::Answers& answers) {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < request.size(); ++i) bytes += answer_bytes(request[i], answers[i]);
  return bytes;
}

}  // namespace flexkv::testing
