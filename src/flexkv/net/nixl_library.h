// NIXL's C interface, loaded when it is asked for: a wheel must import on machines that have none. Declared is only
// what is used, because NIXL's wheels (PyPI: nixl-cu13) bring the library without its headers. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "flexkv/base/result.h"

namespace flexkv::net {

struct NixlLibrary {
  using Handle = void*;  // of any of NIXL's objects
  using Code = int;
  static constexpr Code kSuccess = 0;
  static constexpr Code kInProgress = 1;  // what is negative is an error
  static constexpr unsigned kHostMemory = 0;
  static constexpr unsigned kRead = 0;
  static constexpr unsigned kThreadSafe = 2;  // AgentConfig::thread_sync
  struct AgentConfig {
    bool progress_thread;
    bool listen_thread;
    std::uint16_t listen_port;
    unsigned thread_sync;
    unsigned workers;
    std::uint64_t progress_delay_microseconds;
    std::uint64_t listen_delay_microseconds;
    bool telemetry;
  };

  bool (*is_stub)();
  Code (*create_configured_agent)(const char* name, const AgentConfig* config, Handle* agent);
  Code (*destroy_agent)(Handle agent);
  Code (*get_plugin_params)(Handle agent, const char* plugin, Handle* memories, Handle* params);
  Code (*destroy_mem_list)(Handle memories);
  Code (*destroy_params)(Handle params);
  Code (*create_backend)(Handle agent, const char* plugin, Handle params, Handle* backend);
  Code (*destroy_backend)(Handle backend);
  Code (*create_reg_dlist)(unsigned memory, Handle* list);
  Code (*destroy_reg_dlist)(Handle list);
  Code (*reg_dlist_add_desc)(Handle list, std::uintptr_t address, std::size_t bytes, std::uint64_t device,
                             const void* metadata, std::size_t metadata_bytes);
  Code (*register_mem)(Handle agent, Handle list, Handle options);
  Code (*get_local_md)(Handle agent, void** data, std::size_t* bytes);                     // malloc's
  Code (*load_remote_md)(Handle agent, const void* data, std::size_t bytes, char** name);  // malloc's
  Code (*invalidate_remote_md)(Handle agent, const char* name);
  Code (*create_xfer_dlist)(unsigned memory, Handle* list);
  Code (*destroy_xfer_dlist)(Handle list);
  Code (*xfer_dlist_add_desc)(Handle list, std::uintptr_t address, std::size_t bytes, std::uint64_t device);
  Code (*create_xfer_req)(Handle agent, unsigned operation, Handle local, Handle remote, const char* name,
                          Handle* request, Handle options);
  Code (*post_xfer_req)(Handle agent, Handle request, Handle options);
  Code (*get_xfer_status)(Handle agent, Handle request);
  Code (*release_xfer_req)(Handle agent, Handle request);
  Code (*destroy_xfer_req)(Handle request);

  // `path` of libnixl_capi.so. Never unloaded. The error says what to install.
  static Result<NixlLibrary> load(const std::string& path);
};

}  // namespace flexkv::net
