// What the directory asks of the cluster's metadata store, and what it gets back. A request is a list of operations
// that the store carries out in their order, not as one: others may come between, and a request that fails may have
// been carried out in part, in whole, or not at all. So they are such that may be repeated. Values; thread-compatible.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/base/time.h"

namespace flexkv::meta {

struct Position {
  std::string stream;
  std::string after;  // the id of the last entry already known
};

struct Op {
  enum class Kind : std::uint8_t {
    kGet,
    kPut,          // with a time to live, if `ttl` is not 0
    kPutIfAbsent,  // the same
    kIncrement,    // a number; repeated, it counts again
    kRemove,
    kTouch,  // the key, if it is there, lives for `ttl` from now
    kAdd,    // `value` to a set
    kDrop,   // `value` from a set
    kMembers,
    kAppend,   // to a stream, as entry `number`; no effect if the stream is at or behind that number already
    kRing,     // appends to a stream of which only the newest entries matter
    kNewest,   // the id of a stream's newest entry, as `value`; kNoEntry if there is none
    kTrim,     // a stream to its newest `number` entries
    kPutPart,  // `value` as part `number` of a whole
    kGetPart,
    kRead,  // of `streams`, at most `number` entries each; waits up to `ttl` for the first one
  };
  Kind kind = Kind::kGet;
  std::string key;
  std::string value;
  std::uint64_t number = 0;
  Nanos ttl = 0;
  std::vector<Position> streams;
};

struct Entry {
  std::uint32_t stream = 0;  // which of the positions asked for
  std::string id;
  std::string value;
};

struct Answer {
  bool found = false;  // kGet, kGetPart
  std::string value;
  std::vector<std::string> members;
  std::vector<Entry> entries;  // of kRead, each stream's in their order
};

using Request = std::vector<Op>;
using Answers = std::vector<Answer>;  // one for each operation

inline Op get(std::string key) { return {Op::Kind::kGet, std::move(key), {}, 0, 0, {}}; }
inline Op put(std::string key, std::string value, Nanos ttl) {
  return {Op::Kind::kPut, std::move(key), std::move(value), 0, ttl, {}};
}
inline Op put_if_absent(std::string key, std::string value, Nanos ttl) {
  return {Op::Kind::kPutIfAbsent, std::move(key), std::move(value), 0, ttl, {}};
}
inline Op increment(std::string key) { return {Op::Kind::kIncrement, std::move(key), {}, 0, 0, {}}; }
inline Op remove(std::string key) { return {Op::Kind::kRemove, std::move(key), {}, 0, 0, {}}; }
inline Op touch(std::string key, Nanos ttl) { return {Op::Kind::kTouch, std::move(key), {}, 0, ttl, {}}; }
inline Op add(std::string set, std::string member) {
  return {Op::Kind::kAdd, std::move(set), std::move(member), 0, 0, {}};
}
inline Op drop(std::string set, std::string member) {
  return {Op::Kind::kDrop, std::move(set), std::move(member), 0, 0, {}};
}
inline Op members(std::string set) { return {Op::Kind::kMembers, std::move(set), {}, 0, 0, {}}; }
inline Op append(std::string stream, std::uint64_t number, std::string value) {
  return {Op::Kind::kAppend, std::move(stream), std::move(value), number, 0, {}};
}
inline Op ring(std::string stream) { return {Op::Kind::kRing, std::move(stream), {}, 0, 0, {}}; }
inline Op newest(std::string stream) { return {Op::Kind::kNewest, std::move(stream), {}, 0, 0, {}}; }
inline Op trim(std::string stream, std::uint64_t entries) {
  return {Op::Kind::kTrim, std::move(stream), {}, entries, 0, {}};
}
inline Op put_part(std::string key, std::uint64_t part, std::string value) {
  return {Op::Kind::kPutPart, std::move(key), std::move(value), part, 0, {}};
}
inline Op get_part(std::string key, std::uint64_t part) {
  return {Op::Kind::kGetPart, std::move(key), {}, part, 0, {}};
}
inline Op read(std::vector<Position> streams, std::uint64_t entries, Nanos wait) {
  return {Op::Kind::kRead, {}, {}, entries, wait, std::move(streams)};
}

inline const std::string kNoEntry = "0-0";  // the id before all
// The id that entry `number` of kAppend has, and back (0: that was not one).
std::string entry_id(std::uint64_t number);
std::uint64_t entry_number(const std::string& id);

// How long a request may make its caller wait in the store.
Nanos waiting_time(const Request& request);

}  // namespace flexkv::meta
