#include "flexkv/remote/store_probe.h"

#include <algorithm>
#include <array>
#include <cstddef>

namespace flexkv::remote {
namespace {

constexpr std::array<std::byte, 16> kZeros{};

Ended wait_for(Store& store, OpId id, Nanos within) {
  const Nanos deadline = monotonic_now() + within;
  std::vector<Ended> ended;
  while (ended.empty() && monotonic_now() < deadline) store.wait(deadline, ended);
  if (!ended.empty()) return std::move(ended.front());
  store.abandon(id);
  return {id, StoreOutcome::kFailed, "no answer within " + std::to_string(within / kMillisecond) + " ms", {}, {}};
}

}  // namespace

std::vector<ProbeStep> probe_store(Store& store, Nanos within) {
  std::array<std::byte, kZeros.size()> got{};
  std::vector<ProbeStep> steps;
  const auto carry_out = [&](const char* what, auto op, bool may_be_missing) {
    const OpId id = steps.size() + 1;
    const Nanos begun = monotonic_now();
    store.begin(id, std::move(op));
    const Ended ended = wait_for(store, id, within);
    const bool missing = ended.outcome == StoreOutcome::kMissing;
    const bool done = ended.outcome == StoreOutcome::kDone || (missing && may_be_missing);
    std::string why = done ? "" : missing ? "what was written is not there" : ended.why;
    steps.push_back({what, monotonic_now() - begun, std::move(why)});
    return done;
  };
  carry_out("list", ListOp{"v1/resets/", {}}, false);
  const bool written = carry_out("write", PutOp{kProbePath, {std::span(kZeros)}, true}, false);
  carry_out("read", GetOp{kProbePath, 0, {std::span(got)}}, !written);
  return steps;
}

}  // namespace flexkv::remote
