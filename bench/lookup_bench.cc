// Lookups of whole prompts of 512 blocks in the node's core: without drives, with all of the prompt in host memory, and
// with a half or all of it on drives, where the node also chooses what to load. `fetches`: blocks of another prompt
// that are on their way from drives meanwhile.
#include <benchmark/benchmark.h>

#include <algorithm>

#include "bench/suites.h"
#include "flexkv/base/assert.h"
#include "flexkv/node/node.h"

namespace flexkv::bench {
namespace {

using proto::JobStatus;
using proto::Reason;

constexpr std::uint32_t kPrompts = 256;
constexpr std::uint32_t kDrives = 2;

// Takes all reads, and ends them when told to.
class Drives final : public node::DiskPort {
 public:
  unsigned drive_count() const override { return kDrives; }
  void open_space(node::SpaceNumber number, const node::SpaceName&, std::uint64_t) override { space = number; }
  void close_space(node::SpaceNumber) override {}
  void reset_space(node::SpaceNumber) override {}
  void reset_closed_spaces(const std::optional<node::ModelName>&) override {}
  node::DiskAdmission write(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  node::DiskAdmission read(const node::DiskTransfer& transfer) override {
    reads.push_back({transfer.op, node::DiskOutcome::kDone});
    return node::DiskAdmission::kQueued;
  }
  node::DiskAdmission verify(const node::DiskTransfer&) override { return node::DiskAdmission::kUnavailable; }
  void cancel(node::DiskOp) override {}
  bool can_read(unsigned) const override { return true; }
  double write_pressure() const override { return 0; }

  node::SpaceNumber space = 0;
  std::vector<node::DiskResult> reads;
};

class Silence final : public node::Outbox {
 public:
  bool send(node::AgentHandle, const proto::ToAgent&) override { return true; }
  void send(node::EngineHandle, const proto::JobResult&) override {}
};

// A node with prompts [0, kPrompts), on drives or, without any, in host memory.
class LoadedNode {
 public:
  explicit LoadedNode(bool with_drives) {
    node::NodeOptions options;
    options.pool_bytes = std::uint64_t{kPrompts + 8} * kConversationBlocks * 4096;
    options.load_timeout = options.save_timeout = 1'000'000 * kSecond;
    node_ = std::make_unique<node::Node>(options, silence_, with_drives ? &drives_ : nullptr);
    proto::AgentHello rank;
    rank.engine_id = "engine";
    rank.shard_bytes = 4096;
    agent_ = node_->attach_agent(rank).value();
    proto::ClientHello client;
    client.engine_id = "engine";
    client.block_tokens = 16;
    engine_ = node_->attach_client(client).value();
    for (std::uint32_t prompt = 0; prompt < kPrompts; ++prompt) {
      prompts_.push_back(conversation_keys(kFlat512, prompt));
      with_drives ? recover(prompt) : save(prompt);
    }
    if (!with_drives) return;
    const std::uint32_t slots[] = {kPrompts * kConversationBlocks, kPrompts * kConversationBlocks};
    node_->on_disk_opened(drives_.space, slots, now_);
    // What is on drives is worth loading.
    node_->set_prefill(engine_, {1e6, 1e6, 1, 8192});
  }

  node::Node& node() { return *node_; }
  node::EngineHandle engine() const { return engine_; }
  const Keys& prompt(std::uint32_t number) const { return prompts_.at(number); }
  Nanos tick() { return now_ += kMicrosecond; }

  // The first blocks of the prompt, into host memory; `whole`: or they stay on their way.
  void load(std::uint32_t prompt, std::uint32_t blocks, bool whole = true) {
    const node::Node::Lookup found = node_->lookup(engine_, kOwnSequence, 0, prompts_.at(prompt), tick());
    FLEXKV_ASSERT(found.matched_blocks == kConversationBlocks);
    const proto::JobId job = next_job_++;
    const Reason refused = node_->load(
        engine_, {false, true, kOwnSequence, job, 0, prompts_.at(prompt), 0, std::vector<std::uint32_t>(blocks)},
        tick());
    FLEXKV_ASSERT(refused == Reason::kNone);
    node_->close_sequence(engine_, kOwnSequence);
    if (!whole) return;
    now_ += blocks * 100 * kMicrosecond;
    while (!drives_.reads.empty()) node_->on_disk_done(std::exchange(drives_.reads, {}), tick());
    node_->on_report(agent_, {job, JobStatus::kDone, blocks}, tick());
  }

 private:
  static constexpr proto::SequenceId kOwnSequence = 1;

  void save(std::uint32_t prompt) {
    const proto::JobId job = next_job_++;
    const Reason refused = node_->save(
        engine_,
        {true, true, kOwnSequence, job, 0, prompts_[prompt], 0, std::vector<std::uint32_t>(kConversationBlocks)},
        tick());
    FLEXKV_ASSERT(refused == Reason::kNone);
    node_->on_report(agent_, {job, JobStatus::kDone, 0}, tick());
    node_->close_sequence(engine_, kOwnSequence);
  }
  void recover(std::uint32_t prompt) {
    std::vector<index::Slot> slots;
    for (std::uint32_t i = 0; i < kConversationBlocks; ++i) slots.push_back(prompt * kConversationBlocks + i);
    const node::RecoveredChain chain{{}, prompts_[prompt], slots};
    node_->on_disk_recovered(drives_.space, {&chain, 1}, tick());
  }

  Silence silence_;
  Drives drives_;
  std::unique_ptr<node::Node> node_;
  node::AgentHandle agent_ = 0;
  node::EngineHandle engine_ = 0;
  std::vector<Keys> prompts_;
  proto::JobId next_job_ = 1;
  Nanos now_ = kSecond;
};

// `in_host`: leading blocks of each prompt that host memory has as well.
// `again`: of a prompt that was looked up before, as the scheduler does as long as a request waits.
void bm_lookup(benchmark::State& state, bool with_drives, std::uint32_t in_host, std::uint32_t fetches, bool again) {
  LoadedNode loaded(with_drives);
  constexpr std::uint32_t kAsked = 64;  // others than those that are on their way
  if (with_drives) {
    loaded.load(kPrompts - 1, 16);  // so that it knows how fast drives read
    for (std::uint32_t prompt = 0; in_host > 0 && prompt < kAsked; ++prompt) loaded.load(prompt, in_host);
    if (fetches > 0) loaded.load(kPrompts - 2, fetches, false);
  }
  proto::SequenceId sequence = 100;
  const Keys none;
  if (again) (void)loaded.node().lookup(loaded.engine(), sequence, 0, loaded.prompt(0), loaded.tick());
  for (auto _ : state) {
    const Keys& keys = again ? none : loaded.prompt(static_cast<std::uint32_t>(sequence % kAsked));
    const std::uint32_t base = again ? kConversationBlocks : 0;
    const auto found = loaded.node().lookup(loaded.engine(), sequence, base, keys, loaded.tick());
    if (!again) loaded.node().close_sequence(loaded.engine(), sequence++);
    const std::uint32_t on_drives = with_drives ? kConversationBlocks - in_host : 0;
    if (found.matched_blocks != kConversationBlocks || found.disk_blocks != on_drives) {
      state.SkipWithError("wrong match");
    }
  }
}

}  // namespace

void register_lookups() {
  for (const bool again : {false, true}) {
    const auto add = [again](const char* where, bool with_drives, std::uint32_t in_host, std::uint32_t fetches) {
      const std::string name = std::string(again ? "lookup512/again/" : "lookup512/first/") + where;
      benchmark::RegisterBenchmark(name.c_str(),
                                   [=](auto& state) { bm_lookup(state, with_drives, in_host, fetches, again); });
    };
    add("no_drives", false, kConversationBlocks, 0);
    add("drives/all_in_host", true, kConversationBlocks, 0);
    add("drives/half_in_host", true, kConversationBlocks / 2, 0);
    add("drives/none_in_host", true, 0, 0);
    add("drives/none_in_host/fetches:512", true, 0, kConversationBlocks);
  }
}

}  // namespace flexkv::bench
