#include "flexkv/peer/nixl_reads.h"

#include <algorithm>
#include <chrono>
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
  std::optional<Transfer> transfer;
};

Result<std::unique_ptr<NixlReads>> NixlReads::start(const std::string& library, const std::string& node,
                                                    std::span<std::byte> pool) {
  const auto loaded = net::NixlLibrary::load(library);
  if (!loaded.ok()) return loaded.error();
  auto agent = net::NixlAgent::create(loaded.value(), node);
  if (!agent.ok()) return agent.error();
  auto made = Landing::create();
  if (!made.ok()) return made.error();
  const std::shared_ptr<Landing> landing = std::move(made).value();

  std::unique_ptr<NixlReads> reads(new NixlReads(std::move(agent).value(), landing, pool));
  // What is there to be read comes first: others are told of all that is registered by then, and of nothing else.
  for (const auto part : {pool, std::as_writable_bytes(std::span(reads->words_memory_))}) {
    if (const Status done = reads->agent_->register_memory(part); !done.ok()) return done.error();
  }
  auto metadata = reads->agent_->metadata();
  if (!metadata.ok()) return metadata.error();
  if (metadata.value().size() > kMetadataBytesMax) {  // a reader would refuse all of the hello
    return Error{ErrorCode::kUnsupported, "NIXL's metadata takes " + std::to_string(metadata.value().size()) +
                                              " bytes, more than the " + std::to_string(kMetadataBytesMax) + " told"};
  }
  if (const Status done = reads->agent_->register_memory({landing->memory().data(), landing->memory().bytes()});
      !done.ok())
    return done.error();
  Window window;
  window.transport = Transport::kNixl;
  window.metadata = std::move(metadata).value();
  window.pool = reinterpret_cast<std::uintptr_t>(pool.data());
  window.pool_bytes = pool.size();
  window.words = reinterpret_cast<std::uintptr_t>(reads->words_memory_.data());
  window.word_count = kLeasesByThemselves;
  reads->window_ = std::make_shared<const Window>(std::move(window));
  reads->thread_ = start_thread([raw = reads.get()] { raw->run(); });
  return reads;
}

NixlReads::NixlReads(std::unique_ptr<net::NixlAgent> agent, std::shared_ptr<Landing> landing,
                     std::span<const std::byte> pool)
    : pool_(pool), landing_(std::move(landing)), agent_(std::move(agent)) {}

NixlReads::~NixlReads() {
  if (thread_.joinable()) {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  under_way_.clear();
  agent_.reset();  // before the memory that NIXL knows
}

bool NixlReads::fetch(const std::string& owner, const Window& window, const Piece& piece,
                      std::function<void(Fetched)> done) {
  const auto landing = landing_->take();
  if (!landing) return false;
  auto order = std::make_unique<Order>(Order{owner, window, piece, std::move(done), *landing, false, {}});
  {
    const std::lock_guard lock(mutex_);
    ordered_.push_back(std::move(order));
  }
  changed_.notify_one();
  return true;
}

void NixlReads::forget(const std::string& owner) {
  auto order = std::make_unique<Order>();
  order->owner = owner;
  {
    const std::lock_guard lock(mutex_);
    ordered_.push_back(std::move(order));
  }
  changed_.notify_one();
}

void NixlReads::run() {
  Nanos pause = kLookMin;
  while (true) {
    std::vector<std::unique_ptr<Order>> ordered;
    {
      std::unique_lock lock(mutex_);
      const auto wanted = [&] { return stop_ || !ordered_.empty(); };
      if (under_way_.empty()) {
        changed_.wait(lock, wanted);
      } else {
        changed_.wait_for(lock, std::chrono::nanoseconds(pause), wanted);
      }
      if (stop_) return;
      ordered.swap(ordered_);
    }
    for (auto& order : ordered) begin(std::move(order));
    const std::size_t ended = std::erase_if(under_way_, [&](auto& order) { return !look(*order); });
    pause = ended > 0 || !ordered.empty() ? kLookMin : std::min(pause * 2, kLookMax);
  }
}

void NixlReads::begin(std::unique_ptr<Order> order) {
  if (!order->done) {
    if (const auto owner = owners_.find(order->owner); owner != owners_.end()) owner->second.gone = true;
    drop_if_gone(order->owner);
    return;
  }
  Owner& owner = owners_[order->owner];
  ++owner.under_way;
  if (owner.gone) return finish(*order, false);  // what it was known by is not free yet
  if (!owner.known) {
    const Status added = agent_->add(order->owner, order->window.metadata);
    if (!added.ok()) {
      log_warning("one-sided reads: " + added.error().message + "; its blocks come as bytes");
      owner.gone = true;
      return finish(*order, false);
    }
    owner.known = true;
  }
  auto transfer =
      agent_->read(order->owner, order->piece.address, landing_->bytes(order->landing).first(order->piece.bytes));
  if (!transfer.ok()) return finish(*order, false);
  order->transfer.emplace(std::move(transfer).value());
  under_way_.push_back(std::move(order));
}

bool NixlReads::look(Order& order) {
  using Progress = net::NixlAgent::Progress;
  Progress progress = order.transfer->poll();
  if (progress == Progress::kDone && !order.reading_word) {
    order.transfer.reset();
    auto word = agent_->read(order.owner, order.piece.word_address, landing_->word(order.landing));
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

void NixlReads::finish(Order& order, bool ok) {
  order.transfer.reset();
  std::exchange(order.done, nullptr)(Landing::fetched(landing_, order.landing, order.piece.bytes, ok));
  --owners_.at(order.owner).under_way;
  drop_if_gone(order.owner);
}

// Not before its reads have ended: NIXL's state of them would go with it.
void NixlReads::drop_if_gone(const std::string& name) {
  const auto owner = owners_.find(name);
  if (owner == owners_.end() || !owner->second.gone || owner->second.under_way > 0) return;
  if (owner->second.known) agent_->forget(name);
  owners_.erase(owner);
}

}  // namespace flexkv::peer
