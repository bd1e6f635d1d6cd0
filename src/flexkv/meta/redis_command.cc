#include "flexkv/meta/redis_command.h"

#include <algorithm>

namespace flexkv::meta {
namespace {

constexpr std::uint64_t kBellEntries = 16;
constexpr const char* kField = "b";  // of a stream's entry, the only one

std::string milliseconds(Nanos time) { return std::to_string(std::max<Nanos>(1, time / kMillisecond)); }

}  // namespace

std::vector<std::string> words_of(const Op& op) {
  const std::string number = std::to_string(op.number);
  switch (op.kind) {
    case Op::Kind::kGet:
      return {"GET", op.key};
    case Op::Kind::kPut:
    case Op::Kind::kPutIfAbsent: {
      std::vector<std::string> words{"SET", op.key, op.value};
      if (op.ttl > 0) words.insert(words.end(), {"PX", milliseconds(op.ttl)});
      if (op.kind == Op::Kind::kPutIfAbsent) words.emplace_back("NX");
      return words;
    }
    case Op::Kind::kIncrement:
      return {"INCR", op.key};
    case Op::Kind::kRemove:
      return {"DEL", op.key};
    case Op::Kind::kTouch:
      return {"PEXPIRE", op.key, milliseconds(op.ttl)};
    case Op::Kind::kAdd:
      return {"SADD", op.key, op.value};
    case Op::Kind::kDrop:
      return {"SREM", op.key, op.value};
    case Op::Kind::kMembers:
      return {"SMEMBERS", op.key};
    case Op::Kind::kAppend:
      return {"XADD", op.key, entry_id(op.number), kField, op.value};
    case Op::Kind::kRing:
      return {"XADD", op.key, "MAXLEN", "~", std::to_string(kBellEntries), "*", kField, ""};
    case Op::Kind::kNewest:
      return {"XREVRANGE", op.key, "+", "-", "COUNT", "1"};
    case Op::Kind::kTrim:
      return {"XTRIM", op.key, "MAXLEN", number};
    case Op::Kind::kPutPart:
      return {"HSET", op.key, number, op.value};
    case Op::Kind::kGetPart:
      return {"HGET", op.key, number};
    case Op::Kind::kRead: {
      std::vector<std::string> words{"XREAD", "COUNT", number};
      if (op.ttl > 0) words.insert(words.end(), {"BLOCK", milliseconds(op.ttl)});
      words.emplace_back("STREAMS");
      for (const Position& position : op.streams) words.push_back(position.stream);
      for (const Position& position : op.streams) words.push_back(position.after);
      return words;
    }
  }
  return {};
}

void append_command(const std::vector<std::string>& words, std::string& out) {
  out += '*' + std::to_string(words.size()) + "\r\n";
  for (const std::string& word : words) {
    out += '$' + std::to_string(word.size()) + "\r\n";
    out += word;
    out += "\r\n";
  }
}

}  // namespace flexkv::meta
