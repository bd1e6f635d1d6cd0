#include "remote_sim.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "flexkv/base/assert.h"

namespace flexkv::testing {
namespace {

using remote::Ended;
using remote::OpId;
using remote::Outcome;
using remote::RequestId;
using remote::StoreOutcome;

constexpr remote::SpaceName kSpaces[] = {{1}, {2}};
constexpr std::size_t kSlotBytes = 96;
constexpr std::uint64_t kChains = 6;
constexpr std::uint64_t kChainBlocks = 24;
constexpr Nanos kFaultyTime = 60 * kSecond;
constexpr Nanos kHealingTime = 200 * kSecond;

key::BlockKey key_of(std::uint64_t chain, std::uint64_t block) {
  return {Prng::mix(chain + 1), Prng::mix(chain * 1000 + block)};
}

// Each node computes other bytes for a block, as real ones may in the last bit.
std::vector<std::byte> bytes_of(std::size_t space, const key::BlockKey& key, std::uint64_t node) {
  std::vector<std::byte> bytes(kSlotBytes);
  Prng random(key.low ^ space << 8 ^ node);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next());
  return bytes;
}

}  // namespace

// ---- the store -----------------------------------------------------------------------------------------------------

class RemoteSim::SimStore final : public remote::Store {
 public:
  explicit SimStore(RemoteSim& sim) : sim_(sim) {}

  unsigned width() const override { return 6; }
  void begin(OpId id, remote::PutOp op) override { add(id, std::move(op)); }
  void begin(OpId id, remote::GetOp op) override { add(id, std::move(op)); }
  void begin(OpId id, remote::ListOp op) override { add(id, std::move(op)); }
  void abandon(OpId id) override {
    const auto found = ops_.find(id);
    if (found == ops_.end()) return;
    // What was on its way may arrive all the same.
    const auto* const put = std::get_if<remote::PutOp>(&found->second.op);
    if (put != nullptr && sim_.prng_.chance(30)) sim_.bucket_[put->path] = gather(*put);
    ops_.erase(found);
  }
  void wait(std::optional<Nanos>, std::vector<Ended>&) override { FLEXKV_ASSERT(false); }
  void wake() override {}

  Nanos next_time() const {
    Nanos next = std::numeric_limits<Nanos>::max();
    for (const auto& [id, op] : ops_) next = std::min(next, op.due);
    return next;
  }
  void take(std::vector<Ended>& ended) {
    std::vector<OpId> due;
    for (const auto& [id, op] : ops_) {
      if (op.due <= sim_.now_) due.push_back(id);
    }
    for (const OpId id : due) {
      const Op op = std::move(ops_.extract(id).mapped());
      if (faulty()) {
        ended.push_back(
            {id, sim_.prng_.chance(80) ? StoreOutcome::kFailed : StoreOutcome::kRefused, "a fault", {}, {}});
        continue;
      }
      ended.push_back(std::visit([&](const auto& one) { return carry_out(id, one); }, op.op));
    }
  }

 private:
  using StoreOp = std::variant<remote::PutOp, remote::GetOp, remote::ListOp>;
  struct Op {
    StoreOp op;
    Nanos due;
  };

  bool faulty() { return sim_.prng_.chance(sim_.fault_percent_); }
  void add(OpId id, StoreOp op) {
    Nanos delay = static_cast<Nanos>(sim_.prng_.below(20)) * kMillisecond;
    if (faulty()) delay *= 100;
    if (faulty() && faulty()) delay = 3600 * kSecond;
    ops_[id] = {std::move(op), sim_.now_ + delay};
  }

  static std::vector<std::byte> gather(const remote::PutOp& op) {
    std::vector<std::byte> bytes;
    for (const auto part : op.parts) bytes.insert(bytes.end(), part.begin(), part.end());
    return bytes;
  }
  Ended carry_out(OpId id, const remote::PutOp& op) {
    if (faulty()) return {id, StoreOutcome::kDone, {}, {}, {}};  // it says so
    auto& object = sim_.bucket_[op.path] = gather(op);
    if (faulty()) object.resize(sim_.prng_.below(object.size()));
    return {id, StoreOutcome::kDone, {}, {}, {}};
  }
  Ended carry_out(OpId id, const remote::GetOp& op) {
    const auto found = sim_.bucket_.find(op.path);
    if (found == sim_.bucket_.end()) return {id, StoreOutcome::kMissing, "gone", {}, {}};
    std::uint64_t at = op.offset;
    for (const auto part : op.parts) {
      if (at + part.size() > found->second.size()) return {id, StoreOutcome::kShort, "short", {}, {}};
      std::memcpy(part.data(), found->second.data() + at, part.size());
      at += part.size();
    }
    if (faulty()) op.parts[sim_.prng_.below(op.parts.size())][0] ^= std::byte{1};
    return {id, StoreOutcome::kDone, {}, {}, {}};
  }
  Ended carry_out(OpId id, const remote::ListOp& op) {
    Ended ended{id, StoreOutcome::kDone, {}, {}, {}};
    for (auto at = sim_.bucket_.upper_bound(std::max(op.folder, op.from)); at != sim_.bucket_.end(); ++at) {
      if (!at->first.starts_with(op.folder)) break;
      if (ended.objects.size() == 5) {
        ended.next = ended.objects.back().path;
        break;
      }
      ended.objects.push_back({at->first, at->second.size()});
    }
    return ended;
  }

  RemoteSim& sim_;
  std::map<OpId, Op> ops_;
};

// ---- a node --------------------------------------------------------------------------------------------------------

class RemoteSim::Node final : public remote::RemoteSink {
 public:
  Node(RemoteSim& sim, std::uint64_t number)
      : sim_(sim), number_(number), store_(sim), engine_(options(number), store_, *this) {
    for (const auto& space : kSpaces) engine_.open_space(space, kSlotBytes, sim.now_);
    engine_.on_time(sim.now_);
  }
  ~Node() override {
    const auto stats = engine_.stats();
    for (std::size_t i = 0; i < stats.faults.size(); ++i) sim_.totals_.faults[i] += stats.faults[i];
    sim_.totals_.switched_off += times_off_;
    sim_.totals_.blocks_written += stats.written_blocks;
  }

  Nanos next_time() const {
    return std::min(store_.next_time(), engine_.next_time().value_or(std::numeric_limits<Nanos>::max()));
  }
  void step() {
    std::vector<Ended> ended;
    store_.take(ended);
    engine_.take(ended, sim_.now_);
    engine_.on_time(sim_.now_);
    const bool off = !engine_.stats().reads_off.empty();
    times_off_ += off && !off_;
    off_ = off;
    EXPECT_TRUE(!off || contains(0, 0, 1) == 0);
    for (const auto& [id, request] : requests_) EXPECT_GT(request.deadline, sim_.now_) << "request " << id;
  }

  RequestId write(std::size_t space, std::uint64_t chain, std::uint64_t blocks, Nanos within) {
    const RequestId id = ++last_id_;
    Request& request = requests_[id];
    request.deadline = sim_.now_ + within;
    remote::WriteRequest asked{id, kSpaces[space], kSlotBytes, {}, {}, request.deadline};
    for (std::uint64_t i = 0; i < blocks; ++i) {
      asked.blocks.push_back({key_of(chain, i), i == 0 ? remote::kNoParent : key_of(chain, i - 1)});
      request.memory.push_back(bytes_of(space, key_of(chain, i), number_));
    }
    asked.buffers.assign(request.memory.begin(), request.memory.end());
    engine_.write(std::move(asked), sim_.now_);
    return id;
  }
  RequestId read(std::size_t space, std::uint64_t chain, std::uint64_t blocks, Nanos within) {
    const RequestId id = ++last_id_;
    Request& request = requests_[id];
    request.deadline = sim_.now_ + within;
    request.space = space;
    request.keys = chain_keys(chain, blocks);
    request.memory.assign(blocks, std::vector<std::byte>(kSlotBytes));
    remote::ReadRequest asked{id, kSpaces[space], kSlotBytes, request.keys, {}, request.deadline};
    asked.buffers.assign(request.memory.begin(), request.memory.end());
    engine_.read(std::move(asked), sim_.now_);
    return id;
  }
  void cancel_one() {
    if (!requests_.empty()) engine_.cancel(requests_.begin()->first);
  }
  std::size_t contains(std::size_t space, std::uint64_t chain, std::uint64_t blocks) const {
    return engine_.contains(kSpaces[space], chain_keys(chain, blocks));
  }
  Outcome outcome(RequestId id) const {
    const auto found = outcomes_.find(id);
    return found == outcomes_.end() ? Outcome::kBusy : found->second;
  }

  void on_block(RequestId id, std::uint32_t index) override {
    Request& request = requests_.at(id);
    EXPECT_EQ(index, request.next++);
    ++sim_.totals_.blocks_read;
    bool written = false;
    for (std::uint64_t node = 0; node < sim_.nodes_.size(); ++node) {
      written |= request.memory[index] == bytes_of(request.space, request.keys[index], node);
    }
    EXPECT_TRUE(written) << "wrong bytes";
  }
  void on_end(RequestId id, Outcome outcome) override {
    const Request& request = requests_.at(id);
    EXPECT_EQ(outcome == Outcome::kDone, request.next == request.keys.size());
    ++sim_.totals_.reads[static_cast<std::size_t>(outcome)];
    end(id, outcome);
  }
  void on_written(RequestId id, Outcome outcome) override {
    ++sim_.totals_.writes[static_cast<std::size_t>(outcome)];
    end(id, outcome);
  }

 private:
  struct Request {
    Nanos deadline = 0;
    std::size_t space = 0;
    std::vector<key::BlockKey> keys;
    std::vector<std::vector<std::byte>> memory;
    std::size_t next = 0;
  };

  static remote::EngineOptions options(std::uint64_t number) {
    remote::EngineOptions options;
    options.object_bytes = 5 * (kSlotBytes + remote::kHeadBytes);
    options.scan_every = 10 * kSecond;
    options.seed = number;
    return options;
  }
  static std::vector<key::BlockKey> chain_keys(std::uint64_t chain, std::uint64_t blocks) {
    std::vector<key::BlockKey> keys;
    for (std::uint64_t i = 0; i < blocks; ++i) keys.push_back(key_of(chain, i));
    return keys;
  }
  void end(RequestId id, Outcome outcome) {
    EXPECT_EQ(requests_.erase(id), 1U) << "ended twice";  // and its memory is freed
    outcomes_[id] = outcome;
  }

  RemoteSim& sim_;
  const std::uint64_t number_;
  SimStore store_;
  std::map<RequestId, Request> requests_;
  std::map<RequestId, Outcome> outcomes_;
  RequestId last_id_ = 0;
  bool off_ = false;
  std::uint64_t times_off_ = 0;
  remote::Engine engine_;  // ends what is left, when it goes
};

// ---- the world -----------------------------------------------------------------------------------------------------

RemoteSim::RemoteSim(std::uint64_t seed, RemoteSimTotals& totals) : prng_(Prng::mix(seed)), totals_(totals) {
  for (std::uint64_t number = 0; number < 2; ++number) nodes_.push_back(std::make_unique<Node>(*this, number));
}

RemoteSim::~RemoteSim() { nodes_.clear(); }

void RemoteSim::run() {
  fault_percent_ = static_cast<unsigned>(prng_.below(4)) * 8;
  run_until(now_ + kFaultyTime, true);
  fault_percent_ = 0;
  run_until(now_ + kHealingTime, false);
  check_convergence();
}

void RemoteSim::run_until(Nanos end, bool with_requests) {
  Nanos act_at = now_;
  for (const auto& node : nodes_) node->step();
  while (now_ < end) {
    Nanos next = std::min(end, with_requests ? act_at : end);
    for (const auto& node : nodes_) next = std::min(next, node->next_time());
    now_ = std::max(now_, next);
    for (const auto& node : nodes_) node->step();
    if (!with_requests || now_ < act_at) continue;
    act_at = now_ + static_cast<Nanos>(prng_.below(400)) * kMillisecond;
    Node& node = *nodes_[prng_.below(nodes_.size())];
    const std::size_t space = prng_.below(std::size(kSpaces));
    const std::uint64_t chain = prng_.below(kChains);
    const std::uint64_t blocks = 1 + prng_.below(kChainBlocks);
    const Nanos within = static_cast<Nanos>(1 + prng_.below(5000)) * kMillisecond;
    const std::uint64_t choice = prng_.below(100);
    if (choice < 35) {
      node.write(space, chain, blocks, within);
    } else if (choice < 85) {
      node.read(space, chain, blocks, within);
    } else if (choice < 92) {
      node.cancel_one();
    } else if (prng_.chance(fault_percent_ * 2)) {
      damage();
    } else {
      std::unique_ptr<Node>& dies = nodes_[prng_.below(nodes_.size())];
      const auto number = static_cast<std::uint64_t>(&dies - nodes_.data());
      dies.reset();
      dies = std::make_unique<Node>(*this, number);
    }
    for (const auto& one : nodes_) one->step();
  }
}

void RemoteSim::damage() {
  if (bucket_.size() < 2) return;
  const auto any = [&] { return std::next(bucket_.begin(), static_cast<std::ptrdiff_t>(prng_.below(bucket_.size()))); };
  const auto object = any();
  switch (prng_.below(4)) {
    case 0:
      bucket_.erase(object);
      break;
    case 1:
      object->second.resize(prng_.below(object->second.size() + 1));
      break;
    case 2:
      if (!object->second.empty()) object->second[prng_.below(object->second.size())] ^= std::byte{4};
      break;
    default:
      std::swap(object->second, any()->second);
  }
}

void RemoteSim::check_convergence() {
  std::vector<RequestId> writes;
  for (std::uint64_t chain = 0; chain < kChains; ++chain) {
    writes.push_back(nodes_[0]->write(0, chain, kChainBlocks, 5 * kSecond));
  }
  run_until(now_ + 40 * kSecond, false);
  for (const RequestId id : writes) EXPECT_EQ(nodes_[0]->outcome(id), Outcome::kDone);
  // What nobody has read since it was damaged is noticed now, and written again.
  for (int round = 0; round < 8; ++round) {
    for (const auto& node : nodes_) {
      for (std::uint64_t chain = 0; chain < kChains; ++chain) node->read(0, chain, kChainBlocks, 5 * kSecond);
    }
    run_until(now_ + 6 * kSecond, false);
    for (const auto& node : nodes_) {
      for (std::uint64_t chain = 0; chain < kChains; ++chain) node->write(0, chain, kChainBlocks, 5 * kSecond);
    }
    run_until(now_ + 26 * kSecond, false);
  }
  for (const auto& node : nodes_) {
    for (std::uint64_t chain = 0; chain < kChains; ++chain) {
      EXPECT_EQ(node->contains(0, chain, kChainBlocks), kChainBlocks) << "chain " << chain;
      const RequestId id = node->read(0, chain, kChainBlocks, 5 * kSecond);
      run_until(now_ + 6 * kSecond, false);
      EXPECT_EQ(node->outcome(id), Outcome::kDone) << "chain " << chain;
    }
  }
}

}  // namespace flexkv::testing
