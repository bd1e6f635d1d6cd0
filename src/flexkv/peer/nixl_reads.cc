#include "flexkv/peer/nixl_reads.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <utility>

#include "flexkv/base/log.h"
#include "flexkv/base/thread.h"
#include "flexkv/peer/messages.h"

namespace flexkv::peer {

struct NixlReads::Order {
  std::string owner;
  Window window;
  Piece piece;
  std::function<void(Fetched)> done;  // null: the owner is to be forgotten
  std::size_t landing = 0;
  bool reading_word = false;  // the bytes are there
  std::optional<net::NixlAgent::Transfer> transfer;
};

struct NixlReads::Core {
  Core(std::unique_ptr<net::NixlAgent> made, std::shared_ptr<Landing> memory)
      : landing(std::move(memory)), agent(std::move(made)) {}

  void run();
  void begin(std::unique_ptr<Order> order);
  bool look(Order& order);  // false: it has ended
  void finish(Order& order, bool ok);
  void drop_if_gone(const std::string& name);
  bool stopping() {
    const std::lock_guard lock(mutex);
    return stop;
  }

  const std::shared_ptr<Landing> landing;
  std::vector<std::uint64_t> words_memory = std::vector<std::uint64_t>(kLeasesByThemselves);
  LeaseWords words{words_memory};

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::unique_ptr<Order>> ordered;
  bool stop = false;
  bool ended = false;  // the thread will call nobody any more

  // The thread's own. In this order: NIXL goes before the memory that it knows, and reads go before NIXL.
  struct Owner {
    bool known = false;  // to NIXL
    bool gone = false;
    std::size_t under_way = 0;
  };
  std::map<std::string, Owner> owners;
  std::unique_ptr<net::NixlAgent> agent;
  std::vector<std::unique_ptr<Order>> under_way;
};

Result<std::unique_ptr<NixlReads>> NixlReads::start(const std::string& library, const std::string& node,
                                                    std::span<std::byte> pool) {
  const auto loaded = net::NixlLibrary::load(library);
  if (!loaded.ok()) return loaded.error();
  return start(loaded.value(), node, pool);
}

Result<std::unique_ptr<NixlReads>> NixlReads::start(const net::NixlLibrary& library, const std::string& node,
                                                    std::span<std::byte> pool) {
  auto agent = net::NixlAgent::create(library, node);
  if (!agent.ok()) return agent.error();
  auto made = Landing::create();
  if (!made.ok()) return made.error();
  const std::shared_ptr<Landing> landing = std::move(made).value();

  const auto core = std::make_shared<Core>(std::move(agent).value(), landing);
  std::unique_ptr<NixlReads> reads(new NixlReads(pool, core));
  // What is there to be read comes first: others are told of all that is registered by then, and of nothing else.
  for (const auto part : {pool, std::as_writable_bytes(std::span(core->words_memory))}) {
    if (const Status done = core->agent->register_memory(part); !done.ok()) return done.error();
  }
  auto metadata = core->agent->metadata();
  if (!metadata.ok()) return metadata.error();
  if (metadata.value().size() > kMetadataBytesMax) {  // a reader would refuse all of the hello
    return Error{ErrorCode::kUnsupported, "NIXL's metadata takes " + std::to_string(metadata.value().size()) +
                                              " bytes, more than the " + std::to_string(kMetadataBytesMax) + " told"};
  }
  const std::span<std::byte> landing_bytes(landing->memory().data(), landing->memory().bytes());
  if (const Status done = core->agent->register_memory(landing_bytes); !done.ok()) return done.error();
  Window window;
  window.transport = Transport::kNixl;
  window.metadata = std::move(metadata).value();
  window.pool = reinterpret_cast<std::uintptr_t>(pool.data());
  window.pool_bytes = pool.size();
  window.words = reinterpret_cast<std::uintptr_t>(core->words_memory.data());
  window.word_count = kLeasesByThemselves;
  reads->window_ = std::make_shared<const Window>(std::move(window));
  start_thread([core] { core->run(); }).detach();
  reads->running_ = true;
  return reads;
}

bool NixlReads::end() {
  if (!std::exchange(running_, false)) return !left_behind_;
  std::unique_lock lock(core_->mutex);
  core_->stop = true;
  core_->changed.notify_all();
  left_behind_ = !core_->changed.wait_for(lock, std::chrono::nanoseconds(kNixlPatience), [&] { return core_->ended; });
  if (left_behind_) log_warning("one-sided reads: a call of NIXL's does not return; it is left behind with its memory");
  return !left_behind_;
}

LeaseWords& NixlReads::words() { return core_->words; }

void NixlReads::post(std::unique_ptr<Order> order) {
  {
    const std::lock_guard lock(core_->mutex);
    core_->ordered.push_back(std::move(order));
  }
  core_->changed.notify_all();
}

bool NixlReads::fetch(const std::string& owner, const Window& window, const Piece& piece,
                      std::function<void(Fetched)> done) {
  const auto landing = core_->landing->take();
  if (!landing) return false;
  post(std::make_unique<Order>(Order{owner, window, piece, std::move(done), *landing, false, {}}));
  return true;
}

void NixlReads::forget(const std::string& owner) {
  auto order = std::make_unique<Order>();
  order->owner = owner;
  post(std::move(order));
}

void NixlReads::Core::run() {
  Nanos pause = kLookMin;
  while (true) {
    std::vector<std::unique_ptr<Order>> orders;
    {
      std::unique_lock lock(mutex);
      const auto wanted = [&] { return stop || !ordered.empty(); };
      if (under_way.empty()) {
        changed.wait(lock, wanted);
      } else {
        changed.wait_for(lock, std::chrono::nanoseconds(pause), wanted);
      }
      if (stop) break;
      orders.swap(ordered);
    }
    for (auto& order : orders) begin(std::move(order));
    const std::size_t ended_now = std::erase_if(under_way, [&](auto& order) { return !look(*order); });
    pause = ended_now > 0 || !orders.empty() ? kLookMin : std::min(pause * 2, kLookMax);
  }
  under_way.clear();
  agent.reset();
  const std::lock_guard lock(mutex);
  ended = true;
  changed.notify_all();
}

void NixlReads::Core::begin(std::unique_ptr<Order> order) {
  if (!order->done) {
    if (const auto owner = owners.find(order->owner); owner != owners.end()) owner->second.gone = true;
    drop_if_gone(order->owner);
    return;
  }
  Owner& owner = owners[order->owner];
  ++owner.under_way;
  if (owner.gone) return finish(*order, false);  // what it was known by is not free yet
  if (!owner.known) {
    const Status added = agent->add(order->owner, order->window.metadata);
    if (!added.ok()) {
      log_warning("one-sided reads: " + added.error().message + "; its blocks come as bytes");
      owner.gone = true;
      return finish(*order, false);
    }
    owner.known = true;
  }
  auto transfer =
      agent->read(order->owner, order->piece.address, landing->bytes(order->landing).first(order->piece.bytes));
  if (!transfer.ok()) return finish(*order, false);
  order->transfer.emplace(std::move(transfer).value());
  under_way.push_back(std::move(order));
}

bool NixlReads::Core::look(Order& order) {
  using Progress = net::NixlAgent::Progress;
  Progress progress = order.transfer->poll();
  if (progress == Progress::kDone && !order.reading_word) {
    order.transfer.reset();
    auto word = agent->read(order.owner, order.piece.word_address, landing->word(order.landing));
    if (!word.ok()) {
      finish(order, false);
      return false;
    }
    order.reading_word = true;
    order.transfer.emplace(std::move(word).value());
    progress = order.transfer->poll();
  }
  if (progress == Progress::kUnderWay) return true;
  finish(order, progress == Progress::kDone);
  return false;
}

void NixlReads::Core::finish(Order& order, bool ok) {
  order.transfer.reset();
  Fetched fetched = Landing::fetched(landing, order.landing, order.piece.bytes, ok);
  const auto done = std::exchange(order.done, nullptr);
  if (!stopping()) done(std::move(fetched));
  --owners.at(order.owner).under_way;
  drop_if_gone(order.owner);
}

// Not before its reads have ended: NIXL's state of them would go with it.
void NixlReads::Core::drop_if_gone(const std::string& name) {
  const auto owner = owners.find(name);
  if (owner == owners.end() || !owner->second.gone || owner->second.under_way > 0) return;
  if (owner->second.known) agent->forget(name);
  owners.erase(owner);
}

}  // namespace flexkv::peer
