// An engine that behaves like vLLM with our adapter (integration/vllm/scheduler.py): a scheduler with chunked prefill,
// decode, preemption and prefix caching over a small block pool, a real client::Client, and its ranks.
//
// Its forwards compute KV from KV: a block computed behind anything but the right blocks is garbage, and stays garbage
// for all that follows; what the engine accepts as a result is checked. Owned by one thread; held by shared_ptr.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "flexkv/client/client.h"
#include "flexkv/testing/sim_blocks.h"
#include "flexkv/testing/sim_port.h"
#include "flexkv/testing/sim_rank.h"

namespace flexkv::testing {

class SimEngine : public std::enable_shared_from_this<SimEngine> {
 public:
  SimEngine(SimWorld& world, std::uint32_t kind, std::uint64_t id);
  ~SimEngine();

  void start();
  // The scheduler's process and all ranks die, in any order.
  void die();
  bool dead() const { return dead_; }
  // No new requests from now on.
  void drain() { draining_ = true; }
  bool idle() const;

  // A request for a prompt of whole blocks, named by what is in them, and one token more. Its number.
  std::uint64_t submit(std::vector<std::uint32_t> chunks);
  // When the prompt was computed; 0: not yet.
  Nanos first_token_at(std::uint64_t request) const { return first_tokens_.at(request); }
  void forget_device_blocks() { blocks_.forget_all(); }

  // Faults.
  void lose_client_connection() { port_->lose_connection(); }
  void lose_agent_connection(std::uint64_t rank) { ranks_[rank % ranks_.size()]->lose_node(); }
  void kill_rank(std::uint64_t rank);
  void reset_cache();
  // Takes effect once nothing runs; the blocks computed before must not be served afterwards, nor this engine's new
  // ones to others, which go on with the weights as stored, as does this engine after a restart.
  void change_weights() { weights_pending_ = true; }

 private:
  struct Request {
    std::uint64_t id = 0;
    std::vector<std::uint32_t> chunks;  // per block: which tokens
    std::vector<std::uint64_t> tags;    // per block: what its KV must be
    std::vector<std::array<std::byte, 16>> hashes;
    std::uint32_t tokens = 0;  // known: the prompt and what was generated
    std::uint32_t tokens_end = 0;
    std::uint32_t computed = 0;
    std::uint32_t version = 0;  // steps scheduled for an older one are void
    enum class State { kWaiting, kLoading, kRunning, kEnded } state = State::kWaiting;
    std::vector<std::uint32_t> blocks;
    proto::JobId load = 0;  // asynchronous
    std::size_t load_reports = 0;
    std::uint32_t load_good = 0;  // leading blocks that every rank has
    // What the adapter tracks.
    bool tracked = false;
    client::SequenceId sequence = 0;
    std::uint32_t local_blocks = 0;
    std::uint32_t loads = 0;
    std::uint32_t offered = 0;
    bool load_async = false;
  };
  using RequestPtr = std::shared_ptr<Request>;
  struct Scheduled {
    RequestPtr request;
    std::uint32_t version = 0;
    std::uint32_t computed = 0;  // before the step
    std::uint32_t count = 0;     // tokens
    std::vector<std::uint32_t> blocks;
    std::vector<std::uint64_t> tags;
    std::vector<std::uint32_t> new_blocks;
    bool whole_table = false;
    bool poisoned = false;
  };
  struct Step {
    std::shared_ptr<StepOrders> orders;
    std::vector<Scheduled> work;
    std::size_t ranks_ready = 0;
    std::size_t ranks_done = 0;
    std::set<std::uint32_t> bad_blocks;
    bool load_failed = false;
    Nanos begun = 0;
    std::uint32_t tokens = 0;
    double pairs = 0;  // of a token and one it attends to
  };

  void later(Nanos delay, std::function<void(SimEngine&)> action);
  void tick();
  // sim_engine.cc: the scheduler
  void add_request();
  void name_blocks(Request& request) const;
  void prefetch(Request& request);
  void schedule();
  void schedule_running(Step& step, std::uint32_t& budget);
  void schedule_waiting(Step& step, std::uint32_t& budget);
  bool admit(const RequestPtr& request, Step& step, std::uint32_t& budget);
  bool make_room(std::size_t blocks, const RequestPtr& keep);
  bool take_from_waiting(const RequestPtr& end);
  void add_work(Step& step, const RequestPtr& request, std::uint32_t count, std::size_t old_blocks, bool whole);
  void preempt(const RequestPtr& request);
  void free_blocks(Request& request);
  void abort_some();
  void end_request(const RequestPtr& request);
  void take_new_weights();
  // sim_adapter.cc: what the connector does
  std::uint32_t find_external(Request& request, std::uint32_t local_blocks);
  void order_load(Request& request, std::uint32_t count);
  void cancel_some(proto::JobId job);
  void build_orders(Step& step);
  void order_save(Step& step, const Scheduled& work);
  void add_readers(std::span<const std::uint32_t> blocks, std::set<proto::JobId>& saves) const;
  void forget_save(proto::JobId job);
  void track(Request& request);
  std::vector<std::span<const std::byte>> hashes_of(const Request& request, std::uint32_t first) const;
  // sim_forward.cc: the model
  void rank_ready(std::uint64_t number);
  void begin_forward(std::uint64_t number);
  void end_forward(std::uint64_t number);
  void compute(Scheduled& work);
  void fill(std::uint32_t block, std::uint64_t tag);
  bool holds(std::uint32_t block, std::uint64_t tag) const;
  void rank_done(std::uint64_t number, const StepReport& report);
  void finish_step(Step& step);
  void finish_load(Request& request);
  void count_load(std::size_t good, std::size_t blocks);
  void accept(Scheduled& work, const Step& step);

  SimWorld& world_;
  SimLoop& loop_;
  const SimPlan& plan_;
  const std::uint32_t kind_;
  const std::uint64_t id_;
  SimPort* port_ = nullptr;  // owned by client_
  std::unique_ptr<client::Client> client_;
  std::vector<std::shared_ptr<SimRank>> ranks_;
  SimBlocks blocks_;
  std::uint64_t weights_ = 0;  // as stored
  bool weights_pending_ = false;
  bool draining_ = false;
  bool dead_ = false;

  std::deque<RequestPtr> waiting_;
  std::vector<RequestPtr> running_;
  std::map<std::uint64_t, RequestPtr> requests_;  // all that are not forgotten
  std::map<proto::JobId, RequestPtr> loads_;      // asynchronous, not reported by all ranks
  std::vector<std::shared_ptr<LoadOrder>> new_loads_;
  std::map<std::uint32_t, std::set<proto::JobId>> saves_by_block_;  // a block that is shared may be read by several
  std::map<proto::JobId, std::vector<std::uint32_t>> blocks_by_save_;
  std::map<std::uint64_t, Step> steps_;  // in flight
  std::uint64_t next_step_ = 1;
  std::uint64_t next_request_ = 1;
  std::map<std::uint64_t, Nanos> first_tokens_;  // of submitted requests
};

}  // namespace flexkv::testing
