#include "flexkv/testing/sim_directory.h"

#include <algorithm>

#include "flexkv/testing/redis_bytes.h"

namespace flexkv::testing {
namespace {

constexpr std::uint64_t kReplicaMax = UINT32_MAX;

DirectoryUse use_of(const meta::Request& request) {
  switch (request.front().kind) {
    case meta::Op::Kind::kAppend:
    case meta::Op::Kind::kTrim:
      return DirectoryUse::kStream;
    case meta::Op::Kind::kPutPart:
      return DirectoryUse::kSnapshot;
    case meta::Op::Kind::kRead:
      return DirectoryUse::kFollow;
    case meta::Op::Kind::kGetPart:
      return DirectoryUse::kLoad;
    default:
      return DirectoryUse::kRound;
  }
}

}  // namespace

DirectoryTraffic& DirectoryTraffic::operator+=(const DirectoryTraffic& other) {
  for (std::size_t i = 0; i < kDirectoryUses; ++i) {
    by_use[i].requests += other.by_use[i].requests;
    by_use[i].sent_bytes += other.by_use[i].sent_bytes;
    by_use[i].received_bytes += other.by_use[i].received_bytes;
  }
  return *this;
}

DirectoryTraffic DirectoryTraffic::operator-(const DirectoryTraffic& other) const {
  DirectoryTraffic rest = *this;
  for (std::size_t i = 0; i < kDirectoryUses; ++i) {
    rest.by_use[i].requests -= other.by_use[i].requests;
    rest.by_use[i].sent_bytes -= other.by_use[i].sent_bytes;
    rest.by_use[i].received_bytes -= other.by_use[i].received_bytes;
  }
  return rest;
}

SimDirectory::SimDirectory(SimLoop& loop, SimMeta& store, const cluster::DirectoryOptions& options, bool follows)
    : loop_(loop),
      incarnation_(options.incarnation),
      follows_(follows),
      replica_(kReplicaMax),
      directory_(options, replica_),
      orders_(loop, store, loop.below(UINT32_MAX), [this] { pump(); }),
      reads_(loop, store, loop.below(UINT32_MAX), [this] { pump(); }) {}

cluster::SpaceIndex SimDirectory::add_space(const cluster::SpaceId& id) {
  const auto index = directory_.add_space(id, loop_.now());
  SIM_CHECK(index.has_value());
  return *index;
}

void SimDirectory::apply(const cluster::Change& change) {
  directory_.apply(change, loop_.now());
  ++changes_;
  changed_at_ = loop_.now();
}

void SimDirectory::submit(SimMetaChannel& channel, meta::Request request,
                          void (cluster::Directory::*report)(const Result<meta::Answers>&, Nanos)) {
  DirectoryTraffic::Flow& flow = traffic_.by_use[static_cast<std::size_t>(use_of(request))];
  ++flow.requests;
  flow.sent_bytes += request_bytes(request);
  const auto asked = std::make_shared<const meta::Request>(request);
  channel.submit(std::move(request), [this, &flow, asked, report](Result<meta::Answers> answers) {
    if (answers) flow.received_bytes += answer_bytes(*asked, answers.value());
    (directory_.*report)(answers, loop_.now());
    pump();
  });
}

void SimDirectory::pump() {
  const Nanos now = loop_.now();
  if (orders_.ready()) {
    if (auto request = directory_.next_order(now)) {
      submit(orders_, std::move(*request), &cluster::Directory::order_done);
    }
  }
  if (follows_ && reads_.ready()) {
    if (auto request = directory_.next_read(now)) submit(reads_, std::move(*request), &cluster::Directory::read_done);
  }
  Nanos due = INT64_MAX;
  if (orders_.ready()) due = directory_.order_due(now);
  if (follows_ && reads_.ready()) due = std::min(due, directory_.read_due(now));
  if (due == INT64_MAX || (wakeup_ <= due && wakeup_ > now)) return;
  wakeup_ = due;
  loop_.at(due, [this, alive = alive_] {
    if (!*alive) return;
    wakeup_ = INT64_MAX;
    pump();
  });
}

}  // namespace flexkv::testing
