// Reads of other processes' memory through NIXL and UCX, which choose the way (RDMA, shared memory, TCP). The other
// side takes no part in a read, and is not asked whether it wants it. Thread-compatible. NIXL has a thread of its own,
// which serves the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "flexkv/base/result.h"
#include "flexkv/net/nixl_library.h"

namespace flexkv::net {

class NixlAgent {
 public:
  // `name`: by which others know it; of two with one name they reach only one.
  static Result<std::unique_ptr<NixlAgent>> create(const NixlLibrary& library, const std::string& name);
  // Ends what is under way; then nobody reads or writes what was registered through it.
  ~NixlAgent();
  NixlAgent(const NixlAgent&) = delete;
  NixlAgent& operator=(const NixlAgent&) = delete;

  // Memory that stays where it is until this agent is gone. Whoever gets metadata() can read it AND WRITE it: NIXL
  // registers memory for both, and no transport is told otherwise.
  Status register_memory(std::span<std::byte> memory);
  // What others need in order to reach the memory registered so far.
  Result<std::vector<std::byte>> metadata() const;

  // Fails when that is not the metadata of an agent of this name. Of whom it is then is not touched by it.
  Status add(const std::string& name, std::span<const std::byte> metadata);
  void forget(const std::string& name);

  enum class Progress { kUnderWay, kDone, kFailed };
  // One read. NIXL cannot recall it: while it is under way, its memory may be written.
  class Transfer {
   public:
    Transfer(Transfer&& other) noexcept;
    Transfer& operator=(Transfer&& other) noexcept;
    ~Transfer();
    Progress poll();

   private:
    friend class NixlAgent;
    Transfer(const NixlAgent& agent, NixlLibrary::Handle request, NixlLibrary::Code code)
        : agent_(&agent), request_(request), code_(code) {}

    const NixlAgent* agent_;
    NixlLibrary::Handle request_;  // null: moved from
    NixlLibrary::Code code_;
  };
  // Begins to read from `address` of the agent of this name into registered memory.
  Result<Transfer> read(const std::string& name, std::uint64_t address, std::span<std::byte> into) const;

 private:
  NixlAgent(const NixlLibrary& library, NixlLibrary::Handle agent) : nixl_(library), agent_(agent) {}

  Status learn_beginning(const std::string& name);

  const NixlLibrary nixl_;
  const NixlLibrary::Handle agent_;
  std::vector<std::byte> beginning_;  // of everybody's metadata, up to the name
};

}  // namespace flexkv::net
