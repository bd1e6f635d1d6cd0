#include "flexkv/net/nixl_agent.h"

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <iterator>
#include <utility>

namespace flexkv::net {
namespace {

using Handle = NixlLibrary::Handle;
using Code = NixlLibrary::Code;

constexpr const char* kPlugin = "UCX";
// NIXL's thread wakes up for events, and so often without: with 0, its default, it takes a fourth of a core for
// nothing.
constexpr std::uint64_t kProgressDelayMicroseconds = 100'000;

Error failed(const std::string& what, Code code) {
  return {ErrorCode::kPeer, "NIXL: " + what + " failed with status " + std::to_string(code) + " (its log says why)"};
}

// One of NIXL's objects that live for one call.
class Scoped {
 public:
  explicit Scoped(Code (*destroy)(Handle)) : destroy_(destroy) {}
  ~Scoped() {
    if (handle_ != nullptr) destroy_(handle_);
  }
  Scoped(const Scoped&) = delete;
  Scoped& operator=(const Scoped&) = delete;
  Handle get() const { return handle_; }
  Handle* out() { return &handle_; }

 private:
  Code (*const destroy_)(Handle);
  Handle handle_ = nullptr;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A name within metadata: its length, then its characters.
std::vector<std::byte> as_told(const std::string& name) {
  const std::uint64_t size = name.size();
  const auto length = std::as_bytes(std::span(&size, 1));
  std::vector<std::byte> told(length.begin(), length.end());
  std::ranges::copy(std::as_bytes(std::span(name)), std::back_inserter(told));
  return told;
}

// UCX, when it is loaded, takes SIGHUP for a debugger of its own. It belongs to the process, which may end by it.
class KeepsSignal {
 public:
  KeepsSignal() { ::sigaction(SIGHUP, nullptr, &before_); }
  ~KeepsSignal() { ::sigaction(SIGHUP, &before_, nullptr); }

 private:
  struct sigaction before_ {};
};

}  // namespace

Result<std::unique_ptr<NixlAgent>> NixlAgent::create(const NixlLibrary& library, const std::string& name) {
  const KeepsSignal keeps;
  NixlLibrary::AgentConfig config{};
  config.progress_thread = true;
  config.thread_sync = NixlLibrary::kThreadSafe;
  config.workers = 1;
  config.progress_delay_microseconds = kProgressDelayMicroseconds;
  Handle handle = nullptr;
  if (const Code code = library.create_configured_agent(name.c_str(), &config, &handle); code != 0) {
    return failed("creating an agent", code);
  }
  std::unique_ptr<NixlAgent> agent(new NixlAgent(library, handle));
  Scoped memories(library.destroy_mem_list);
  Scoped params(library.destroy_params);
  if (const Code code = library.get_plugin_params(handle, kPlugin, memories.out(), params.out()); code != 0) {
    return failed("looking for its plugin UCX", code);
  }
  Scoped backend(library.destroy_backend);  // the handle only
  if (const Code code = library.create_backend(handle, kPlugin, params.get(), backend.out()); code != 0) {
    return failed("starting UCX", code);
  }
  if (const Status learned = agent->learn_beginning(name); !learned.ok()) return learned.error();
  return agent;
}

// Where metadata says whose it is, learned from this agent's own.
Status NixlAgent::learn_beginning(const std::string& name) {
  const auto own = metadata();
  if (!own.ok()) return own.error();
  const auto told = as_told(name);
  const auto found = std::search(own.value().begin(), own.value().end(), told.begin(), told.end());
  if (found == own.value().end()) {
    return Error{ErrorCode::kUnsupported, "NIXL's metadata does not begin as that of 1.5.1 does"};
  }
  beginning_.assign(own.value().begin(), found);
  return {};
}

NixlAgent::~NixlAgent() { nixl_.destroy_agent(agent_); }

Status NixlAgent::register_memory(std::span<std::byte> memory) {
  Scoped list(nixl_.destroy_reg_dlist);
  Code code = nixl_.create_reg_dlist(NixlLibrary::kHostMemory, list.out());
  if (code == 0) {
    code = nixl_.reg_dlist_add_desc(list.get(), reinterpret_cast<std::uintptr_t>(memory.data()), memory.size(), 0,
                                    nullptr, 0);
  }
  if (code == 0) code = nixl_.register_mem(agent_, list.get(), nullptr);
  if (code != 0) return failed("registering " + std::to_string(memory.size()) + " bytes of memory", code);
  return {};
}

Result<std::vector<std::byte>> NixlAgent::metadata() const {
  void* data = nullptr;
  std::size_t bytes = 0;
  if (const Code code = nixl_.get_local_md(agent_, &data, &bytes); code != 0) {
    return failed("describing this node's memory", code);
  }
  const std::unique_ptr<void, Free> owned(data);
  const auto* const first = static_cast<const std::byte*>(data);
  return std::vector<std::byte>(first, first + bytes);
}

Status NixlAgent::add(const std::string& name, std::span<const std::byte> metadata) {
  // Before NIXL sees it: what it knows of the other one would be overwritten, and forgotten below.
  auto expected = beginning_;
  std::ranges::copy(as_told(name), std::back_inserter(expected));
  if (metadata.size() < expected.size() || !std::ranges::equal(metadata.first(expected.size()), expected)) {
    return Error{ErrorCode::kPeer, "NIXL: node " + name + " gave the memory of another one"};
  }
  char* said = nullptr;
  const Code code = nixl_.load_remote_md(agent_, metadata.data(), metadata.size(), &said);
  if (code != 0) return failed("understanding the memory of node " + name, code);
  const std::unique_ptr<char, Free> owned(said);
  if (name != said) {
    nixl_.invalidate_remote_md(agent_, said);
    return Error{ErrorCode::kPeer, "NIXL: node " + name + " gave the memory of another one"};
  }
  return {};
}

void NixlAgent::forget(const std::string& name) { nixl_.invalidate_remote_md(agent_, name.c_str()); }

Result<NixlAgent::Transfer> NixlAgent::read(const std::string& name, std::uint64_t address,
                                            std::span<std::byte> into) const {
  Scoped local(nixl_.destroy_xfer_dlist);
  Scoped remote(nixl_.destroy_xfer_dlist);
  Code code = nixl_.create_xfer_dlist(NixlLibrary::kHostMemory, local.out());
  if (code == 0) code = nixl_.create_xfer_dlist(NixlLibrary::kHostMemory, remote.out());
  if (code == 0) {
    code = nixl_.xfer_dlist_add_desc(local.get(), reinterpret_cast<std::uintptr_t>(into.data()), into.size(), 0);
  }
  if (code == 0) code = nixl_.xfer_dlist_add_desc(remote.get(), address, into.size(), 0);
  Handle request = nullptr;
  if (code == 0) {
    code =
        nixl_.create_xfer_req(agent_, NixlLibrary::kRead, local.get(), remote.get(), name.c_str(), &request, nullptr);
  }
  if (code != 0) return failed("preparing a read from node " + name, code);
  Transfer transfer(*this, request, NixlLibrary::kInProgress);
  transfer.code_ = nixl_.post_xfer_req(agent_, request, nullptr);
  return transfer;
}

NixlAgent::Transfer::Transfer(Transfer&& other) noexcept
    : agent_(other.agent_), request_(std::exchange(other.request_, nullptr)), code_(other.code_) {}

NixlAgent::Transfer& NixlAgent::Transfer::operator=(Transfer&& other) noexcept {
  std::swap(agent_, other.agent_);
  std::swap(request_, other.request_);
  std::swap(code_, other.code_);
  return *this;
}

NixlAgent::Transfer::~Transfer() {
  if (request_ == nullptr) return;
  agent_->nixl_.release_xfer_req(agent_->agent_, request_);
  agent_->nixl_.destroy_xfer_req(request_);
}

NixlAgent::Progress NixlAgent::Transfer::poll() {
  if (code_ == NixlLibrary::kInProgress) code_ = agent_->nixl_.get_xfer_status(agent_->agent_, request_);
  if (code_ == NixlLibrary::kInProgress) return Progress::kUnderWay;
  return code_ == NixlLibrary::kSuccess ? Progress::kDone : Progress::kFailed;
}

}  // namespace flexkv::net
