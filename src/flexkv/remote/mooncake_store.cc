#include "flexkv/remote/mooncake_store.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <utility>

#include "flexkv/base/assert.h"

namespace flexkv::remote {
namespace {

constexpr std::uint64_t kNamesBytes = 1 << 20;  // of one page of a listing

}  // namespace

Result<std::unique_ptr<Store>> MooncakeStore::open(const Location& location, const MooncakeOptions& options) {
  if (options.helper.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 "mooncake:// needs the command of the process that runs Mooncake's client"};
  }
  std::vector<std::string> command = options.helper;
  command.push_back(location.server);
  command.push_back(options.endpoint.empty() ? location.default_endpoint() : options.endpoint);
  auto process = MooncakeProcess::start(std::move(command));
  if (!process.ok()) return process.error();
  const std::string prefix = location.path.empty() ? "" : location.path + '/';
  return std::unique_ptr<Store>(new MooncakeStore(std::move(process).value(), prefix));
}

MooncakeStore::MooncakeStore(std::unique_ptr<MooncakeProcess> process, std::string prefix)
    : prefix_(std::move(prefix)), process_(std::move(process)) {}

void MooncakeStore::begin_any(OpId id, AnyOp op) {
  if (!waiting_.empty() || !start(id, op)) waiting_.emplace_back(id, std::move(op));
}

// False: all pieces are in use, most likely by what was abandoned.
bool MooncakeStore::start(OpId id, AnyOp& op) {
  const auto memory = process_->memory();
  if (memory == nullptr) {
    fail(id, StoreOutcome::kFailed, process_->trouble());
    return true;
  }
  const auto piece = memory->take();
  if (!piece) return false;
  MooncakeOrder order;
  order.id = id;
  order.memory_offset = MooncakeMemory::offset(*piece);
  std::string key = prefix_;
  if (const auto* const put = std::get_if<PutOp>(&op)) {
    order.kind = MooncakeOrder::Kind::kPut;
    order.bytes = bytes_of(put->parts);
    order.argument = put->replace ? 1 : 0;
    key += put->path;
  } else if (const auto* const get = std::get_if<GetOp>(&op)) {
    order.kind = MooncakeOrder::Kind::kGet;
    order.bytes = bytes_of(get->parts);
    order.argument = get->offset;
    key += get->path;
  } else {
    const auto& list = std::get<ListOp>(op);
    order.kind = MooncakeOrder::Kind::kList;
    order.bytes = kNamesBytes;
    order.argument = prefix_.size() + list.folder.size();
    key += list.from.empty() ? list.folder : list.from;
  }
  const auto refuse = [&](StoreOutcome outcome, const std::string& why) {
    memory->give_back(*piece);
    fail(id, outcome, why);
    return true;
  };
  if (key.size() > kMooncakeTextMax) return refuse(StoreOutcome::kRefused, "the name " + key + " is too long");
  if (order.bytes == 0 || order.bytes > MooncakeMemory::kPieceBytes) {
    return refuse(StoreOutcome::kRefused, "objects of " + std::to_string(order.bytes) + " bytes are not for Mooncake");
  }
  const auto place = memory->first(*piece, order.bytes);
  if (!place.ok()) return refuse(StoreOutcome::kFailed, place.error().message);
  if (const auto* const put = std::get_if<PutOp>(&op)) {
    std::byte* to = place.value().data();
    for (const auto part : put->parts) to = std::ranges::copy(part, to).out;
  }
  std::ranges::copy(key, order.key.begin());
  under_way_.emplace(id, UnderWay{std::move(op), memory, *piece});
  process_->order(order, memory);
  return true;
}

void MooncakeStore::fail(OpId id, StoreOutcome outcome, std::string why) {
  ended_.push_back({id, outcome, std::move(why), {}, {}});
}

void MooncakeStore::abandon(OpId id) {
  std::erase_if(waiting_, [&](const auto& one) { return one.first == id; });
  std::erase_if(ended_, [&](const Ended& one) { return one.id == id; });
  // Its piece is in use until the process says otherwise.
  if (const auto found = under_way_.find(id); found != under_way_.end()) found->second.op = std::monostate();
}

void MooncakeStore::wait(std::optional<Nanos> until, std::vector<Ended>& ended) {
  answers_.clear();
  process_->wait(ended_.empty() ? until : std::optional<Nanos>(0), answers_);
  for (const auto& answer : answers_) take(answer);
  while (!waiting_.empty() && start(waiting_.front().first, waiting_.front().second)) waiting_.pop_front();
  ended.insert(ended.end(), std::make_move_iterator(ended_.begin()), std::make_move_iterator(ended_.end()));
  ended_.clear();
}

void MooncakeStore::take(const MooncakeProcess::Answer& answer) {
  const auto found = under_way_.find(answer.id);
  FLEXKV_ASSERT(found != under_way_.end());  // each order has one answer
  UnderWay& done = found->second;
  Ended ended{answer.id, answer.outcome, answer.why, {}, {}};
  const bool abandoned = std::holds_alternative<std::monostate>(done.op);
  if (const auto* const get = std::get_if<GetOp>(&done.op); get != nullptr && answer.outcome == StoreOutcome::kDone) {
    // It has the memory since it was ordered.
    const std::byte* from = done.memory->first(done.piece, bytes_of(get->parts)).value().data();
    for (const auto part : get->parts) {
      std::memcpy(part.data(), from, part.size());
      from += part.size();
    }
  }
  if (std::holds_alternative<ListOp>(done.op) && answer.outcome == StoreOutcome::kDone) take_names(done, answer, ended);
  done.memory->give_back(done.piece);
  under_way_.erase(found);
  if (!abandoned) ended_.push_back(std::move(ended));
}

// Each ends with a line feed. The process may have written anything there, and may still.
void MooncakeStore::take_names(UnderWay& done, const MooncakeProcess::Answer& answer, Ended& ended) const {
  const auto bytes = done.memory->first(done.piece, std::min(answer.bytes, kNamesBytes));
  const std::string names(reinterpret_cast<const char*>(bytes.value().data()), bytes.value().size());
  std::string_view left = names;
  while (!left.empty()) {
    const std::string_view name = left.substr(0, left.find('\n'));
    if (name.starts_with(prefix_)) ended.objects.push_back({std::string(name.substr(prefix_.size())), std::nullopt});
    left.remove_prefix(std::min(name.size() + 1, left.size()));
  }
  if (answer.more && !ended.objects.empty()) ended.next = ended.objects.back().path;
}

}  // namespace flexkv::remote
