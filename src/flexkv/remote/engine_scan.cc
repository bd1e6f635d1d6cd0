// How the engine learns what the store has: it lists the objects of a space and reads the headers of those that it does
// not know.
#include <algorithm>
#include <utility>

#include "flexkv/remote/engine.h"

namespace flexkv::remote {
namespace {

constexpr std::size_t kHeadersAtOnce = 16;

}  // namespace

void Engine::begin_due_scan(Nanos now) {
  if (scan_) return;
  std::shared_ptr<Space> due;
  {
    const MutexLock lock(mutex_);
    for (const auto& [name, space] : spaces_) {
      if (space->scan_at <= now && (due == nullptr || space->scan_at < due->scan_at)) due = space;
    }
    if (due == nullptr) return;
    due->catalog.begin_scan();
  }
  scan_.emplace();
  scan_->space = std::move(due);
  list_page("");
}

void Engine::list_page(std::string from) {
  const auto make = [this, from]() -> Dispatch::StoreOp { return ListOp{scan_->space->codec.folder(), from}; };
  scan_->ops.insert(dispatch_.order(Dispatch::Kind::kScan, make, [this, from = std::move(from)](Ended& ended) {
    scan_->ops.erase(ended.id);
    // A store that does not go on from where it was asked to would be listed for ever.
    const bool goes_on = ended.next.empty() || ended.next > from;
    if (ended.outcome == StoreOutcome::kDone && goes_on) {
      take_page(ended);
    } else {
      end_scan(false);
    }
  }));
}

void Engine::take_page(Ended& ended) {
  Space& space = *scan_->space;
  for (const ListedObject& object : ended.objects) {
    const auto name = space.codec.parse_path(object.path);
    if (!name) continue;  // not ours
    {
      const MutexLock lock(mutex_);
      if (!space.catalog.see(*name)) continue;
    }
    const std::uint64_t expected = space.codec.object_bytes(name->blocks);
    if (object.bytes.value_or(expected) == expected) {
      scan_->unknown.push_back(*name);
    } else {
      blame(space, *name, Fault::kShort);
    }
  }
  scan_->next = std::move(ended.next);
  go_on_scanning();
}

void Engine::go_on_scanning() {
  while (!scan_->unknown.empty() && scan_->ops.size() < kHeadersAtOnce) {
    const ObjectName name = scan_->unknown.back();
    scan_->unknown.pop_back();
    read_header(name);
  }
  if (!scan_->ops.empty()) return;
  if (scan_->next.empty()) {
    end_scan(true);
  } else {
    list_page(std::exchange(scan_->next, {}));
  }
}

void Engine::read_header(const ObjectName& name) {
  const auto bytes = std::make_shared<std::vector<std::byte>>(ObjectCodec::header_bytes(name.blocks));
  const auto make = [this, name, bytes]() -> Dispatch::StoreOp {
    return GetOp{scan_->space->codec.path_of(name), 0, {std::span(*bytes)}};
  };
  scan_->ops.insert(dispatch_.order(Dispatch::Kind::kScan, make, [this, name, bytes](Ended& ended) {
    scan_->ops.erase(ended.id);
    Space& space = *scan_->space;
    std::optional<Fault> fault;
    Chain chain;
    switch (ended.outcome) {
      case StoreOutcome::kDone:
        fault = space.codec.decode_header(*bytes, name, chain);
        break;
      case StoreOutcome::kMissing:  // removed since it was listed
        go_on_scanning();
        return;
      case StoreOutcome::kShort:
        fault = Fault::kShort;
        break;
      default:
        end_scan(false);
        return;
    }
    if (fault) {
      blame(space, name, *fault);
    } else {
      const MutexLock lock(mutex_);
      space.catalog.add(name, std::move(chain));
    }
    go_on_scanning();
  }));
}

void Engine::end_scan(bool whole) {
  Space& space = *scan_->space;
  bool swept = !whole;
  while (!swept) {
    const MutexLock lock(mutex_);
    swept = space.catalog.sweep();
  }
  if (whole) scan_backoff_.succeeded();
  const Nanos again_at = now_ + (whole ? options_.scan_every : scan_backoff_.failed());
  {
    const MutexLock lock(mutex_);
    space.scan_at = again_at;
  }
  ++(whole ? counts_.scans : counts_.scans_failed);
  drop_scan();
}

void Engine::drop_scan() {
  if (!scan_) return;
  const std::set<OpId> ops = std::move(scan_->ops);
  scan_.reset();
  for (const OpId op : ops) dispatch_.drop(op);
}

}  // namespace flexkv::remote
