#include "flexkv/remote/types.h"

#include <algorithm>

namespace flexkv::remote {
namespace {

std::string problem_of(std::size_t blocks, std::size_t buffers, std::uint64_t slot_bytes, bool buffers_fit) {
  if (blocks == 0 || blocks > kKeysMax) return "no blocks, or too many";
  if (blocks != buffers) return "not one buffer for each block";
  if (slot_bytes == 0 || slot_bytes > kSlotBytesMax) return "no such block size";
  return buffers_fit ? "" : "a buffer is not of a block's size";
}

}  // namespace

std::string problem_of(const ReadRequest& request) {
  const bool fit = std::ranges::all_of(request.buffers, [&](auto one) { return one.size() == request.slot_bytes; });
  return problem_of(request.keys.size(), request.buffers.size(), request.slot_bytes, fit);
}

std::string problem_of(const WriteRequest& request) {
  const bool fit = std::ranges::all_of(request.buffers, [&](auto one) { return one.size() == request.slot_bytes; });
  return problem_of(request.blocks.size(), request.buffers.size(), request.slot_bytes, fit);
}

const char* outcome_name(Outcome outcome) {
  constexpr std::array<const char*, kOutcomeCount> kNames = {"done",     "missing",  "damaged",     "busy",
                                                             "canceled", "deadline", "unavailable", "failed"};
  return kNames.at(static_cast<std::size_t>(outcome));
}

const char* fault_name(Fault fault) {
  constexpr std::array<const char*, kFaultCount> kNames = {"gone", "short", "header", "other", "head", "payload"};
  return kNames.at(static_cast<std::size_t>(fault));
}

}  // namespace flexkv::remote
